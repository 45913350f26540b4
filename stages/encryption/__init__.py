"""Encrypted aggregation, a channel: the server adds ciphertexts, and one client opens their sum."""
