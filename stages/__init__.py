"""Algorithm 1 of FedCoLLM, one module for each step: open, look, compute, publish (artefacts.steps has the driver).

    line   module        reads                                           writes
    -      keys, enroll, join                                           exchange/keys, exchange/federation.json
    11     broadcast     private/server/round-(t-1)/slm (if t > 1)       exchange/round-t/broadcast: theta^t
    22-34  client_train  exchange/round-t/broadcast, private/client-k    exchange/round-t/client-k: theta_k^{t+1}
    (31)   reveal        exchange/round-t/close (sums alone)             exchange/round-t/reveal-k
    13     aggregate     exchange/round-t/{broadcast,client-*,reveal-*}  private/server/round-t/aggregate: theta^{t,0}
    15-20  co_distill    the aggregate, round t-1's llm, D^a             private/server/round-t/{slm,llm}: theta, omega
                         in two phases also, and back again              private/server/round-t/captured-{slm,llm}
    -      align         both tokenizers, rows                           private/server/alignment
    FedMKT align_party   its tokenizer, D_p                              exchange/round-0001/vocabulary-*
           share_knowl.  private/client-k/round-t/trained; the llm       exchange/round-t/client-k, server: S_k, S_0
           client_dist.  exchange/round-t/server, D_p                    private/client-k/round-t/slm
    (4.1)  evaluate      one adapter, an lm-eval task                    results/round-t/*.json
    -      evaluate_rows one adapter, rows of one's own                  results/own-rows/round-t/*.json

The steps stand in this folder, and nothing else. Around them are rooms, each for one thing, and each imports only those
before it:

    runtime       what a stage says and hears            files         files that are whole or absent
    paper         the paper as data                      workspace     layout, names, settings, task files, init
    parties       keys, roster, vault, signatures        bases         base models on disk
    data          rows, questions, prepare               artefacts     manifests, adapters, records, checkpoints
    accounting    what privacy was spent                 exchange      pack, unpack, invitations, what travels
    progress      how far a federation is, status        models        base models and adapters, loaded
    secagg        secure aggregation, a channel          encryption    encrypted aggregation, a channel
    study         federations side by side               training      losses, batches, steps
    evaluation    lm-eval's scores                       aggregation   channels, rules, the gate
    distillation  in one phase or two                    privacy       how clients train, DP-SGD
    export        a model as others load it              shearing      a small model from the large one

and above the steps those that look ahead (planning: plan, prefetch, comm_cost) or back (audit: audit, verify, diff),
that draw (report), that drive the steps (federation: run, next, compare, sweep, slurm) or begin a party's folder (there
too: joining), and the demo. Steps meet on disk only: none imports another. tests/test_house.py holds all of this.
"""
