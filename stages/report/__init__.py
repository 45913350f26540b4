"""The page of charts and tables."""
