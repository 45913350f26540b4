"""A smaller model made from a larger one: some of its blocks, healed by the whole."""
