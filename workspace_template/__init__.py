"""What `fedcollm init` copies."""
