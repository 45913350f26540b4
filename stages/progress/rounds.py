"""How far a workspace is: each folder of each round, in the order of Algorithm 1, and the command that makes it.

Reads manifests and file sizes, or every byte. Loads no model and writes nothing.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from stages.artefacts.lineage import lies_at, place_of
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import check_names, read_manifest
from stages.artefacts.receiving import read_sound
from stages.files import reading
from stages.parties.names import SERVER, client
from stages.parties.party import Onlooker
from stages.progress.staleness import PREPARE, are_rows_stale, dealt
from stages.progress.steps import Round, Step
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT, SIGNATURE
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES


class Reader:
    """Walks the rounds in order, remembering the digests of what it has seen to find what is stale."""

    def __init__(self, workspace: Workspace, verify: bool) -> None:
        self._workspace = workspace
        self._verify = verify
        self._onlooker = Onlooker(workspace)
        self._federation = workspace.agreement.federation
        # Where nothing is averaged there is no server: whoever has the clients' data makes their first adapter too.
        self._is_server = workspace.auxiliary_data.exists() or not self._federation.averages
        path = workspace.federation
        self._roster = reading.sha256(reading.read_json(path)[1]) if path.exists() else None
        self._dealt = dealt(workspace)
        self.are_rows_stale = are_rows_stale(workspace, self._dealt)
        self.other_agreements: Counter[str] = Counter()
        """Digests of agreements that are not the one here: how many folders were made under each."""
        self._before: dict[str, Step] = {}
        self._manifests: dict[Path, tuple[Manifest, str]] = {}

    def round(self, number: int) -> Round:
        """Its steps, as far as the method goes."""
        if not self._federation.averages:
            return self._alone(number)
        broadcast = self._broadcast(number)
        clients = {k: self._client(number, k, broadcast) for k in self._taking_part(number)}
        is_secure = self._workspace.agreement.aggregation.is_secure
        unmasking = self._unmasking(number, broadcast, list(clients)) if is_secure else []
        aggregate, late = self._aggregate(number, broadcast, clients)
        server = [aggregate, *(self._co_distill(number, aggregate) if self._federation.distils else [])]
        self._before = {step.name: step for step in server}
        made_of = self._parents(self._workspace.aggregate(number))
        between = self._counted([*clients.values(), *unmasking], aggregate, made_of)
        return Round(number, [broadcast, *between, *server], late)

    def _taking_part(self, number: int) -> Sequence[int]:
        """The clients that the round is opened for: in plain mode all."""
        try:
            opening = self._manifest(self._workspace.broadcast(number))[0].opening
        except (NotReady, Damaged):
            opening = None
        return opening.clients if opening else self._workspace.clients

    def _unmasking(self, number: int, broadcast: Step, clients: list[int]) -> list[Step]:
        """Secure mode: the server closes the round, then each client whose update is in the sum reveals."""
        place, parents = self._workspace.close(number), {"broadcast": broadcast.sha256}
        close = self._step(place, "close", Command("aggregate", round=number), parents, self._is_server, replaces=False)
        if close.condition == "done":
            survivors = self._manifest(place)[0].closing or {}
            clients = [k for k in clients if client(k) in survivors]
        reveals = [
            self._step(
                self._workspace.reveal(number, k),
                f"reveal-{k}",
                Command("reveal", client=k, round=number),
                {"close": close.sha256},
                self._workspace.client_data(k).exists(),
                replaces=False,
                party=client(k),
            )
            for k in clients
        ]
        return [close, *reveals]

    def _alone(self, number: int) -> Round:
        """A round without the server: each client goes on with its own adapter, at first with the one broadcast."""
        first = [self._broadcast(number)] if number == 1 else []
        steps = {
            f"client-{k}": self._client(number, k, first[0] if first else self._before[f"client-{k}"])
            for k in self._workspace.clients
        }
        self._before = steps
        return Round(number, [*first, *steps.values()])

    def _broadcast(self, number: int) -> Step:
        source = self._workspace.round_result(number).name
        parents = {source: self._before[source].sha256} if number > 1 else {}
        place, command = self._workspace.broadcast(number), Command("broadcast", round=number)
        return self._step(place, "broadcast", command, parents, self._is_server)

    def _client(self, number: int, number_of_client: int, start: Step) -> Step:
        place, party = self._workspace.client_update(number, number_of_client), client(number_of_client)
        command = Command("client-train", client=number_of_client, round=number)
        here = self._workspace.client_data(number_of_client).exists()
        has_attempts = start.sha256 and start.name == "broadcast"
        if has_attempts and self._attempt(place) < self._attempt(self._workspace.broadcast(number)):
            return Step(party, "missing", "is of an earlier attempt at the round", command, here, party=party)
        step = self._step(place, party, command, {start.name: start.sha256}, here, party=party)
        log = self._workspace.log("client-train", number, number_of_client)
        return self._of_rows(step, self._workspace.client_data(number_of_client), log)

    def _of_rows(self, step: Step, data: Path, log: Path) -> Step:
        """A finished step of training; stale if, in a simulation, `prepare` has dealt other rows since, or would."""
        share = self._dealt.get("parties", {}).get(step.party) if self._dealt else None
        is_dealt = share and share.get("sha256")
        if step.condition != "done" or not is_dealt:
            return step
        if self.are_rows_stale:
            reason, command = "trained on rows that prepare made before its tasks or files were edited", PREPARE
        else:
            named = reading.logged_inputs(log).get("data")
            if named in (None, is_dealt) or not data.exists() or named == reading.sha256(reading.read_own(data)):
                return step
            reason, command = (
                f"trained on other rows than {self._workspace.shown(data)} has now",
                step.command.also(overwrite=True),
            )
        return replace(step, condition="stale", reason=reason, command=command, changed=("rows",))

    def _aggregate(self, number: int, broadcast: Step, clients: dict[int, Step]) -> tuple[Step, list[int]]:
        """The average, and the clients whose updates came too late for it."""
        workspace = self._workspace
        given = {"broadcast": broadcast.sha256} | {step.name: step.sha256 for step in clients.values() if step.sha256}
        if workspace.close(number).exists():
            given["close"] = self._digest(workspace.close(number))
        made_of = self._parents(workspace.aggregate(number))
        late = [k for k, step in clients.items() if step.sha256 and made_of and step.name not in made_of]
        command = Command("aggregate", round=number)
        parents = {party: given.get(party, "") for party in made_of}
        return self._step(workspace.aggregate(number), "aggregate", command, parents, self._is_server), late

    def _co_distill(self, number: int, aggregate: Step) -> list[Step]:
        workspace, command = self._workspace, Command("co-distill", round=number)
        starts = {"slm": {"aggregate": aggregate.sha256}, "llm": {}}
        starts["llm"] |= {"llm": self._before["llm"].sha256} if number > 1 else {}
        before = starts["slm"] | starts["llm"]
        captured = self._captured(number, starts)
        train = {role: command.also(phase="train", model=role) if captured else command for role in ROLES}
        taught = {role: {one.name: one.sha256 for one in captured if one.name != f"captured-{role}"} for role in ROLES}
        llm = self._step(workspace.llm(number), "llm", train["llm"], before | taught["llm"], self._is_server)
        parents = before | taught["slm"] | {"llm-after": llm.sha256}
        slm = self._step(workspace.slm(number), "slm", train["slm"], parents, self._is_server)
        data, log = workspace.auxiliary_data, workspace.log("co-distill", number)
        llm, slm = (self._of_rows(step, data, log) for step in (llm, slm))
        if slm.condition == llm.condition == "done":  # what is not there any more is not needed any more
            captured = [one for one in captured if one.condition != "missing"]
        return [*captured, llm, slm]

    def _captured(self, number: int, starts: dict[str, dict[str, str]]) -> list[Step]:
        """The captures of co-distill in two phases; none where nothing says that it is done so."""
        places = {role: self._workspace.captured(number, role) for role in ROLES}
        slm = self._workspace.slm(number)
        in_one_phase = os.path.lexists(slm) and not any(name.startswith("captured-") for name in self._parents(slm))
        if in_one_phase or not any(os.path.lexists(place) for place in places.values()):
            return []
        command = Command("co-distill", round=number, phase="capture")
        return [
            self._step(place, f"captured-{role}", command.also(model=role), starts[role], self._is_server)
            for role, place in places.items()
        ]

    def _counted(self, steps: list[Step], aggregate: Step, made_of: Collection[str]) -> Iterator[Step]:
        """What clients send, and the close; what is absent from a finished aggregate is not waited for any more."""
        for step in steps:
            is_part = bool(step.reason) and step.name in made_of
            if step.condition != "missing" or aggregate.condition != "done" or is_part:
                yield step

    def _parents(self, folder: Path) -> dict[str, str]:
        try:
            return self._manifest(folder)[0].parents
        except (NotReady, Damaged):
            return {}

    def _manifest(self, folder: Path) -> tuple[Manifest, str]:
        """As read_manifest, once for each folder: one broadcast is asked for by every client's step."""
        if folder not in self._manifests:
            self._manifests[folder] = read_manifest(folder)
        return self._manifests[folder]

    def _attempt(self, folder: Path) -> float:
        """Which attempt at its round a folder is of; where that cannot be read, none that is too early."""
        try:
            return self._manifest(folder)[0].attempt
        except (NotReady, Damaged):
            return math.inf

    def _digest(self, folder: Path) -> str:
        try:
            return self._manifest(folder)[1]
        except (NotReady, Damaged):
            return ""

    def _step(
        self,
        folder: Path,
        name: str,
        command: Command,
        parents: dict[str, str],
        here: bool,
        *,
        replaces: bool = True,
        party: str = SERVER,
    ) -> Step:
        """What is there. Parents that this machine does not have are not compared.

        replaces: whether the command needs --overwrite where something is there already.
        """
        if not os.path.lexists(folder):
            return Step(name, "missing", "", command, here, party=party)
        again = command.also(overwrite=replaces)
        try:
            manifest, digest = self._read(folder)
        except (Damaged, NotReady, Refused) as problem:
            if isinstance(problem, NotReady) and not here:  # on its way; nothing is on its way to who made it
                return Step(name, "missing", problem.message, command, here, party=party)
            return Step(name, "damaged", problem.message, again, here, party=party)
        claims = place_of(manifest, self._workspace)
        place = lies_at(folder, claims)
        if claims != place:
            return Step(name, "damaged", f"is {claims}, here it should be {place}", again, here, digest, party)
        changed = [key for key, digest in parents.items() if digest and manifest.parents.get(key) != digest]
        if manifest.agreement_sha256 != self._workspace.agreement_sha256:
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
        manifest, digest = self._manifest(folder)
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
