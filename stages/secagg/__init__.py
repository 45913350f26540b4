"""Secure aggregation: its primitives, then the protocol by its phases."""
