"""What a stage says and hears: errors, events, the words of others, quiet libraries, its processes."""
