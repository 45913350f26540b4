#!/usr/bin/env bash
# Submits what is missing of each federation of this study, as a chain of jobs of its own; chains run side by side. Run it
# again after a stop: what is done, and what is in the queue, is passed over. The table, at any time when all is done:
#   {{ collected_by }}
cd "$(dirname "$0")/.." || exit
for place in \
{% for place in places %}
    {{ place }}{{ " \\" if not loop.last else "" }}
{% endfor %}
do
    echo "$place"
    "$place/slurm/submit.sh" || { code=$?; [ "$code" = 7 ] || exit "$code"; }    # 7: its jobs are in the queue
done
