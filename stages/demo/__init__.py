"""All of it, on a small world of its own."""
