"""The nouns. Each part imports only parts that stand before it here.

plain: errors, events, quiet, texts, paper, shamir, config, accounting, seclusion, files, turns, checkpoints, processes,
    one_time, task_files, workspace, edits, bundles, vault, signatures, roster, base_files, bases, tensor_files,
    manifest, spending, openings, said, progress, ledger, base_names, rows, distillation_inputs, variants, subjects,
    records, chain, model_card, checks, audited, audit_signatures, audit_chain, audit_files, audit_leaks, audit_secrets,
    audit_privacy
with NumPy: secret_random, adapter_files, capture_files, vectors, aggregators, ring, keystreams, masking, reveals,
    unmasking, uploads, sums, parcels, partition, budgets, evidence, statistics, drift, lora_settings, any_adapter,
    audit_layout, audit_numbers, audit_clients, audit_secagg
the report's: findings, charts, curves, bars, figures, page
with torch: losses, base_loading, batches, adapters, quantization, sharding, models, exports, objective, dry_step, gate,
    shapes, memory, trackers, schedule, training, distillation, captures, two_phases, private_training
with lm-eval: tasks, missing, scoring
the demo's: world, tiny_models
"""
