"""Base models and adapters loaded: known by content, on a device, packed into batches."""
