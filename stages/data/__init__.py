"""Rows and questions: reading them, dividing them, asking them."""
