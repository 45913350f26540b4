"""Secure mode: parties that are killed, that do a step twice at once, or that keep their secrets badly.

The thirty faults that the protocol has an answer to are in tests/cli/test_faulty_*.py, by their numbers: here
25, 27 and 28.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, adapters, contents
from faulty_federations import (
    AGGREGATE,
    RESULT,
    reveal,
    secrets_of,
    state,
    train,
)
from processes import start

Fedcollm, Refused, Secure = Callable[..., Outcome], Callable[..., str], Callable[[str], Path]
Give = Callable[..., Outcome]
MANIFEST, WEIGHTS = "manifest.json", "adapter_model.safetensors"


# --- 25, 27: killed, and two at once


@pytest.fixture
def apart(secure_states: Path, tmp_path: Path) -> Callable[[str], Path]:
    """As secure, as often as one asks; where keys are is in machine.toml: processes of their own know no fixture."""
    numbers = itertools.count()

    def call(name: str) -> Path:
        place = tmp_path / f"{name}-{next(numbers)}"
        folder = state(secure_states, name, place)
        (folder / "machine.toml").write_text(f'secrets = "{place / "secrets/fedcollm"}"\n')
        return folder

    return call


def kill(delay_s: float, lock: Path, *words: object) -> None:
    """Kill a command so long after it has begun its work; it may have ended by then."""
    lock.unlink(missing_ok=True)
    work = start(*words)
    work.wait_until(lock.exists)
    time.sleep(delay_s)
    with contextlib.suppress(ProcessLookupError):
        work.stop(signal.SIGKILL)


def test_25_a_client_killed_at_any_moment_sends_one_whole_update_when_asked_again(apart: Secure, give: Give) -> None:
    folder = apart("opened")
    for client, delay_s in ((1, 0.0), (2, 0.05), (3, 0.1), (4, 0.2)):
        kill(delay_s, folder / f"private/client-{client}/round-0001/client-train.lock", *train(client), "-w", folder)
        give(folder, *train(client))
    assert "round 1 is closed over client 1, 2, 3, 4" in give(folder, *AGGREGATE, code=3).err


def test_25_a_server_killed_at_any_moment_ends_with_the_same_bytes(apart: Secure, give: Give) -> None:
    folder, whole = apart("revealed"), apart("revealed")
    give(whole, *AGGREGATE)
    for delay_s in (0.0, 0.005, 0.01, 0.02):
        kill(delay_s, folder / RESULT.replace("aggregate", "aggregate.lock"), *AGGREGATE, "-w", folder)
        give(folder, *AGGREGATE)
        assert contents(folder / RESULT) == contents(whole / RESULT)
        shutil.rmtree(folder / RESULT)


@pytest.mark.parametrize(("name", "done"), [("answered", 3), ("revealed", 0)])
def test_27_two_servers_at_once_make_one_result(name: str, done: int, apart: Secure) -> None:
    whole = apart(name)
    assert start(*AGGREGATE, "-w", whole).end()[0] == done
    for _ in range(4):
        folder = apart(name)
        ends = [work.end() for work in [start(*AGGREGATE, "-w", folder) for _ in range(2)]]
        assert {code for code, _ in ends} <= {done, 7}, ends
        assert any(code == done for code, _ in ends)
        assert adapters(folder) == adapters(whole)


# --- 28: secrets that others could read


@pytest.mark.parametrize("name", ["identity.pem", "ratchet.json", "round-0001.json", "."])
@pytest.mark.parametrize(
    ("party", "command"),
    [
        ("server", "aggregate --round 1"),
        ("server", "broadcast --round 1"),
        ("client-1", "client-train --client 1 --round 1"),
        ("client-1", "reveal --client 1 --round 1"),
        ("client-1", "keys --client 1"),
    ],
)
def test_28_a_secret_that_others_can_read_is_refused_with_the_chmod_that_mends_it(
    party: str, command: str, name: str, secure: Secure, refused: Refused
) -> None:
    folder = secure("closed")
    path = secrets_of(folder, party) / name
    path.chmod(0o755 if name == "." else 0o644)
    said = refused(folder, 5, *command.split())
    shown = path.name if name != "." else party
    assert f"others can read the secret {shown} (mode 0{'755' if name == '.' else '644'})" in said
    assert f"mend  chmod {'700' if name == '.' else '600'} {path}" in said


def test_28_secrets_in_the_workspace_are_refused_and_the_audit_finds_them(
    secure: Secure, own_secrets: Path, refused: Refused, fedcollm: Fedcollm
) -> None:
    folder = secure("closed")
    shutil.copytree(own_secrets / "fedcollm", folder / "keys")
    (folder / "machine.toml").write_text('secrets = "keys"\n')
    said = refused(folder, 5, *reveal(1))
    assert "secret keys lie in the workspace, which travels" in said
    assert "mend  move it out, and set secrets in machine.toml to its new place" in said
    outcome = fedcollm("audit", "-w", folder)
    assert outcome.code == 4
    assert "A8  FAIL" in outcome.out
