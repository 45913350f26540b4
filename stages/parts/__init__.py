"""The nouns. Each part imports only parts that stand before it here.

plain: errors, events, quiet, paper, config, files, workspace, manifest, ledger, bases, rows
with NumPy: adapter_files, aggregators, partition
with torch: losses, batches, adapters, models, objective, shapes, memory, training
with lm-eval: tasks, missing, scoring
the demo's: world, tiny_models
"""
