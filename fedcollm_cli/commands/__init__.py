"""The commands, one module for each group: they parse, call a stage, and show what it returns."""
