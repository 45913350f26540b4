"""Parties on machines of their own that do what their README.md says, line by line, and nothing else: two rounds."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit, make_equal_workspace, make_unlike_workspace, make_workspace
from stages.parties.roster import fingerprint
from stages.progress.status import status
from stages.workspace.paths import Workspace

PARTIES = ("server", "client-1", "client-2", "client-3")


def hidden(mode: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, models: Path) -> Path:
        make_workspace(folder, models)
        edit(folder / "fedcollm.toml", "[distillation]", f'[aggregation]\nmode = "{mode}"\n\n[distillation]')
        return folder

    return make


MADE: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "plain": ("base_models", make_workspace),
    "secure": ("base_models", hidden("secure")),
    "encrypted": ("base_models", hidden("encrypted")),
    "FedMKT, own models": ("unlike_models", make_unlike_workspace),
    "FedMKT, averaged": ("unlike_models", make_equal_workspace),
}


class Post:
    """Parties that carry files to each other by pack and unpack."""

    def __init__(self, place: Path, fedcollm: Callable[..., Outcome], use: Callable[[str], None]) -> None:
        self.place, self._fedcollm, self._use = place, fedcollm, use
        self.sent: list[tuple[str, Path]] = []
        self.given: list[str] = []
        self.taken: dict[str, int] = dict.fromkeys(PARTIES, 0)

    def give(self, party: str, *words: object) -> Outcome:
        self._use(party)
        return self._fedcollm(*words, "-w", self.place / party)

    def take(self, party: str) -> bool:
        """Unpack the next file that has arrived for a client, all that have for the server; whether any has."""
        taken = False
        while self.taken[party] < len(self.sent) and not (taken and party != "server"):
            sender, path = self.sent[self.taken[party]]
            self.taken[party] += 1
            if self._is_for(party, sender, path):
                done = self.give(party, "unpack", path)
                assert done.code == 0, done.err
                taken = True
        return taken

    def _is_for(self, party: str, sender: str, path: Path) -> bool:
        if sender != "server":
            return party == "server"
        to = re.search(r"-to-([0-9])", path.name)
        return party != "server" and (to is None or party == f"client-{to[1]}")

    def do(self, party: str, line: str) -> bool:
        """What a line of a README says; whether it could be done yet."""
        words = line.partition("  #")[0].split()[1:]
        if words[0] in ("prefetch", "check-rows"):
            return self.give(party, *words).code == 0
        if words[0] == "unpack":
            return self.take(party)
        if party == "server":
            self.take(party)  # further ones, as they arrive
        if words[-1] == "FINGERPRINT":  # what another client reads out
            other = self.place / PARTIES[1 + PARTIES.index(party) % 3] / "exchange/federation.json"
            words[-1] = fingerprint(other.read_bytes()) if other.exists() else "A" * 40
        if words[0] == "pack":
            return self.pack(party, words, each="and so on for each client" in line)
        done = self.give(party, *words)
        if words[0] == "join" and "--fingerprint" not in words:
            return done.code == 2 and "the roster's fingerprint is" in done.err
        assert done.code in (0, 3, 5), done.err
        is_closed = words[0] == "aggregate" and Workspace(self.place / party).close(int(words[2])).exists()
        return done.code == 0 or (done.code == 3 and is_closed and self.is_first(words))

    def is_first(self, words: list[str]) -> bool:
        """Whether this is the first time that a line which ends with 3 is given."""
        line = " ".join(words)
        self.given.append(line)
        return self.given.count(line) == 1

    def pack(self, party: str, words: list[str], *, each: bool) -> bool:
        """Make a file, or one for each client, and mail it."""
        for to in ("1", "2", "3") if each else (words[-1] if "--to" in words else "",):
            asked = [*words[:-1], to] if to else words
            path = self.place / f"{len(self.sent)}{f'-to-{to}' if to else ''}"
            done = self.give(party, *asked, "--output", path)
            if done.code:
                return False
            self.sent.append((party, path))
        return True


def lines(page: Path) -> tuple[list[str], list[str], list[str]]:
    """Once; in round 1; and in a later round."""
    blocks = [block.splitlines() for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    once, _, first, *later = blocks
    [second] = later or [[line.replace("--round 1", "--round 2") for line in first]]
    return once, first, second


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_parties_that_do_what_their_readme_says_finish_both_rounds(
    kind: str,
    tmp_path: Path,
    fedcollm: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    fixture, make = MADE[kind]
    models = request.getfixturevalue(fixture)
    whole = make(tmp_path / "whole", models)
    post = Post(tmp_path, fedcollm, lambda party: monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / f"of {party}")))
    for party in PARTIES:
        invite, who = tmp_path / f"invite-{party}", ["--server"] if party == "server" else ["--client", party[-1]]
        packed = fedcollm("pack", "--invite", *who, "--output", invite, "-w", whole)
        assert packed.code == 0, packed.err
        made = fedcollm("init", tmp_path / party, "--invite", invite, "--fingerprint", packed.out.split()[-1])
        assert made.code == 0, made.err
        (tmp_path / party / "models").symlink_to(models)
        shutil.copytree(whole / "data", tmp_path / party / "data")
        for path in (whole / "private" / party).iterdir():
            shutil.copy(path, tmp_path / party / "private" / party)
    todo = {party: [line for block in lines(tmp_path / party / "README.md") for line in block] for party in PARTIES}
    while any(todo.values()):
        done = 0
        for party, waiting in todo.items():
            while waiting and post.do(party, waiting[0]):
                done += 1
                del waiting[0]
        assert done, {party: waiting[:1] for party, waiting in todo.items()}
    last = status(Workspace(tmp_path / "server"), party="server")
    assert [step.name for step in last.rounds[1].steps if step.party == "server" and step.condition != "done"] == []
