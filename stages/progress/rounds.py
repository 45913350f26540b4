"""How far a workspace is: each folder of each round, in the order of Algorithm 1, and the command that makes it.

Reads manifests and file sizes, or every byte. Loads no model and writes nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence, Set

from stages.artefacts.reading import Manifests
from stages.parties.names import client, number_of
from stages.progress.in_public import InPublic
from stages.progress.looking import Looker
from stages.progress.steps import Round, Step
from stages.runtime.errors import Damaged, NotReady
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES


class Reader:
    """Walks the rounds in order, remembering the digests of what it has seen to find what is stale."""

    def __init__(self, workspace: Workspace, verify: bool, manifests: Manifests | None = None) -> None:
        self._workspace = workspace
        self._look = Looker(workspace, verify, manifests)
        self._federation, self._averages = workspace.agreement.federation, workspace.agreement.averages
        # Where there is no server, whoever has the clients' data makes their first adapter too.
        has_server = self._averages or self._federation.server_tells
        self._is_server = workspace.auxiliary_data.exists() or not has_server
        self._before: dict[str, Step] = {}
        self._in_public = InPublic(self._look, self._is_server)

    @property
    def edited_since_dealt(self) -> str:
        """What was edited since `prepare` dealt the rows, in words."""
        return self._look.edited_since_dealt

    @property
    def other_agreements(self) -> Counter[str]:
        """Digests of agreements that are not the one here: how many folders were made under each."""
        return self._look.other_agreements

    def round(self, number: int) -> Round:
        """Its steps, as far as the method goes."""
        if self._federation.learns_in_public:
            return self._learned_in_public(number)
        if not self._averages:
            return self._alone(number)
        broadcast = self._broadcast(number)
        clients = {k: self._client(number, k, broadcast) for k in self._taking_part(number)}
        is_hidden = self._workspace.agreement.aggregation.is_hidden
        revealing = self._revealing(number, broadcast, list(clients)) if is_hidden else []
        aggregate, late = self._aggregate(number, broadcast, clients)
        server = [aggregate, *(self._co_distill(number, aggregate) if self._federation.distils else [])]
        self._before = {step.name: step for step in server}
        made_of = self._look.parents(self._workspace.aggregate(number))
        between = self._counted([*clients.values(), *revealing], aggregate, made_of.keys())
        return Round(number, [broadcast, *between, *server], late)

    def _taking_part(self, number: int) -> Sequence[int]:
        """The clients that the round is opened for: in plain mode all."""
        try:
            opening = self._look.manifest(self._workspace.broadcast(number))[0].opening
        except (NotReady, Damaged):
            opening = None
        return opening.clients if opening else self._workspace.clients

    def _revealing(self, number: int, broadcast: Step, clients: list[int]) -> list[Step]:
        """The server closes the round, then each client whose update is in the sum reveals, or the one with the key."""
        place, parents = self._workspace.close(number), {"broadcast": broadcast.sha256}
        close = self._look.step(
            place, "close", Command("aggregate", round=number), parents, self._is_server, replaces=False
        )
        if close.condition == "done":
            survivors = self._look.manifest(place)[0].closing or {}
            clients = [k for k in clients if client(k) in survivors]
        if holder := self._workspace.agreement.aggregation.key_holder:
            clients = [holder]
        reveals = [
            self._look.step(
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

    def _learned_in_public(self, number: int) -> Round:
        """A round of FedMKT; where clients' adapters are averaged after it, the average too."""
        first = [self._broadcast(number)] if self._workspace.agreement.broadcasts(number) else []
        found = self._in_public.round(number, first)
        if not self._averages:
            return found
        adapters = {number_of(step.party): step for step in found.steps if step.name.startswith("slm-")}
        aggregate, late = self._aggregate(number, first[0], adapters)
        self._before = {"aggregate": aggregate}
        return Round(number, [*found.steps, aggregate], late, found.unheard)

    def _alone(self, number: int) -> Round:
        """A round without the server: each client goes on with its own adapter, at first with the one broadcast."""
        first = [self._broadcast(number)] if self._workspace.agreement.broadcasts(number) else []
        steps = {
            f"client-{k}": self._client(number, k, first[0] if first else self._before.get(f"client-{k}"))
            for k in self._workspace.clients
        }
        self._before = steps
        return Round(number, [*first, *steps.values()])

    def _broadcast(self, number: int) -> Step:
        source = self._workspace.round_result(number).name
        parents = {source: self._before[source].sha256} if number > 1 else {}
        place, command = self._workspace.broadcast(number), Command("broadcast", round=number)
        return self._look.step(place, "broadcast", command, parents, self._is_server)

    def _client(self, number: int, k: int, start: Step | None) -> Step:
        parents = {start.name: start.sha256} if start else {}
        return self._look.client_train(self._workspace.client_update(number, k), client(k), number, k, parents)

    def _aggregate(self, number: int, broadcast: Step, clients: dict[int, Step]) -> tuple[Step, list[int]]:
        """The average, and the clients whose updates came too late for it."""
        workspace = self._workspace
        sent = {workspace.client_update(number, k).name: step for k, step in clients.items()}
        given = {"broadcast": broadcast.sha256} | {name: step.sha256 for name, step in sent.items() if step.sha256}
        if number > 1 and "aggregate" in self._before:
            given["aggregate"] = self._before["aggregate"].sha256
        if workspace.close(number).exists():
            given["close"] = self._look.digest(workspace.close(number))
        made_of = self._look.parents(workspace.aggregate(number))
        late = [number_of(one.party) for name, one in sent.items() if one.sha256 and made_of and name not in made_of]
        command = Command("aggregate", round=number)
        parents = {party: given.get(party, "") for party in made_of}
        return self._look.step(workspace.aggregate(number), "aggregate", command, parents, self._is_server), late

    def _co_distill(self, number: int, aggregate: Step) -> list[Step]:
        workspace, command = self._workspace, Command("co-distill", round=number)
        starts = {"slm": {"aggregate": aggregate.sha256}, "llm": {}}
        starts["llm"] |= {"llm": self._before["llm"].sha256} if number > 1 else {}
        before = starts["slm"] | starts["llm"]
        captured = self._captured(number, starts)
        train = {role: command.also(phase="train", model=role) if captured else command for role in ROLES}
        taught = {role: {one.name: one.sha256 for one in captured if one.name != f"captured-{role}"} for role in ROLES}
        llm = self._look.step(workspace.llm(number), "llm", train["llm"], before | taught["llm"], self._is_server)
        parents = before | taught["slm"] | {"llm-after": llm.sha256}
        slm = self._look.step(workspace.slm(number), "slm", train["slm"], parents, self._is_server)
        data, log = workspace.auxiliary_data, workspace.log("co-distill", number)
        llm, slm = (self._look.of_rows(step, data, log) for step in (llm, slm))
        if slm.condition == llm.condition == "done":  # what is not there any more is not needed any more
            captured = [one for one in captured if one.condition != "missing"]
        return [*captured, llm, slm]

    def _captured(self, number: int, starts: dict[str, dict[str, str]]) -> list[Step]:
        """The captures of co-distill in two phases; none where nothing says that it is done so."""
        places = {role: self._workspace.captured(number, role) for role in ROLES}
        slm = self._workspace.slm(number)
        in_one_phase = os.path.lexists(slm) and not any(
            name.startswith("captured-") for name in self._look.parents(slm)
        )
        if in_one_phase or not any(os.path.lexists(place) for place in places.values()):
            return []
        command = Command("co-distill", round=number, phase="capture")
        return [
            self._look.step(place, f"captured-{role}", command.also(model=role), starts[role], self._is_server)
            for role, place in places.items()
        ]

    def _counted(self, steps: list[Step], aggregate: Step, made_of: Set[str]) -> Iterator[Step]:
        """What clients send, and the close; what is absent from a finished aggregate is not waited for any more.

        Nor is anything of a round that was given up.
        """
        gave_up = not made_of - {"broadcast", "aggregate"}
        for step in steps:
            is_part = bool(step.reason) and step.name in made_of
            is_waited_for = is_part or step.condition not in ("missing", *(["stale"] if gave_up else []))
            if is_waited_for or aggregate.condition != "done":
                yield step
