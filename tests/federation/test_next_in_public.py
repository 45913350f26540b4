"""next and status for FedMKT and its baselines: from an empty workspace to the end, and after each kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, adapters, edit, make_unlike_workspace
from stages.federation.run import run
from stages.progress.status import status
from stages.workspace.paths import Workspace

CLIENTS = (1, 2, 3)
ALIGN = ["align --server", *(f"align --client {k}" for k in CLIENTS)]
TRAIN = [f"client-train --client {k} --round {{0}}" for k in CLIENTS]
TELL = [f"share-knowledge --client {k} --round {{0}}" for k in CLIENTS]
DISTIL = [f"client-distill --client {k} --round {{0}}" for k in CLIENTS]
FEDMKT = [
    *(line for k in range(3) for line in (TRAIN[k], TELL[k])),
    *("co-distill --round {0}", "share-knowledge --server --round {0}", *DISTIL),
]
BROADCAST = "broadcast --round 1"


def of_rounds(*lines: str) -> list[str]:
    return [line.format(round) for round in (1, 2) for line in lines]


SHARED = "one SLM for all"
GIVEN = {
    "fedmkt": [*ALIGN, *of_rounds(*FEDMKT)],
    f"fedmkt, {SHARED}": [*ALIGN, BROADCAST, *of_rounds(*FEDMKT)],
    "llm2slm": [*ALIGN, "share-knowledge --server --round 1", *of_rounds(*TRAIN, *DISTIL)],
    "standalone-public": of_rounds(*TRAIN, *DISTIL),
    f"standalone-public, {SHARED}": [BROADCAST, *of_rounds(*TRAIN, *DISTIL)],
    "standalone": of_rounds(*TRAIN),
}
"""What is done in two rounds, by method."""


def make(folder: Path, models: Path, method: str) -> Path:
    """A workspace of this method, of three unlike models or of one; nothing is done."""
    make_unlike_workspace(folder, models)
    toml, name = folder / "fedcollm.toml", method.partition(",")[0]
    edit(toml, 'method = "fedmkt"', f'method = "{name}"')
    if name.startswith("standalone"):
        edit(toml, 'select = "min-ce"\n', "")
    if SHARED in method:
        toml.write_text(toml.read_text().partition("[clients.2.slm]")[0])
    return folder


@pytest.mark.parametrize("method", GIVEN)
def test_next_goes_from_an_empty_workspace_to_where_run_ends(
    method: str, tmp_path: Path, unlike_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = make(tmp_path / "by-next", unlike_models, method)
    given = []
    while command := str(json.loads(fedcollm("status", "--json", "-w", folder).out)["next_command"]):
        if "evaluate" in command:
            break
        assert len(given) < 40
        outcome = fedcollm("next", "-w", folder)
        assert outcome.code == 0, outcome.err
        assert f"{outcome.out.strip()} --workspace {folder}" == command
        given.append(outcome.out.strip().removeprefix("fedcollm "))
    assert given == GIVEN[method]
    together = make(tmp_path / "by-run", unlike_models, method)
    run(Workspace(together), scores=False)
    left = adapters(together)
    if method == "llm2slm":  # the server learns from no client: only `run` aligns it with them all the same
        left = {name: digest for name, digest in left.items() if "private/server/alignment-" not in name}
    assert adapters(folder) == left
    found = status(Workspace(folder), verify=True)
    assert all(round.is_done for round in found.rounds)
    assert not found.is_damaged
