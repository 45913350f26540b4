"""The command line of fedcollm."""

from stages.runtime import version

__version__ = version.VERSION
