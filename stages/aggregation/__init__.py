"""How updates become one adapter, and whether it is taken."""
