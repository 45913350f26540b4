"""Base models on disk: where they lie, what they are called, what can be known without loading them."""
