#!/usr/bin/env bash
# Submits what is missing as a chain of jobs, each to begin when the one before has ended well. Run it again after a stop, or
# when files have arrived: what is done is passed over. To stop: scancel $(cat slurm/jobs.txt)
cd "$(dirname "$0")/.." || exit
. slurm/stage.sh
set -e
this_job=${SLURM_JOB_ID:-none}  # within a job, as window.sbatch: its own settings are not for the jobs submitted here
unset $(compgen -e SLURM_ | grep -vx SLURM_CONF)

mkdir -p slurm/logs
exec 9>> slurm/jobs.txt
flock --nonblock --conflict-exit-code 7 9 || [ $? != 7 ] || { echo "slurm/submit.sh is at work already" >&2; exit 7; }
queue=$(squeue --me --noheader --format=%F)
queued=$(grep -Fxf slurm/jobs.txt <<< "$queue" | grep -Fxv "$this_job" | sort -nu | paste -sd' ') || true
if [ "$queued" ]; then
    echo "not submitted twice: jobs of this workspace are in the queue: $queued" >&2
    exit 7
fi

{% if in_public %}
jobs=$(fedcollm slurm --jobs{{ arguments }})  # one a line: script, round, tasks of an array, what it waits for
declare -A ids
{% else %}
jobs=$(fedcollm slurm --jobs{{ arguments }})  # one a line: script, round, tasks of an array
{% endif %}
: > slurm/jobs.txt
rm -f slurm/logs/*.failures
after=
while read -r script round tasks{{ " needs" if in_public }}; do
    [ "$script" ] || break
{% if in_public %}
    tasks=${tasks#-} after=
    for need in $needs; do    # such as aftercorr:client/2, which lets each task wait for the task of its own client alone
        after+=${after:+,}${need%%:*}:${ids[${need#*:}]}
    done
{% endif %}
    said=$(sbatch --parsable --kill-on-invalid-dep=yes ${after:+--dependency=$after} \
        ${tasks:+--array=$tasks{{ limit }}} --export=ALL,ROUND="$round" "slurm/$script.sbatch") || {
        echo "submitted so far: $(paste -sd' ' slurm/jobs.txt); when they have ended, slurm/submit.sh goes on" >&2
        echo "where a site limits how many jobs there may be: fedcollm slurm --window 5" >&2
        exit 1
    }
    # A site's sbatch may print more than the number and a cluster's name after a semicolon, before it and after it.
    id=$({ grep -oE '^[[:space:]]*[0-9]+(;.*|[[:space:]]*)$' || grep -oiE 'batch job [0-9]+' <<< "$said" ||
        grep -oE '[0-9]+[[:space:]]*$' <<< "$said"; } <<< "$said" | tail -n 1 | sed 's/;.*//') || {
        printf 'sbatch told no number of a job, and nothing was submitted after it; it said:\n%s\n' "$said" >&2
        exit 1
    }
    id=${id//[^0-9]/}
    echo "$id" >> slurm/jobs.txt
    echo "$id $script round $round${tasks:+ clients $tasks}"
{% if in_public %}
    ids[$script/$round]=$id
{% elif quorum %}
    # After the clients' tasks, whichever way they ended: min_clients decides whether they are enough.
    if [ "$tasks" ]; then after=${after:+$after,}afterany:$id; else after=afterok:$id; fi
{% else %}
    after=afterok:$id
{% endif %}
done <<< "$jobs"
