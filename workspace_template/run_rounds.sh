#!/usr/bin/env bash
# Every round of the federation by the separate commands, on one machine. Copy what you need into your own job scripts.
# Run it again after a stop: what is done is passed over.
set -euo pipefail
cd "$(dirname "$0")"

clients=${CLIENTS:-$(sed -n 's/^clients *= *\([0-9]*\).*/\1/p' fedcollm.toml)}
rounds=${ROUNDS:-$(sed -n 's/^rounds *= *\([0-9]*\).*/\1/p' fedcollm.toml)}

for round in $(seq 1 "$rounds"); do
    fedcollm broadcast --round "$round"                            # server  -> exchange/round-t/broadcast
    for client in $(seq 1 "$clients"); do
        fedcollm client-train --client "$client" --round "$round"  # client  -> exchange/round-t/client-k
    done
    fedcollm aggregate --round "$round"                            # server  -> private/server/round-t/aggregate
    fedcollm co-distill --round "$round"                           # server  -> private/server/round-t/{slm,llm}
    fedcollm evaluate --round "$round" --model slm                 # scores  -> results/round-t/slm.json
    fedcollm evaluate --round "$round" --model llm
done
