"""A workspace: its layout and names, the agreement with its task files, this machine's settings."""
