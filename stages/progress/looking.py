"""Looking at one folder of a round: whether it is there, whole, at its place, and made from what lies here now."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from stages.artefacts.lineage import lies_at, place_of
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Manifests, check_names
from stages.artefacts.receiving import read_sound
from stages.files import reading
from stages.parties.names import SERVER, client
from stages.parties.party import Onlooker
from stages.progress.staleness import PREPARE, dealt, edited_since_dealt
from stages.progress.steps import Step
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT, SIGNATURE
from stages.workspace.paths import Workspace


class Looker:
    """Looks at folders of one workspace, and remembers their manifests. verify: at every byte."""

    def __init__(self, workspace: Workspace, verify: bool, manifests: Manifests | None = None) -> None:
        self.workspace = workspace
        self._verify = verify
        self._onlooker = Onlooker(workspace)
        path = workspace.federation
        self._roster = reading.sha256(reading.read_json(path)[1]) if path.exists() else None
        self._dealt = dealt(workspace)
        self.edited_since_dealt = edited_since_dealt(workspace, self._dealt)
        self.other_agreements: Counter[str] = Counter()
        """Digests of agreements that are not the one here: how many folders were made under each."""
        self._manifests = manifests or Manifests()

    def of_rows(self, step: Step, data: Path, log: Path, *, dealt_to: str = "", verb: str = "trained on") -> Step:
        """A finished step; stale if, in a simulation, `prepare` has dealt other rows since, or would.

        dealt_to: whose rows they are, by default those of the step's party. verb: what the step did with them.
        """
        share = self._dealt.get("parties", {}).get(dealt_to or step.party) if self._dealt else None
        is_dealt = share and share.get("sha256")
        if step.condition != "done" or not is_dealt:
            return step
        if self.edited_since_dealt:
            reason, command = f"{verb} rows that prepare made before {self.edited_since_dealt}", PREPARE
        else:
            named = reading.logged_inputs(log).get("data")
            if named in (None, is_dealt) or not data.exists() or named == reading.sha256(reading.read_own(data)):
                return step
            reason = f"{verb} other rows than {self.workspace.shown(data)} has now"
            command = step.command.also(overwrite=True)
        return replace(step, condition="stale", reason=reason, command=command, changed=("rows",))

    def client_train(self, place: Path, name: str, round: int, number: int, parents: dict[str, str]) -> Step:
        """A client's training in a round, from the adapter that parents names: theta^t, or its own."""
        workspace, party = self.workspace, client(number)
        command, here = Command("client-train", client=number, round=round), workspace.client_data(number).exists()
        step = self.step(place, name, command, parents, here, party=party, attempt_at=round)
        return self.of_rows(step, workspace.client_data(number), workspace.log("client-train", round, number))

    def parents(self, folder: Path) -> dict[str, str]:
        """What a folder says that it was made from; nothing where that cannot be read."""
        try:
            return self.manifest(folder)[0].parents
        except (NotReady, Damaged):
            return {}

    def manifest(self, folder: Path) -> tuple[Manifest, str]:
        """As read_manifest, once for each folder: one broadcast is asked for by every client's step."""
        return self._manifests.of(folder)

    def attempt(self, folder: Path) -> float:
        """Which attempt at its round a folder is of; where that cannot be read, none that is too early."""
        try:
            return self.manifest(folder)[0].attempt
        except (NotReady, Damaged):
            return math.inf

    def digest(self, folder: Path) -> str:
        """The digest of a folder's manifest; empty where it cannot be read."""
        try:
            return self.manifest(folder)[1]
        except (NotReady, Damaged):
            return ""

    def step(
        self,
        folder: Path,
        name: str,
        command: Command,
        parents: dict[str, str],
        here: bool,
        *,
        replaces: bool = True,
        party: str = SERVER,
        attempt_at: int | None = None,
    ) -> Step:
        """What is there. Parents that this machine does not have are not compared.

        replaces: whether the command needs --overwrite where something is there already. attempt_at: a round; what was
        made for an earlier attempt at it counts no more.
        """
        if not os.path.lexists(folder):
            return Step(name, "missing", "", command, here, party=party)
        begun_by = self.workspace.broadcast(attempt_at) if attempt_at and parents.get("broadcast") else None
        if begun_by and self.attempt(folder) < self.attempt(begun_by):
            return Step(name, "missing", "is of an earlier attempt at the round", command, here, party=party)
        again = command.also(overwrite=replaces)
        try:
            manifest, digest = self._read(folder)
        except (Damaged, NotReady, Refused) as problem:
            if isinstance(problem, NotReady) and not here:  # on its way; nothing is on its way to who made it
                return Step(name, "missing", problem.message, command, here, party=party)
            return Step(name, "damaged", problem.message, again, here, party=party)
        claims = place_of(manifest, self.workspace)
        place = lies_at(folder, claims)
        if claims != place:
            return Step(name, "damaged", f"is {claims}, here it should be {place}", again, here, digest, party)
        changed = [key for key, digest in parents.items() if digest and manifest.parents.get(key) != digest]
        if manifest.agreement_sha256 != self.workspace.agreed_in(manifest.round):
            changed.append(AGREEMENT)
            self.other_agreements[manifest.agreement_sha256] += 1
        if self._roster and manifest.federation_sha256 != self._roster:
            changed.append("roster")
        if changed:
            return Step(
                name, "stale", f"made from another {', '.join(changed)}", again, here, digest, party, tuple(changed)
            )
        return Step(name, "done", "", command, here, digest, party)

    def _read(self, folder: Path) -> tuple[Manifest, str]:
        manifest, digest = self.manifest(folder)
        # Of a close each client has its own inbox.
        wanted = [name for name in manifest.files if manifest.stage != "close" or (folder / name).exists()]
        if self._verify and manifest.federation_sha256 == self._roster:  # what is of another is stale anyway
            read_sound(folder, by=self._onlooker, only=wanted)
        check_names(folder, manifest, wanted)
        for name in wanted:
            entry, found = manifest.files[name], (folder / name).lstat().st_size
            if found < entry.size_bytes:
                message = f"{name} has {found} bytes of {entry.size_bytes}: still arriving, or cut short"
                raise NotReady(message, where=folder / name)
            if found > entry.size_bytes:
                raise Damaged(f"{name} has {found} bytes, its manifest says {entry.size_bytes}", where=folder / name)
        if manifest.federation_sha256 and not os.path.lexists(folder / SIGNATURE):
            raise NotReady(f"{SIGNATURE} is missing", where=folder)
        return manifest, digest
