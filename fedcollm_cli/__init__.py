"""The command line of fedcollm."""

__version__ = "0.1.0"
