"""A workspace: its settings, and what the agreement says of rounds, steps and clients."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from stages.files import reading
from stages.runtime.errors import Damaged, NotReady, UsageProblem
from stages.workspace.agreement import Agreement
from stages.workspace.commands import Command
from stages.workspace.knowledge_layout import KnowledgeLayout
from stages.workspace.machine import Machine
from stages.workspace.names import AGREEMENT, EVALUATION, MACHINE
from stages.workspace.rows_and_scores import Evaluation
from stages.workspace.settings import Dtype, Positive, Settings, parse

LARGEST_TOML_BYTES = 1 << 20
LONGEST_NAME = 120
"""Characters of a folder's name before it is cut."""

RoundStep = Literal["broadcast", "aggregate", "co-distill", "share-knowledge", "client-distill"]
"""The steps of a round that not every method takes."""


class Flags(Settings):
    """What a command's own flags change of the settings; workspaces that are derived have the same.

    device, dtype: of machine.toml. tasks, limit: what is scored in the place of what the settings say, and how many
    questions of each.
    """

    device: str | None = None
    dtype: Dtype | None = None
    tasks: tuple[str, ...] = ()
    limit: Positive | None = None

    @property
    def asked(self) -> dict[str, str | int]:
        """The options of a command that has the same tasks and limit."""
        given = {"tasks": ",".join(self.tasks), "limit": self.limit}
        return {key: value for key, value in given.items() if value}


@dataclass(frozen=True)
class Workspace(KnowledgeLayout):
    """One party's copy of a federation's folder."""

    root: Path
    flags: Flags = field(default=Flags())
    client: int | None = None
    """Whose model [slm] is, where clients have models of their own: see of_client."""
    as_agreed: str = ""
    """The digest of an earlier agreement that holds here, of which a copy was kept: see before_fork."""

    @staticmethod
    def find(start: Path, flags: Flags | None = None) -> Workspace:
        """The workspace that start lies in, found upwards like git's. Raises UsageProblem if there is none."""
        start = start.absolute()
        if not start.exists():
            raise UsageProblem("there is no such folder", where=start, mend="name the workspace with --workspace")
        for folder in (start, *start.parents):
            if (folder / AGREEMENT).is_file():
                return Workspace(folder, flags or Flags())
        mend = f"make one with `{Command('init', 'study')}`, or name one with --workspace"
        raise UsageProblem(f"no workspace here: no {AGREEMENT} in this folder or above it", where=start, mend=mend)

    # --- settings

    @functools.cached_property
    def agreement_bytes(self) -> bytes:
        """fedcollm.toml, byte for byte; or the copy of an earlier one. Raises Damaged for another than that."""
        path = self.agreed(self.as_agreed) if self.as_agreed else self.root / AGREEMENT
        content = reading.read(path, limit_bytes=LARGEST_TOML_BYTES)
        if self.as_agreed and reading.sha256(content) != self.as_agreed:
            raise Damaged("is not the agreement that its name says", where=path, mend="copy it from the study again")
        return content

    @functools.cached_property
    def agreement(self) -> Agreement:
        """What all parties agreed on; of a client's workspace, as that one reads it."""
        return self.agreement_of_all if self.client is None else self.agreement_of_all.of_client(self.client)

    @functools.cached_property
    def agreement_of_all(self) -> Agreement:
        """What all parties agreed on, whoever reads it here."""
        return parse(Agreement, self.agreement_bytes, self.root / AGREEMENT)

    def of_client(self, client: int) -> Workspace:
        """The workspace as a client sees it: the SLM is the one that it tunes. Its own, where all have one."""
        return self if str(client) not in self.agreement.clients else replace(self, client=client)

    @property
    def own_model(self) -> int | None:
        """Whose own model [slm] is here; None where it is the one of all."""
        if self.client is None or (own := self.agreement.clients.get(str(self.client))) is None:
            return None
        return self.client if own.slm else None

    @functools.cached_property
    def agreement_sha256(self) -> str:
        """The digest that every manifest carries: that of fedcollm.toml as it lies there."""
        return reading.sha256(self.agreement_bytes)

    def asking(self, tasks: Sequence[str], limit: int | None) -> Workspace:
        """The workspace in which these tasks are scored, so many questions of each, apart from the settings' own."""
        return replace(self, flags=self.flags.model_copy(update={"tasks": tuple(tasks), "limit": limit}))

    @functools.cached_property
    def evaluation(self) -> Evaluation:
        """What is scored: what the command's flags say, with the other settings of evaluation as they are."""
        if not self.flags.tasks:
            return self._settings_of_evaluation
        return self._settings_of_evaluation.model_copy(
            update={"tasks": list(self.flags.tasks), "limit": self.flags.limit}
        )

    @property
    def scores(self) -> Path:
        """Where lm-eval's scores are; of tasks that a command names, apart, by tasks and limit."""
        if not self.flags.tasks:
            return super().scores
        words = [*self.flags.tasks, *([f"limit-{self.flags.limit}"] if self.flags.limit else [])]
        name, plain = "+".join(words), re.sub(r"[^A-Za-z0-9._+-]+|^[.]+", "-", "+".join(words))[:LONGEST_NAME]
        return self.task_results / (plain if plain == name else f"{plain}-{reading.sha256(name.encode())[:8]}")

    @property
    def limited_by(self) -> str:
        """What says how many questions of a task are scored."""
        return "--limit" if self.flags.tasks else "evaluation.limit"

    @functools.cached_property
    def _settings_of_evaluation(self) -> Evaluation:
        """evaluation.toml, which nobody need agree on, or else the agreement's [evaluation]."""
        path = self.home / EVALUATION
        if not path.exists():
            return self.agreement.evaluation
        explained = f"{AGREEMENT}, under [evaluation], a line that is left out here,"
        return parse(Evaluation, reading.read_own(path), path, explained=explained)

    @property
    def scored_tasks(self) -> list[str]:
        """The tasks whose questions are scored; without any, those that rows are dealt from."""
        return self.evaluation.tasks or self.agreement.data.tasks

    def agreed_in(self, round: int | None) -> str:
        """The digest that what was made in a round carries: up to a fork, that of the study it was forked from."""
        fork = self.agreement_of_all.federation.fork
        return fork.agreement_sha256 if fork.agreement_sha256 and fork.has(round) else self.agreement_sha256

    @property
    def before_fork(self) -> Workspace | None:
        """The workspace as it was up to the round that it was forked at; None where it was not."""
        sha256 = self.agreement_of_all.federation.fork.agreement_sha256
        return replace(self, as_agreed=sha256) if sha256 else None

    def of_round(self, round: int) -> Workspace:
        """The workspace as a step of a round is taken in it: up to a fork under the agreement of then."""
        fork = self.agreement_of_all.federation.fork
        return (self.before_fork if fork.has(round) else None) or self

    @functools.cached_property
    def machine(self) -> Machine:
        """Settings of this machine, with the command's flags over them."""
        path = self.root / MACHINE
        content = reading.read_own(path) if path.exists() else b""
        machine = parse(Machine, content, path)
        changed = self.flags.model_dump(include={"device", "dtype"}, exclude_none=True)
        try:
            return Machine.model_validate(machine.model_dump() | changed)
        except ValidationError as error:
            mend = "give --device auto, cpu, cuda, cuda:1 (the GPU's number) or mps"
            raise UsageProblem(f"{self.flags.device!r} is not the name of a device", mend=mend) from error

    @functools.cached_property
    def home(self) -> Path:
        """Where relative paths of the settings, and tasks/, start: here, or where this one was derived from."""
        return Path(os.path.normpath(self.root / self.machine.home)) if self.machine.home else self.root

    @property
    def clients(self) -> range:
        """All clients of the federation, counted from 1 as in the paper."""
        return range(1, self.agreement.federation.clients + 1)

    def check_round(self, round: int) -> int:
        """The round, or UsageProblem if the agreement has none of that number."""
        if not 1 <= round <= self.agreement.federation.rounds:
            message = f"there is no round {round}: the agreement has rounds 1 to {self.agreement.federation.rounds}"
            mend = "give one of those, or agree on more federation.rounds"
            raise UsageProblem(message, where=self.root / AGREEMENT, mend=mend)
        return round

    def check_step(self, step: RoundStep, round: int) -> None:
        """Raise UsageProblem unless this federation's method takes this step in this round."""
        federation = self.agreement.federation
        takes = {
            "broadcast": self.agreement.broadcasts(round),
            "aggregate": self.agreement.averages,
            "co-distill": federation.distils or federation.clients_tell,
            "share-knowledge": federation.server_tells,
            "client-distill": federation.learns_in_public,
        }
        if not takes[step]:
            message = f"method {federation.method} has no {step}"
            if step == "broadcast":
                one = self.agreement.is_of_one_slm
                message += " after round 1" if one else " where clients have models of their own"
            mend = f"{Command('status')} names the next step; federation.method in {AGREEMENT} decides which there are"
            raise UsageProblem(message, where=self.root / AGREEMENT, mend=mend)

    def check_client(self, client: int) -> int:
        """The client, or UsageProblem if the agreement has none of that number."""
        if client not in self.clients:
            message = f"there is no client {client}: the agreement has clients 1 to {len(self.clients)}"
            mend = "give one of those, or agree on more federation.clients"
            raise UsageProblem(message, where=self.root / AGREEMENT, mend=mend)
        return client

    def seed_for(self, stage: str, round: int, client: int = 0) -> int:
        """The seed of one run of a stage, drawn from the federation's: a stage run alone gives the same bytes."""
        words = f"{self.agreement.federation.seed}/{stage}/{round}/{client}"
        return int(reading.sha256(words.encode())[:8], 16) % (1 << 31)

    # --- helpers of more than one stage

    def local(self, path: str) -> Path:
        """A path from the settings: absolute, or from the workspace."""
        return self.home / Path(path).expanduser()


def require(path: Path, message: str, mend: object) -> None:
    """Raise NotReady with this message unless path exists."""
    if not path.exists():
        raise reading.not_there(path) if path.is_symlink() else NotReady(message, where=path, mend=mend)
