"""The disk fails at a write, fsync or rename of every command that publishes: at each; of several alike, at the last.

Each time: exit 8 with the file and the mend, nothing half written under a published name, what was there intact, no
draft left; and the same command, on a sound disk, ends with the very bytes of a run that nothing befell. Where fresh
randomness is drawn, the round ends with the very same average, and the vault knows what was published.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from builders import Outcome, drafts, edit, make_workspace, published, rows, write_rows
from command_line import give
from stages.accounting import budget, ledger
from stages.artefacts.reading import read_artefact
from stages.files import faults
from stages.parties import roster, roster_files
from stages.parties.vault import Vault
from stages.runtime.errors import StorageProblem
from stages.workspace.paths import Workspace
from storage_faults import FailingDisk, Kind

Call = Callable[..., Outcome]

MENDS = {
    errno.ENOSPC: "free some space and give the same command again",
    errno.EIO: "check the permissions and the disk",
}
KINDS: tuple[Kind, ...] = ("write", "fsync", "rename")
CLIENTS = (1, 2, 3)
RESULT = "study/private/server/round-0001/aggregate/adapter_model.safetensors"

COMMANDS = {
    "plain": [
        "prepare",
        "broadcast --round 1",
        *(f"client-train --client {k} --round 1" for k in CLIENTS),
        "aggregate --round 1",
        "co-distill --round 1",
        "broadcast --round 2",
        "evaluate --round 1 --model aggregate",
        "export --round 1 --model aggregate",
        "pack --client 1 --round 1 --output ../update.fedcollm",
        "pack --client 3 --round 1 --output ../from-client-3.fedcollm",
        "unpack ../from-client-3.fedcollm --overwrite",
        "client-train --client 3 --round 1 --overwrite",
        "broadcast --round 2 --overwrite",
    ],
    "secure": [
        *(f"keys --client {k}" for k in CLIENTS),
        "enroll",
        *(f"join --client {k} --fingerprint @" for k in CLIENTS),
        "broadcast --round 1",
        *(f"client-train --client {k} --round 1" for k in CLIENTS),
        "aggregate --round 1",
        *(f"reveal --client {k} --round 1" for k in CLIENTS),
        "aggregate --round 1  # unmasks",
        "broadcast --round 2",
        "broadcast --round 2 --overwrite",
    ],
}
GOES_ON = {"keys --client 3": 2, "enroll": 2, "client-train --client 3 --round 1": 6, "reveal --client 3 --round 1": 2}
GOES_ON["broadcast --round 2 --overwrite"] = 1
"""Commands of a secure round whose bytes differ: how many, from them on, show that it ends as it would have ended.

They draw at random; or, having failed in the last moment with everything in place, they begin another attempt.
"""
CLOSES = "aggregate --round 1"
SLOW = ("client-train --client 3 --round 1", "co-distill --round 1", "client-train --client 3 --round 1 --overwrite")


def chosen(mode: str) -> list[object]:
    """Every command once; of those that each client gives, the last client's."""
    found = [c for c in COMMANDS[mode] if "--client 1" not in c or c.startswith("pack")]
    return [
        pytest.param(mode, command, id=f"{mode}: {command}", marks=[pytest.mark.slow] if command in SLOW else [])
        for command in found
        if "--client 2" not in command
    ]


def errors(moments: Iterable[int]) -> Iterator[tuple[int, int]]:
    """These moments, with the error that strikes then: each in turn."""
    return zip(moments, itertools.cycle(MENDS), strict=False)


def moments(log: Sequence[tuple[Kind, str]], kind: Kind) -> list[int]:
    """Which of this kind to let fail: each; of several one after the other in the same place, the last."""
    runs = [len(list(run)) for _, run in itertools.groupby(place for what, place in log if what == kind)]
    return list(itertools.accumulate(runs))


class History:
    """A world of folders, a workspace with its secrets and bundles beside it, before and after each of its commands."""

    def __init__(self, folder: Path, base_models: Path, mode: str) -> None:
        self._folder, self._mode, self.commands = folder, mode, COMMANDS[mode]
        now = folder / "now"
        now.mkdir(parents=True)
        _begin(now, base_models, mode)
        for number, command in enumerate(self.commands):
            shutil.copytree(now, folder / str(number), symlinks=True)
            assert self.give(_bare, now, command).code == self.expected(command)
        shutil.copytree(now, folder / str(len(self.commands)), symlinks=True)

    def give(self, call: Call, world: Path, command: str) -> Outcome:
        """A command in a world. @ is the roster's fingerprint, ../ the world."""
        words = command.partition("  #")[0].split()
        if "@" in words:
            content = (world / "study/exchange/federation.json").read_bytes()
            words[words.index("@")] = roster.fingerprint(content)
        return call(*(word.replace("../", f"{world}/") for word in words), "-w", world / "study")

    def expected(self, command: str) -> int:
        """The exit code of a command to which nothing befalls: what closes a secure round then waits for reveals."""
        return 3 if self._mode == "secure" and command == CLOSES else 0

    def world(self, number: int, place: Path) -> Path:
        """A copy of the world before the command of this number."""
        shutil.rmtree(place, ignore_errors=True)
        return shutil.copytree(self._folder / str(number), place, symlinks=True)

    def ready(self, command: str, place: Path) -> dict[str, str]:
        """Make a copy of the world before a command. Returns its digests."""
        world = self.world(self.commands.index(command), place)
        if command.startswith("unpack"):  # other bytes are in the place of what the bundle holds
            (world / "study/exchange/round-0001/client-3/adapter_config.json").write_bytes(b"{}")
        return digests(world)


def _begin(world: Path, base_models: Path, mode: str) -> None:
    """A world in which nothing has been done; every training takes one step."""
    study = make_workspace(world / "study", base_models)
    text = (study / "fedcollm.toml").read_text().replace("steps = 6", "steps = 1").replace("steps = 5", "steps = 1")
    if mode == "plain":
        shutil.rmtree(study / "private")
        write_rows(study / "all.jsonl", rows(48))
        more = '[data]\nfiles = ["all.jsonl"]\nheld_out_share = 0.2'
    else:
        text, more = text.replace("rounds = 2", 'rounds = 2\nmethod = "fedavg"'), '[aggregation]\nmode = "secure"'
    (study / "fedcollm.toml").write_text(text.replace("[evaluation]", f"{more}\n\n[evaluation]"))
    (study / "machine.toml").write_text('secrets = "../secrets"\n')


def _bare(*words: object) -> Outcome:
    """The command line, outside any test."""
    return Outcome(give(*words), "", "")


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> dict[str, History]:
    """Both worlds, made once."""
    return {mode: History(tmp_path_factory.mktemp(mode), base_models, mode) for mode in COMMANDS}


def digests(world: Path) -> dict[str, str]:
    """Every published file of a world, its secrets and its bundles; no private logs, which hold times."""
    found = {f"study/{name}": digest for name, digest in published(world / "study").items()}
    for path in [*world.glob("*.fedcollm"), *(world / "secrets").rglob("*")]:
        if path.is_file():
            found[str(path.relative_to(world))] = sha256(path.read_bytes()).hexdigest()
    return {name: digest for name, digest in found.items() if "round-0001/" not in name or not name.endswith(".jsonl")}


def check_vaults(world: Path) -> None:
    """What is published of a secure round is what the vaults know; what is there is whole."""
    workspace = Workspace(world / "study")
    for folder in workspace.exchange.glob("round-*/*"):
        read_artefact(folder)
    for k in CLIENTS:
        vault = Vault.find(workspace, f"client-{k}")
        kept = (vault.kept("round-0001") if vault else None) or {}
        if (place := workspace.client_update(1, k)).exists():
            masking = read_artefact(place).manifest.masking
            assert masking is not None
            assert masking.y_sha256 == kept["y_sha256"]
        if (place := workspace.reveal(1, k)).exists():
            revealed = read_artefact(place)
            assert revealed.manifest.parents == {"close": kept["close_sha256"]}
            assert revealed.contents["reveal.bin"].hex() == kept["reveal"]
        if vault and (public := vault.kept("public")) and workspace.public_keys(k).exists():
            assert json.loads(workspace.public_keys(k).read_bytes()) == public
            assert roster_files.read_keys(workspace.public_keys(k))[0].prekeys[0] == vault.prekeys(1)[0]


def check_openings(world: Path) -> None:
    """The server remembers the broadcasts that are there."""
    workspace = Workspace(world / "study")
    vault = Vault.find(workspace, "server")
    for folder in workspace.exchange.glob("round-*/broadcast"):
        theta = read_artefact(folder)
        kept = (vault.kept(folder.parent.name) if vault else None) or {}
        assert (theta.sha256, theta.manifest.attempt) == (kept["broadcast_sha256"], kept["attempt"])


@pytest.mark.parametrize(("mode", "command"), [*chosen("plain"), *chosen("secure")])
def test_a_disk_that_fails_at_any_moment_leaves_all_whole_and_the_same_command_mends_it(
    mode: str,
    command: str,
    histories: dict[str, History],
    tmp_path: Path,
    fedcollm: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history, place = histories[mode], tmp_path / "world"
    number = history.commands.index(command)
    draws = mode == "secure" and command in GOES_ON
    clean = digests(history.world(number + 1, place))
    disk = FailingDisk(place, monkeypatch)
    history.ready(command, place)
    log = disk.watch()
    assert history.give(fedcollm, place, command).code == history.expected(command)
    assert not disk.disarm()
    for kind in KINDS:
        assert moments(log, kind), f"{command} does no {kind}"
        for which, error in errors(moments(log, kind)):
            before = history.ready(command, place)
            disk.arm(kind, which, error)
            outcome = history.give(fedcollm, place, command)
            said = f"{kind} {which}: {outcome.err}"
            assert disk.disarm(), said
            assert outcome.code == 8, said
            assert f"\n  in    {place}" in outcome.err, said
            assert f"\n  mend  {MENDS[error]}" in outcome.err, said
            assert drafts(place) == [], said
            after = digests(place)
            for name in {name for name in before if "secrets" not in name} if draws else before.keys() | after.keys():
                assert after.get(name) in (before.get(name), clean.get(name)), f"{name}, {said}"
            if mode == "secure":
                check_vaults(place)
            again = history.give(fedcollm, place, command)
            assert again.code == history.expected(command), f"{said}; then {again.err}"
            if not draws:
                assert digests(place) == clean, said
                continue
            check_vaults(place)
            check_openings(place)
            for following in history.commands[number + 1 : number + GOES_ON[command]]:
                assert history.give(fedcollm, place, following).code == history.expected(following), said
            if (place / RESULT).exists():
                expected = history.world(len(history.commands), tmp_path / "end") / RESULT
                assert (place / RESULT).read_bytes() == expected.read_bytes(), said


def test_a_disk_that_fails_under_the_privacy_ledger_loses_no_line_and_nothing_is_spent_twice(
    workspace_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "[evaluation]", "[privacy]\nnoise_multiplier = 1.0\ndelta = 1e-5\n\n[evaluation]")
    workspace, disk = Workspace(workspace_folder), FailingDisk(tmp_path, monkeypatch)
    path = workspace.privacy_ledger(1)
    budget.reserve(workspace, 1, 1, 12, attempt="first", step=0)
    first = path.read_bytes()
    for kind in KINDS:
        for which, error in errors(itertools.count(1)):
            path.write_bytes(first)
            disk.arm(kind, which, error)
            said = None
            try:
                with faults.naming_storage_faults():
                    budget.reserve(workspace, 1, 2, 12, attempt="second", step=0)
            except StorageProblem as problem:
                said = Path(str(problem.where)).name, problem.mend
            if not disk.disarm():
                assert which > 1
                break
            assert said is not None
            assert said[0] == path.parent.name or said[0].startswith(f".{path.name}.{os.getpid()}-")
            assert said[1] == MENDS[error]
            assert drafts(tmp_path) == []
            assert len(ledger.charges(ledger.read_ledger(path))) in (1, 2)
            budget.reserve(workspace, 1, 2, 12, attempt="second", step=0)
            assert path.read_bytes().startswith(first)
            assert len(ledger.charges(ledger.read_ledger(path))) == 2
