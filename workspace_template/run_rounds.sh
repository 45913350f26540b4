#!/usr/bin/env bash
# Every round of the federation by the separate commands, on one machine. Copy what you need into your own job scripts.
# In secure and encrypted mode it plays all parties with their keys: between organisations each runs its own lines, in this order, and
# exchange/ is carried between them (docs/how-to/between-organisations.md of fedcollm).
# Run it again after a stop: what is done is passed over. Between machines, `fedcollm next` takes a party's next step.
set -euo pipefail
cd "$(dirname "$0")"

clients=${CLIENTS:-$(sed -n 's/^clients *= *\([0-9]*\).*/\1/p' fedcollm.toml)}
rounds=${ROUNDS:-$(sed -n 's/^rounds *= *\([0-9]*\).*/\1/p' fedcollm.toml)}
secure=$(sed -n 's/^mode *= *"secure".*/yes/p' fedcollm.toml)
encrypted=$(sed -n 's/^mode *= *"encrypted".*/yes/p' fedcollm.toml)
opener=$(sed -n 's/^opener *= *\([0-9]*\).*/\1/p' fedcollm.toml)
method=$(sed -n 's/^method *= *"\([a-z0-9-]*\)".*/\1/p' fedcollm.toml)
average=$(sed -n 's/^average *= *true.*/yes/p' fedcollm.toml)
own_models=$(sed -n 's/^\[clients\.[0-9]*\.slm\].*/yes/p' fedcollm.toml)

case $method in fedmkt | llm2slm | standalone-public)                      # no adapter travels, but to be averaged
    [ "$method" = standalone-public ] || fedcollm align                    # all -> exchange/round-0001/vocabulary-*
    [ "$method" != llm2slm ] || fedcollm share-knowledge --server --round 1 # server  -> exchange/round-0001/server
    for round in $(seq 1 "$rounds"); do
        if [ "$average" ] || { [ "$round" = 1 ] && [ -z "$own_models" ]; }; then
            fedcollm broadcast --round "$round"                            # server  -> exchange/round-t/broadcast
        fi
        for client in $(seq 1 "$clients"); do
            fedcollm client-train --client "$client" --round "$round"      # client  -> private/client-k/round-t/trained
            [ "$method" = fedmkt ] || continue
            fedcollm share-knowledge --client "$client" --round "$round"   # client  -> exchange/round-t/client-k
        done
        if [ "$method" = fedmkt ]; then
            fedcollm co-distill --round "$round"                           # server  -> private/server/round-t/llm
            fedcollm share-knowledge --server --round "$round"             # server  -> exchange/round-t/server
            fedcollm evaluate --round "$round" --model llm                 # scores  -> results/round-t/llm.json
        fi
        for client in $(seq 1 "$clients"); do
            fedcollm client-distill --client "$client" --round "$round"    # client  -> private/client-k/round-t/slm
            fedcollm evaluate --round "$round" --client "$client"          # or exchange/round-t/adapter-client-k
        done
        if [ "$average" ]; then
            fedcollm aggregate --round "$round"                            # server  -> private/server/round-t/aggregate
            fedcollm evaluate --round "$round" --model aggregate
        fi
    done
    exit ;;
esac

if [ "$secure$encrypted" ]; then
    for client in $(seq 1 "$clients"); do
        fedcollm keys --client "$client"                           # client  -> exchange/keys/client-k.json
    done
    fingerprint=$(fedcollm enroll)                                 # server  -> exchange/federation.json
    for client in $(seq 1 "$clients"); do                          # between organisations: type what another client read out
        fedcollm join --client "$client" --fingerprint "$fingerprint"
    done
fi

for round in $(seq 1 "$rounds"); do
    fedcollm broadcast --round "$round"                            # server  -> exchange/round-t/broadcast
    for client in $(seq 1 "$clients"); do
        fedcollm client-train --client "$client" --round "$round"  # client  -> exchange/round-t/client-k
    done
    if [ "$secure$encrypted" ]; then
        fedcollm aggregate --round "$round" || [ $? = 3 ]          # server  -> exchange/round-t/close
        for client in ${secure:+$(seq 1 "$clients")} ${encrypted:+${opener:-1}}; do
            fedcollm reveal --client "$client" --round "$round"    # client  -> exchange/round-t/reveal-k
        done
    fi
    fedcollm aggregate --round "$round"                            # server  -> private/server/round-t/aggregate
    fedcollm co-distill --round "$round"                           # server  -> private/server/round-t/{slm,llm}
    fedcollm evaluate --round "$round" --model slm                 # scores  -> results/round-t/slm.json
    fedcollm evaluate --round "$round" --model llm
done
