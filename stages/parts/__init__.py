"""The nouns. Each part imports only parts that stand before it here.

plain: errors, events, quiet, config, files, workspace, manifest, subjects, model_card, rows
with NumPy: adapter_files, aggregators, partition
with torch: losses, batches, adapters, models, exports, objective, training; with lm-eval: tasks, scoring
the demo's: world, tiny_models
"""
