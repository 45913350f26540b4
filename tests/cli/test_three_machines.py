"""Three folders that share nothing but what is copied between them do what one workspace does, byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import AGREEMENT, Outcome, adapters, make_workspace

ROUNDS, CLIENTS = (1, 2), (1, 2)


@pytest.fixture
def together(tmp_path: Path, base_models: Path) -> Path:
    """One workspace of two clients with everything, in which nothing has been done."""
    folder = make_workspace(tmp_path / "together", base_models)
    (folder / "fedcollm.toml").write_text(AGREEMENT.replace("clients = 3", "clients = 2"))
    shutil.rmtree(folder / "private/client-3")
    return folder


def machine(folder: Path, together: Path, private: str, *models: str) -> Path:
    """A machine's copy of the workspace: the agreement, its own data, and the base models that it needs."""
    (folder / "models").mkdir(parents=True)
    shutil.copy(together / "fedcollm.toml", folder)
    shutil.copytree(together / "private" / private, folder / "private" / private)
    for model in models:
        shutil.copytree(together / "models" / model, folder / "models" / model)
    return folder


def carry(source: Path, target: Path, round: int, what: str) -> None:
    """cp -r, of one folder of the exchange."""
    name = f"exchange/round-{round:04d}/{what}"
    shutil.copytree(source / name, target / name)


def test_three_machines_that_share_only_the_exchange_end_where_one_machine_ends(
    tmp_path: Path, together: Path, fedcollm: Callable[..., Outcome]
) -> None:
    server = machine(tmp_path / "server", together, "server", "slm", "llm")
    clients = {k: machine(tmp_path / f"machine-{k}", together, f"client-{k}", "slm") for k in CLIENTS}

    def give(folder: Path, *words: object) -> None:
        outcome = fedcollm(*words, "-w", folder)
        assert outcome.code == 0, outcome.err

    for round in ROUNDS:
        give(server, "broadcast", "--round", round)
        for k, folder in clients.items():
            carry(server, folder, round, "broadcast")
            give(folder, "client-train", "--client", k, "--round", round)
            carry(folder, server, round, f"client-{k}")
        give(server, "aggregate", "--round", round)
        give(server, "co-distill", "--round", round)
    give(together, "run", "--no-scores")

    expected = adapters(together)
    assert adapters(server) == expected
    for k, folder in clients.items():
        held = adapters(folder)
        assert held.items() <= expected.items()
        # It has seen the broadcasts and its own updates; no other client's, and nothing of the server's.
        seen = {f"exchange/round-{round:04d}/{what}" for round in ROUNDS for what in ("broadcast", f"client-{k}")}
        assert {str(Path(name).parent) for name in held} == seen
        assert {path.name for path in (folder / "private").iterdir()} == {"agreements", f"client-{k}"}
    assert {path.name for path in (server / "private").iterdir()} == {"agreements", "server"}


def test_what_travels_holds_no_training_text(tmp_path: Path, together: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert fedcollm("run", "--no-scores", "--rounds", "1", "-w", together).code == 0
    travels = [path for path in (together / "exchange").rglob("*") if path.is_file()]
    assert {path.suffix for path in travels} == {".json", ".safetensors"}
    for path in travels:
        content = path.read_bytes()
        assert b"colour" not in content
        assert b"prompt" not in content
