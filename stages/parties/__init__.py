"""Who takes part: keys, the roster, signatures, and what a party remembers."""
