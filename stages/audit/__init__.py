"""Looking back: every check of what was exchanged."""
