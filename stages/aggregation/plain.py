"""Updates that travel in the clear, as a channel: the server reads each, and averages them by the agreement's rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.artefacts.average import Arrived, Average
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Artefact, check_names, read_manifest
from stages.artefacts.receiving import received
from stages.artefacts.subjects import OWN_EXAMPLES, OWN_TOKENS, client_stage
from stages.data.rows import Row
from stages.parties.names import SERVER
from stages.parties.party import Party
from stages.runtime.errors import NotReady, Refused
from stages.runtime.events import Event, Report
from stages.secagg import accepting
from stages.workspace.commands import Command
from stages.workspace.names import ADAPTER_CONFIG, SPARSE_UPDATE
from stages.workspace.paths import Workspace, require

MOST_CLAIMED = 1 << 40
"""Examples, tokens or steps of one client in one round; the sum of all clients' must stay a number that is counted."""

OF_FACTORS = {"median", "trimmed-mean"}
"""Rules that act on each number of A and B by itself."""


@dataclass(frozen=True)
class ToServer:
    """The channel as a client has it: what it trains is what it sends; see aggregation.channels."""

    party: Party
    report: Report
    done: str = "already done"

    def accept(self, theta: Artefact | None) -> None:
        """Where there are keys."""
        if theta:
            accepting.accept(self.party, theta, self.report)

    def check(self, theta: Artefact | None, rows: list[Row], again: bool) -> None:
        """Whatever it trains can be sent."""

    def is_final(self, theta: Artefact | None) -> bool:
        """It can always be trained again."""
        return False

    def send(self, theta: Artefact | None, trained: Manifest, again: bool) -> Manifest:
        """It lies in exchange/ already."""
        return trained


@dataclass(frozen=True)
class FromClients:
    """The channel as the server has it."""

    party: Party
    report: Report

    def arrived(self, theta: Artefact, again: bool) -> Arrived:
        """The updates here, if they are enough; those of an earlier attempt at the round do not count."""
        updates = _present(self.party.workspace, theta, self.report)
        parents = {path.name: read_manifest(path)[1] for path in updates.values()}
        return Arrived({"broadcast": theta.sha256} | parents, updates)

    def combine(self, theta: Artefact, arrived: Arrived) -> Average:
        """The updates, combined by the agreement's rule."""
        return _average(self.party, theta, arrived, self.report)


def _present(workspace: Workspace, theta: Artefact, report: Report) -> dict[int, Path]:
    round, updates = theta.manifest.round, workspace.client_updates(theta.manifest.round)
    if theta.manifest.attempt:
        earlier = [k for k, path in updates.items() if read_manifest(path)[0].attempt < theta.manifest.attempt]
        for client in earlier:
            report(Event("warning", f"client {client}'s update is of an earlier attempt at this round"))
            del updates[client]
    absent = [k for k in workspace.clients if k not in updates]
    needed = workspace.agreement.aggregation.min_clients or len(workspace.clients)
    names = ", ".join(map(str, absent))
    if len(updates) < needed:
        message = f"round {round} has {len(updates)} of the {needed} updates it needs; absent: client {names}"
        first = Command(client_stage(workspace), client=absent[0], round=round)
        mend = f"{first}, there; then carry exchange/ here"
        raise NotReady(message, where=workspace.client_update(round, absent[0]), mend=mend)
    if absent:
        report(
            Event("warning", f"averaging {len(updates)} of {len(workspace.clients)} clients; absent: client {names}")
        )
    return updates


def _average(server: Party, theta: Artefact, arrived: Arrived, report: Report) -> Average:
    from threadpoolctl import threadpool_limits

    from stages.aggregation.residuals import largest_rank, residual
    from stages.aggregation.rules import WEIGHTINGS, combine
    from stages.aggregation.updates import Updates
    from stages.artefacts import adapter_files
    from stages.artefacts.residual_files import as_file, read_residual
    from stages.artefacts.residual_sizes import is_agreed

    agreement = server.workspace.agreement
    settings, lora = agreement.aggregation, agreement.slm.lora
    old = adapter_files.read_adapter(theta, None, lora)
    start = adapter_files.part_of(old, agreement.sent_in(theta.manifest.round))
    if settings.rule in OF_FACTORS:
        report(Event("warning", f"{settings.rule} of A and of B, as they are: that is not the {settings.rule} of BA"))
        if agreement.keep:
            report(Event("warning", f"{settings.rule} of few numbers: one that few clients send stays as it is"))
    heads = _heads(server, theta, arrived.updates)
    seen = [_own(head) for head in heads]
    weights = [WEIGHTINGS[settings.weighting](examples) for examples, _ in seen]
    updates, beneath = Updates(heads, start, report, agreement.keep), adapter_files.Tensors()
    with threadpool_limits(1, "blas"):
        tensors, metrics = combine(settings, updates, weights)
        if is_agreed(agreement):
            before = read_residual(theta, adapter_files.layout_of(old), agreement)
            beneath = residual(updates, weights, tensors, before)
            metrics = {name.replace("cross_term/", "residual/"): value for name, value in metrics.items()}
            metrics |= {"residual_rank": float(largest_rank(beneath))}
    # what was read now, should it have been replaced meanwhile
    parents = arrived.parents | {head.path.name: head.sha256 for head in heads}
    examples, tokens = sum(own for own, _ in seen), sum(tokens for _, tokens in seen)
    return Average(old | tensors, parents, examples, tokens, metrics, beside=as_file(beneath, agreement))


def _heads(server: Party, theta: Artefact, updates: dict[int, Path]) -> list[Artefact]:
    """Each update with everything checked but its weights, which are not read yet."""
    told, heads = _told(server.workspace, theta.manifest.round), []
    for client, path in updates.items():
        head = received(
            path,
            by=server,
            stage=client_stage(server.workspace),
            round=theta.manifest.round,
            client=client,
            only=[ADAPTER_CONFIG],
        )
        check_names(path, head.manifest)
        _check_kind(head, server.workspace.agreement.keep)
        _check_update(head, client, theta, told)
        heads.append(head)
    return heads


def _check_kind(head: Artefact, keep: float | None) -> None:
    """Raise Refused for a whole update where few numbers are agreed, and for a sparse one where all are."""
    if (SPARSE_UPDATE in head.manifest.files) != (keep is not None):
        found, agreed = ("whole", f"keep = {keep}") if keep else ("sparse", "no keep")
        message = f"client {head.manifest.client}'s update is {found}, the agreement has {agreed} under [aggregation]"
        again = Command("client-train", client=head.manifest.client, round=head.manifest.round, overwrite=True)
        raise Refused(message, where=head.path, mend=f"{again}, on client {head.manifest.client}'s machine")


def _own(update: Artefact) -> tuple[int, int]:
    """Examples and tokens of its own that a client says it saw: with FedMKT before it learned on public rows.

    -1 for what it does not tell as a whole number.
    """
    if update.manifest.stage != "client-distill":
        return update.manifest.examples, update.manifest.tokens
    told = (update.manifest.metrics.get(name, -1.0) for name in (OWN_EXAMPLES, OWN_TOKENS))
    examples, tokens = (int(number) if number.is_integer() else -1 for number in told)
    return examples, tokens


def _told(workspace: Workspace, round: int) -> dict[str, str]:
    """FedMKT: what clients learn from in a round before their adapters are averaged, as it lies here."""
    if not workspace.agreement.federation.clients_tell:
        return {}
    place, share = workspace.knowledge(round, None), Command("share-knowledge", server=True, round=round)
    require(place, f"what the server knows in round {round} is not there", share)
    return {SERVER: read_manifest(place)[1]}


def _check_update(update: Artefact, client: int, theta: Artefact, told: Mapping[str, str]) -> None:
    """Raise Refused unless this client trained it in this round from this broadcast on this base.

    told: what it must have learned from after that.
    """
    round, (examples, tokens), claims = theta.manifest.round, _own(update), update.manifest
    again = Command(update.manifest.stage, client=client, round=round, overwrite=True)
    mend = f"{again}, on client {client}'s machine"
    if max(examples, tokens, claims.examples, claims.tokens, claims.steps) > MOST_CLAIMED:
        message = f"client {client}'s update of round {round} says it saw more than {MOST_CLAIMED} examples or tokens"
        raise Refused(message, where=update.path, mend=mend)
    if examples < 1 or tokens < 0:
        untold = OWN_EXAMPLES if examples < 0 else OWN_TOKENS
        says = "says it saw no examples" if examples == 0 else f"does not tell {untold} as a whole number"
        raise Refused(f"client {client}'s update of round {round} {says}", where=update.path, mend=mend)
    expected, found = {"broadcast": theta.sha256, **told}, update.manifest.parents
    if told:  # beside what the client alone has
        found = {name: found.get(name, "") for name in expected}
    if not told and (beside := sorted(found.keys() - expected.keys())) and found.items() >= expected.items():
        message = f"client {client}'s update of round {round} says that it was made from {beside[0]} too, not from the "
        raise Refused(f"{message}broadcast alone", where=update.path, mend=mend)
    if found != expected:
        has_begun = found.get("broadcast") == theta.sha256
        what = "knowledge of the server's" if has_begun else "broadcast"
        first = again if has_begun else Command("client-train", client=client, round=round, overwrite=True)
        message = f"client {client}'s update of round {round} was trained from another {what} than the one here"
        mend = f"carry exchange/ there; then {first}, on client {client}'s machine"
        raise Refused(message, where=update.path, mend=mend)
    if name := update.manifest.base.differs(theta.manifest.base):
        message = f"client {client}'s update of round {round} was trained on another base model or tokenizer"
        message += ", by its configuration" if name == "settings_sha256" else f", by its {name}"
        raise Refused(message, where=update.path, mend=mend)
