"""Other people's bars and chatter kept out of ours: stages report, the console draws."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Drop what libraries, and the programs they call, print to stdout and stderr meanwhile; what they raise passes.

    The console writes to a copy of stderr, made before, and is not silenced.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
        for stream in (1, 2):
            kept = os.dup(stream)
            os.dup2(nowhere.fileno(), stream)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, stream)
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
