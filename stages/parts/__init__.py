"""The nouns. Each part imports only parts that stand before it here.

plain: errors, events, quiet, paper, config, files, workspace, manifest, ledger, bases, rows, variants, subjects,
    model_card
with NumPy: adapter_files, aggregators, partition, budgets, evidence, statistics
the report's: findings, drift, charts, curves, bars, figures, page
with torch: losses, batches, adapters, models, exports, objective, shapes, memory, trackers, schedule, training
with lm-eval: tasks, missing, scoring
the demo's: world, tiny_models
"""
