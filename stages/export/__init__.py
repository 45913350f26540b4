"""A model as others load it, with its card."""
