"""The nouns. Each part imports only parts that stand before it here.

plain: errors, events, quiet, config, files, workspace, manifest, ledger, rows, variants, paper
with NumPy: adapter_files, aggregators, partition, budgets, evidence, statistics
the report's: findings, drift, charts, curves, bars, figures, page
with torch: losses, batches, adapters, models, objective, training; with lm-eval: tasks, scoring
the demo's: world, tiny_models
"""
