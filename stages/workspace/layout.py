"""Where everything is in a workspace. Every folder's name on disk is spelled here and nowhere else."""

from __future__ import annotations

import functools
import os
import re
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path

from stages.files import reading
from stages.runtime.errors import Refused
from stages.workspace.agreement import Agreement
from stages.workspace.machine import Machine
from stages.workspace.names import CLIENT, EXCHANGE, PRIVATE, UNSENT, ZERO_SHOT, round_name
from stages.workspace.rows_layout import RowsLayout
from stages.workspace.settings import Role


def broadcast_in(place: Path) -> Path:
    """The broadcast in a round's folder of an exchange, which need not be a workspace's."""
    return place / "broadcast"


class Layout(RowsLayout):
    """The folders and files of a workspace, as its agreement and this machine's settings place them."""

    @property
    @abstractmethod
    def agreement(self) -> Agreement:
        """What all parties agreed on."""

    @property
    @abstractmethod
    def machine(self) -> Machine:
        """Settings of this machine."""

    @property
    @abstractmethod
    def clients(self) -> range:
        """All clients of the federation, counted from 1."""

    @abstractmethod
    def local(self, path: str) -> Path:
        """A path from the settings: absolute, or from the workspace."""

    # --- data

    @property
    def tasks(self) -> Path:
        """lm-eval task files of this federation."""
        return self.home / "tasks"

    def tasks_sha256(self, names: Iterable[str] | None = None) -> str:
        """The digest of the task files and of the local data they name: other ones give other scores.

        names: of these tasks and what they need; of all otherwise, as in results and splits of earlier versions.
        """
        reading.check_plain(self.tasks)
        from stages.workspace import task_files

        return task_files.digest(self.tasks, self.home, names)

    def has_tasks(self, sha256: object, names: Iterable[str]) -> bool:
        """Whether a digest of the task files, as it was written down, is that of these tasks as they are now."""
        return sha256 == self.tasks_sha256(names) or sha256 == self.tasks_sha256()

    def sources_sha256(self) -> str:
        """The digest of what `prepare` deals rows from: tasks and their local data, or JSONL files."""
        if self.agreement.data.tasks:
            return self.tasks_sha256(self.agreement.data.tasks)
        return reading.sha256(
            "".join(reading.sha256(reading.read_own(self.local(name))) for name in self.agreement.data.files).encode()
        )

    @functools.cached_property
    def private(self) -> Path:
        """What never leaves its machine."""
        return self.root / PRIVATE

    @property
    def split(self) -> Path:
        """What `prepare` did: sources, rows and labels per party."""
        return self.private / "split.json"

    @property
    def is_simulation(self) -> bool:
        """Whether one person plays all parties here, as machine.toml says, or as `prepare` was once told by hand."""
        said = self.machine.simulation
        return self.split.exists() if said is None else said

    def agreed(self, sha256: str) -> Path:
        """A copy of the agreement of this digest, under which something was published here."""
        return self.private / "agreements" / f"{sha256[:16]}.toml"

    def privacy_ledger(self, client: int) -> Path:
        """What a client has spent of its privacy budget, round after round, written before it is spent."""
        return self.private / f"client-{client}" / "privacy-ledger.jsonl"

    # --- who takes part

    @functools.cached_property
    def secrets(self) -> Path:
        """Where this machine keeps keys, never inside a workspace."""
        data = os.environ.get("XDG_DATA_HOME", "")
        if not Path(data).is_absolute():  # as its specification says; it must not lead into a workspace either
            data = "~/.local/share"
        return self.local(self.machine.secrets or f"{data}/fedcollm")

    def secrets_pointer(self, party: str) -> Path:
        """The name of a party's folder of keys: no secret itself."""
        return self.private / party / "keys.json"

    def secrets_unfinished(self, party: str) -> Path:
        """The same while keys are being made: left over where that was killed, so that the next can erase them."""
        return self.private / party / "keys-unfinished.json"

    def public_keys(self, client: int) -> Path:
        """A client's public keys, from the client to the server; with its signature beside it."""
        return self.exchange / "keys" / f"client-{client}.json"

    @property
    def federation(self) -> Path:
        """The roster, from the server to all; with its signature beside it."""
        return self.exchange / "federation.json"

    # --- adapters

    @functools.cached_property
    def exchange(self) -> Path:
        """The only folder that ever travels."""
        return self.root / EXCHANGE

    def _exchange(self, round: int) -> Path:
        return self.exchange / round_name(round)

    def _server(self, round: int) -> Path:
        return self.private / "server" / round_name(round)

    def broadcast(self, round: int) -> Path:
        """theta^t, from the server to all clients."""
        return broadcast_in(self._exchange(round))

    def client_update(self, round: int, client: int) -> Path:
        """theta_k^{t+1}, from client k to the server."""
        sent = self.sent_by(round, client)
        return sent.with_name(f"adapter-{sent.name}") if self.agreement.aggregation.average else sent

    def sent_by(self, round: int, client: int) -> Path:
        """What client k sends as soon as it has trained: theta_k^{t+1}, or with FedMKT what its model knows."""
        return self._exchange(round) / f"client-{client}"

    def client_adapter(self, round: int, client: int) -> Path:
        """theta_k^{t+1}, readable: what the client sends, or what it keeps, as with FedMKT as a rule."""
        if self.clients_keep_theirs:
            return self.private / f"client-{client}" / round_name(round) / "slm"
        return self.client_update(round, client)

    @property
    def clients_keep_theirs(self) -> bool:
        """Whether clients' readable adapters never leave their machines."""
        agreement = self.agreement
        return self.sends_of_theirs or (agreement.federation.learns_in_public and not agreement.averages)

    @property
    def sends_of_theirs(self) -> bool:
        """Whether clients send something made of their adapters: masked, encrypted, or A or B alone."""
        return self.agreement.aggregation.is_hidden or self.agreement.sends_part

    def client_trained(self, round: int, client: int) -> Path:
        """What client-train makes: with FedMKT theta_k before the client learns from the server, else theta_k^{t+1}."""
        if self.agreement.federation.learns_in_public:
            return self.private / f"client-{client}" / round_name(round) / "trained"
        return self.client_adapter(round, client)

    def masked_update(self, round: int, client: int) -> Path:
        """Secure mode: what the client has masked, as it is sent and, until it has revealed, sent again."""
        return self.private / f"client-{client}" / round_name(round) / ".masked"

    def unsent(self, round: int, client: int) -> Path:
        """What a client's sparse update of a round left out, for its next."""
        return self.private / f"client-{client}" / round_name(round) / UNSENT

    def close(self, round: int) -> Path:
        """Where updates are hidden: whose the server adds up, from the server to those who reveal."""
        return self._exchange(round) / "close"

    def reveal(self, round: int, client: int) -> Path:
        """Where updates are hidden: what a client reveals of their sum, from the client to the server."""
        return self._exchange(round) / f"reveal-{client}"

    def client_updates(self, round: int) -> dict[int, Path]:
        """The updates that have arrived. Raises Refused for one from a client that the agreement does not have."""
        return self.sent_by_clients(round, "adapter-" if self.agreement.aggregation.average else "")

    def sent_by_clients(self, round: int, before: str = "") -> dict[int, Path]:
        """What has arrived of what is called after a client, or has this before its name. Raises the same."""
        found = {}
        for path in self._exchange(round).glob(f"{before}client-*"):
            number = re.fullmatch(CLIENT, path.name.removeprefix(before))
            if number is None or int(number[1]) not in self.clients:
                message = f"{path.name} is not a client of this federation, which has clients 1 to {len(self.clients)}"
                raise Refused(message, where=path, mend="take that folder out of the exchange")
            found[int(number[1])] = path
        return dict(sorted(found.items()))

    def client_adapters(self, round: int) -> dict[int, Path]:
        """The clients' readable adapters that are on this machine."""
        if not self.clients_keep_theirs:
            return self.client_updates(round)
        return {k: place for k in self.clients if (place := self.client_adapter(round, k)).exists()}

    # --- the server's adapters

    def aggregate(self, round: int) -> Path:
        """theta^{t,0}."""
        return self._server(round) / "aggregate"

    def slm(self, round: int) -> Path:
        """theta^{t+1}, the SLM's adapter after mutual distillation."""
        return self._server(round) / "slm"

    def round_result(self, round: int) -> Path:
        """The SLM's adapter that a round ends with at the server: after co-distill, or, without that, the average."""
        return self.slm(round) if self.agreement.federation.distils else self.aggregate(round)

    def llm(self, round: int) -> Path:
        """omega^{t+1}, the LLM's adapter after mutual distillation."""
        return self._server(round) / "llm"

    def captured(self, round: int, role: Role) -> Path:
        """What a model said of the auxiliary data before the round changed it, for co-distill in two phases."""
        return self._server(round) / f"captured-{role}"

    @property
    def alignment(self) -> Path:
        """What `align` found: both vocabularies as bytes, the maps between them, and its report."""
        return self.private / "server" / "alignment"

    # --- logs, unfinished work, results

    def log(self, stage: str, round: int, client: int | None = None) -> Path:
        """The private log of one run of a stage, JSON lines: inputs, then each step, then the end."""
        folder = self._server(round) if client is None else self.private / f"client-{client}" / round_name(round)
        return folder / f"{stage}.jsonl"

    def turn(self, party: str | None) -> Path:
        """The lock of `next`: of one party's steps, or of all parties' here."""
        return self.private / (party or ".") / "next.lock"

    def unfinished(self, stage: str, round: int, client: int | None = None) -> Path:
        """Checkpoints of a training stage that has not ended yet, by process; gone when it has."""
        return self.log(stage, round, client).with_name(f".{stage}")

    def tensorboard(self, stage: str, round: int, client: int | None = None) -> Path:
        """TensorBoard's files of one run of a stage, beside those of other rounds."""
        party = self.log(stage, round, client).parents[1]
        return party / "tensorboard" / f"{round_name(round)}-{stage}"

    @property
    def scores(self) -> Path:
        """Where lm-eval's scores are."""
        return self.root / "results"

    @property
    def task_results(self) -> Path:
        """Where lm-eval's scores of tasks are that a command named in the place of the settings'."""
        return self.root / "results" / "own-tasks"

    def result(self, round: int | None, subject: str) -> Path:
        """lm-eval's scores of one model: "slm", "llm" or "client-2"; without a round, of the base alone."""
        return self.scores / (ZERO_SHOT if round is None else round_name(round)) / f"{subject}.json"

    @property
    def report(self) -> Path:
        """The page that shows all of it, and its charts' data as CSV."""
        return self.root / "results" / "report"

    @property
    def slurm(self) -> Path:
        """Job scripts for Slurm, made by `fedcollm slurm`; their logs, and the numbers of the jobs."""
        return self.root / "slurm"

    def export(self, round: int, subject: str, *, merged: bool) -> Path:
        """One model in the form that others load: an adapter for PEFT, or merged weights."""
        return self.root / "exports" / f"{subject}-{round_name(round)}{'-merged' if merged else ''}"
