"""Results as people read them: what alone draws tables and texts."""
