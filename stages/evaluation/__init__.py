"""Scores from lm-eval tasks, and of whom."""
