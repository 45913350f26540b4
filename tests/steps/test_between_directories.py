"""A secure round between K + 1 directories that share nothing but what is copied, with clients vanishing at every step.

It completes exactly where the updates and the reveals of a threshold are left, and then with the integer mean of the
updates that arrived, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import AGREEMENT, Outcome, make_workspace, rows, write_rows
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.parties.enroll import enroll
from stages.parties.join import join
from stages.parties.keys import keys
from stages.workspace.paths import Workspace

THRESHOLDS = {3: 3, 4: 3, 5: 4}  # floor(2 K / 3) + 1
BOUND = 8.0  # aggregation.max_update_value, by default
ROUND, WEIGHTS = "exchange/round-0001", "adapter_model.safetensors"

VANISHING = [gone for gone in product(range(3), repeat=3) if sum(gone) <= 2]
"""How many clients vanish before their upload, between it and their reveal, and after that."""


def party(world: Path, k: int) -> Path:
    return world / (f"client-{k}" if k else "server")


def carry(source: Path, target: Path, name: str) -> None:
    """cp -r, over whatever is there."""
    shutil.copytree(source / name, target / name, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Callable[[int], Path]:
    """K + 1 directories in which every client has trained and nothing has come back, made once for each K."""
    made: dict[int, Path] = {}

    def world_of(clients: int) -> Path:
        if clients not in made:
            made[clients] = _trained(tmp_path_factory.mktemp(f"{clients}-clients") / "world", clients, base_models)
        return made[clients]

    return world_of


def _trained(world: Path, clients: int, base_models: Path) -> Path:
    secure = f'[aggregation]\nmode = "secure"\nmin_clients = {THRESHOLDS[clients]}\n\n[evaluation]'
    text = AGREEMENT.replace("clients = 3", f"clients = {clients}").replace("steps = 6", "steps = 2")
    world.mkdir()
    for k in range(clients + 1):
        folder = make_workspace(party(world, k), base_models)
        shutil.rmtree(folder / "private")
        (folder / "fedcollm.toml").write_text(text.replace("[evaluation]", secure))
        (folder / "machine.toml").write_text('secrets = "../secrets"\n')
    server, members = party(world, 0), range(1, clients + 1)
    for k in members:
        write_rows(party(world, k) / "private" / f"client-{k}" / "train.jsonl", rows(8, start=8 * k))
        keys(Workspace(party(world, k)), client=k)
        carry(party(world, k), server, "exchange")
    fingerprint = enroll(Workspace(server)).fingerprint
    broadcast(Workspace(server), round=1)
    for k in members:
        carry(server, party(world, k), "exchange")
        join(Workspace(party(world, k)), client=k, fingerprint=fingerprint)
        client_train(Workspace(party(world, k)), client=k, round=1)
    return world


def mean(world: Path, survivors: list[int], clients: int) -> dict[str, np.ndarray]:
    """The broadcast and, on top, the mean of these clients' changes as whole numbers, in Python's own arithmetic."""
    largest = (2**31 - 1) // clients
    before = safetensors.numpy.load_file(party(world, 0) / ROUND / "broadcast" / WEIGHTS)
    after = [
        safetensors.numpy.load_file(party(world, k) / f"private/client-{k}/round-0001/slm" / WEIGHTS) for k in survivors
    ]
    found = {}
    for name, old in before.items():
        changes = [(one[name] - old).astype(np.float64) * (largest / BOUND) for one in after]
        total = sum(np.rint(change).astype(np.int64) for change in changes)
        found[name] = (old + total * (BOUND / (largest * len(survivors)))).astype(np.float32)
    return found


@pytest.mark.parametrize("gone", VANISHING, ids=lambda gone: "-".join(map(str, gone)))
@pytest.mark.parametrize("clients", [3, 4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_round_completes_exactly_where_a_threshold_is_left(
    clients: int,
    gone: tuple[int, int, int],
    trained: Callable[[int], Path],
    tmp_path: Path,
    fedcollm: Callable[..., Outcome],
) -> None:
    world = shutil.copytree(trained(clients), tmp_path / "world", symlinks=True)
    server, needed = party(world, 0), THRESHOLDS[clients]
    members = list(range(1, clients + 1))
    sending = members[gone[0] :]  # the first clients vanish
    revealing = sending[gone[1] :]
    left = revealing[gone[2] :]

    for k in sending:
        carry(party(world, k), server, f"{ROUND}/client-{k}")
    closing = fedcollm("aggregate", "--round", 1, "-w", server)
    assert closing.code == 3, closing.err
    if len(sending) < needed:
        assert f"has {len(sending)} of the {needed} updates it needs; absent: client 1" in closing.err
        assert not (server / ROUND / "close").exists()
        return
    assert f"waits for {needed} more reveals" in closing.err
    listed = json.loads((server / ROUND / "close/manifest.json").read_text())["closing"]
    assert sorted(listed) == [f"client-{k}" for k in sending]

    for number, k in enumerate(revealing, 1):
        carry(server, party(world, k), f"{ROUND}/close")
        outcome = fedcollm("reveal", "--client", k, "--round", 1, "-w", party(world, k))
        assert outcome.code == 0, outcome.err
        carry(party(world, k), server, f"{ROUND}/reveal-{k}")
        if k not in left:
            shutil.rmtree(party(world, k))
        assert fedcollm("aggregate", "--round", 1, "-w", server).code == (0 if number >= needed else 3)
    outcome = fedcollm("aggregate", "--round", 1, "-w", server)
    assert outcome.code == (0 if len(revealing) >= needed else 3), outcome.err
    place = server / "private/server/round-0001/aggregate" / WEIGHTS
    assert place.exists() == (outcome.code == 0)
    if place.exists():
        found = safetensors.numpy.load_file(place)
        for name, expected in mean(trained(clients), sending, clients).items():
            np.testing.assert_array_equal(found[name], expected)
