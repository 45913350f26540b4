"""Progress where there is no terminal: now and then a line, with the time that is left."""

from __future__ import annotations

import time

import pytest

from fedcollm_cli.console import PLAIN_INTERVAL_S, Console
from stages.runtime.events import Event


def test_a_line_says_how_much_time_is_left(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Console(quiet=False, as_json=False) as console:
        console.report(Event("stage", "client-train"))
        for step in range(1, 61):
            now[0] += 100 if step == 1 else PLAIN_INTERVAL_S / 2 + 0.5  # loading a model is no step
            console.report(Event("step", step=step, total=60, values={"loss": 0.5}))
    lines = capfd.readouterr().err.splitlines()
    # Steps of 5.5 s, a line every other: after 3 steps 57 are left, 313.5 s; the first line knows no pace yet.
    assert lines[0] == "  client-train  1/60  loss 0.5"
    assert lines[1] == "  client-train  3/60  loss 0.5  about 5.2 min left"
    assert lines[2] == "  client-train  5/60  loss 0.5  about 5.0 min left"
    assert lines[-2] == "  client-train  59/60  loss 0.5  about 6 s left"


def test_where_the_end_is_not_known_no_time_is_told(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcollm_cli.console.PLAIN_INTERVAL_S", -1.0)
    with Console(quiet=False, as_json=False) as console:
        console.report(Event("stage", "verify"))
        for step in (1, 2, 3):
            console.report(Event("step", step=step))
    assert "left" not in capfd.readouterr().err
