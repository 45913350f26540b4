"""The nouns. Each part imports only parts that stand before it here.

plain: errors, events, quiet, config, files, workspace, manifest, rows, variants, paper, subjects, model_card
with NumPy: adapter_files, aggregators, partition, budgets, evidence, statistics
with torch: losses, batches, adapters, models, exports, objective, trackers, training; with lm-eval: tasks, scoring
the demo's: world, tiny_models
"""
