"""Mutual distillation, in one phase or in two."""
