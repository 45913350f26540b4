"""The command line of fedcollm."""

import sys

if sys.platform == "win32":  # whose files have no fcntl.flock, O_NOFOLLOW or openat
    sys.stderr.write(
        "error: fedcollm does not run on Windows itself: it needs Linux or macOS\n"
        "  mend  install it in WSL 2, which is a Linux in Windows\n"
    )
    sys.exit(2)

from stages.runtime import version

__version__ = version.VERSION
