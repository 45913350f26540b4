"""Files that are whole or absent: reading, writing, locks, and who may see them."""
