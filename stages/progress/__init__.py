"""How far a federation has come."""
