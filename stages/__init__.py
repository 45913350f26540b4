"""Algorithm 1 of FedCoLLM, one module for each step: open, check, compute, publish, return.

    line   module        reads                                           writes
    -      keys, enroll, join                                           exchange/keys, exchange/federation.json
    11     broadcast     private/server/round-(t-1)/slm (if t > 1)       exchange/round-t/broadcast: theta^t
    22-34  client_train  exchange/round-t/broadcast, private/client-k    exchange/round-t/client-k: theta_k^{t+1}
    (31)   reveal        exchange/round-t/close (secure mode)            exchange/round-t/reveal-k
    13     aggregate     exchange/round-t/{broadcast,client-*,reveal-*}  private/server/round-t/aggregate: theta^{t,0}
    15-20  co_distill    the aggregate, round t-1's llm, D^a             private/server/round-t/{slm,llm}: theta, omega
                         in two phases also, and back again              private/server/round-t/captured-{slm,llm}
    (4.1)  evaluate      one adapter, an lm-eval task                    results/round-t/*.json

Around them: init makes a workspace, prepare divides a public dataset, run does every step in one process, status says
what is there, next does what one party can do now, pack and unpack carry what travels as one file, demo shows it all in
a world of its own. Before them, plan says what all this will take and what is missing here, and prefetch fetches it.
After them, compare sets every method side by side, report draws it, sweep varies settings, comm_cost counts what
travels, export writes a model as others load it; verify walks the chain of manifests and signatures, audit checks all
that was exchanged, diff compares two adapters. Stages meet only on disk; `parts` are the nouns they use.
"""
