"""Differentially private training: its noise, DP-SGD."""
