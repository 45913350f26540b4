"""The paper as data: its tables, its settings, the shapes of its models."""
