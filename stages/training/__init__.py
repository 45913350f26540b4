"""A training: its losses, its batches, its steps, where it stops."""
