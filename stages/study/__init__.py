"""Several federations side by side: derived workspaces, results, budgets, statistics."""
