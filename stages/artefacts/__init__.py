"""What stages leave on disk: adapters and manifests, records and checkpoints, each held against a digest."""
