"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, drafts, published


@pytest.fixture
def refused(fedcollm: Callable[..., Outcome]) -> Callable[..., str]:
    """Give a command that must fail: refused(folder, 4, "aggregate", "--round", 1) -> what it said.

    It has to end with that exit code, to say where and what mends it, and to leave every published file alone.
    """

    def call(folder: Path, code: int, *words: object) -> str:
        before = published(folder)
        outcome = fedcollm(*words, "-w", folder)
        assert outcome.code == code, outcome.err
        assert outcome.err.startswith("error: ")
        assert "\n  in    " in outcome.err, f"names no file: {outcome.err}"
        assert "\n  mend  " in outcome.err, f"names no mend: {outcome.err}"
        assert "Traceback" not in outcome.err
        assert outcome.out == ""
        assert published(folder) == before
        assert drafts(folder) == []
        return outcome.err

    return call
