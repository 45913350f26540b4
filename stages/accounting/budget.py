"""The privacy ledger: what a client has spent of its privacy budget, written down before it is spent.

JSON lines, one for each reservation, each with the sha256 of the line before: an edited, reordered or shortened ledger
is refused. What makes the counting sound:

- A reservation stands in the ledger, on the disk, before the first step of training, for all of a round's steps. No
  crash takes it back.
- What a stopped run has done since its last checkpoint is thrown away and nobody has seen it; going on from the
  checkpoint with new noise publishes the outcome of exactly the steps that were reserved. So a run that resumes, at the
  earliest at step 0, spends nothing more; the ledger notes each time, since whoever stops runs by their losses makes a
  choice that the guarantee does not cover.
- Everything else is spent anew: --overwrite, other inputs, a run whose checkpoints are gone, one that ended in NaN.
- A run's end stands in the ledger, with the sha256 of the adapter, before that is published. From then on the run goes
  on from its last checkpoint alone, which holds this very adapter, so that a crash while publishing trains no second
  one; nor does a checkpoint that was copied earlier and put back.
- Two copies of the whole private folder, ledger included, can each go on with one reservation. Nothing here can see it.
- A ledger that lacks a round whose private adapter is here has been lost or put back to an older state: refused. So is
  one whose last lines are gone: each adapter and each log names the line that the ledger ended with when it was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.accounting.accountant import Charge, accountants, least_noise, total_epsilon
from stages.accounting.ledger import (
    Finished,
    Line,
    Reserved,
    Reset,
    Resumed,
    alone,
    append,
    charges,
    damaged,
    read_ledger,
    rounds_of,
)
from stages.artefacts.manifest import PrivacyClaim
from stages.artefacts.reading import read_manifest
from stages.files import reading
from stages.runtime.errors import BadNumbers, Damaged, Refused, UsageProblem
from stages.workspace.names import MACHINE
from stages.workspace.paths import Workspace


def check(workspace: Workspace, *, client: int, round: int, examples: int | None) -> None:
    """What can be known before a model is loaded: raises as reserve does, UsageProblem for what cannot train so.

    examples: None if it is not known yet, or if this may go on with a reservation.
    """
    if workspace.machine.gradient_checkpointing:
        mend = "set gradient_checkpointing = false there; micro_batch = 1 needs less memory too"
        message = "gradient_checkpointing hides the gradient of each example, which differential privacy needs"
        raise UsageProblem(message, where=workspace.root / MACHINE, mend=mend)
    accountants()
    lines = _whole_ledger(workspace, client)
    if examples is not None:
        _priced(workspace, client, round, examples, lines)


def reserve(
    workspace: Workspace, client: int, round: int, examples: int, *, attempt: str, step: int, adapter: str = ""
) -> Charge:
    """Write down what a run is about to spend, or, if it has done so, that it goes on after this step.

    adapter: the sha256 of what it holds now; one that has finished may only publish what it finished with.
    Returns what was reserved. Raises BadNumbers if the budget does not allow it, Damaged for a broken or lost ledger,
    Refused for a run that has finished and stands at another checkpoint than its last.
    """
    path = workspace.privacy_ledger(client)
    with alone(path):
        lines = _whole_ledger(workspace, client)
        if own := _reserved(lines, attempt):
            ended = _finished(lines, attempt)
            if ended and (step, adapter) != (own[-1].steps, ended.adapter_sha256):
                mend = "give the command again with --overwrite, which trains and spends anew"
                message = f"by {path.name} this run has finished; its checkpoint of step {step} must not be used again"
                raise Refused(message, where=workspace.unfinished("client-train", round, client), mend=mend)
            append(path, lines, Resumed(round=round, attempt=attempt, step=step))
            return own[-1].charge
        if step > 0:
            raise _unknown(path)
        charge, epsilon = _priced(workspace, client, round, examples, lines)
        delta = workspace.agreement.privacy.delta
        append(path, lines, Reserved(round=round, attempt=attempt, **charge._asdict(), delta=delta, epsilon=epsilon))
        return charge


def finish(workspace: Workspace, client: int, round: int, *, attempt: str, adapter: str) -> None:
    """Write down, before anything is published, that a run has ended with an adapter of this sha256.

    Raises Damaged for a run that the ledger does not know, Refused for one that has ended with another adapter.
    """
    path = workspace.privacy_ledger(client)
    with alone(path):
        lines = _whole_ledger(workspace, client)
        if not _reserved(lines, attempt):
            raise _unknown(path)
        ended = _finished(lines, attempt)
        if ended and ended.adapter_sha256 != adapter:
            mend = "give the command again with --overwrite, which trains and spends anew"
            raise Refused(f"by {path.name} this run has finished with another adapter", where=path, mend=mend)
        if not ended:
            append(path, lines, Finished(round=round, attempt=attempt, adapter_sha256=adapter))


def _unknown(path: Path) -> Damaged:
    mend = "put back the ledger; or give the command again with --overwrite, which trains and spends anew"
    return Damaged(f"{path.name} does not know the run that was stopped here", where=path, mend=mend)


def _reserved(lines: Sequence[Line], attempt: str) -> list[Reserved]:
    return [line.entry for line in lines if isinstance(line.entry, Reserved) and line.entry.attempt == attempt]


def _finished(lines: Sequence[Line], attempt: str) -> Finished | None:
    return next((one.entry for one in lines if isinstance(one.entry, Finished) and one.entry.attempt == attempt), None)


def _priced(
    workspace: Workspace, client: int, round: int, examples: int, lines: Sequence[Line]
) -> tuple[Charge, float]:
    """What this round's training costs, and the epsilon that all of it then comes to."""
    privacy, rounds = workspace.agreement.privacy, workspace.agreement.federation.rounds
    sample_rate, steps = sampling(workspace, examples)
    spent = charges(lines)
    where = workspace.privacy_ledger(client)
    mend = "nothing was trained; agree on a larger privacy.epsilon, on fewer steps or on more noise, all parties alike"
    noise = privacy.noise_multiplier or _least_noise(workspace, spent, sample_rate, steps * (rounds - round + 1))
    if noise is None:
        message = f"client {client} has spent epsilon {total_epsilon(spent, privacy.delta):.4g} of {privacy.epsilon:g}"
        raise BadNumbers(f"{message}; no noise makes round {round} fit the rest", where=where, mend=mend)
    charge = Charge(noise, sample_rate, steps)
    epsilon = total_epsilon([*spent, charge], privacy.delta)
    if epsilon > (privacy.epsilon or math.inf):
        message = f"round {round} would bring client {client} to epsilon {epsilon:.4g}, the budget is"
        raise BadNumbers(f"{message} {privacy.epsilon:g}", where=where, mend=mend)
    if math.isinf(epsilon):
        raise BadNumbers(f"noise_multiplier {noise:g} protects nothing: epsilon is infinite", where=where, mend=mend)
    return charge, epsilon


def _least_noise(workspace: Workspace, spent: Sequence[Charge], sample_rate: float, to_come: int) -> float | None:
    """The noise that keeps this and all later rounds within epsilon: that of the last, if it does, else the least."""
    privacy = workspace.agreement.privacy
    assert privacy.epsilon is not None
    if spent and spent[-1].sample_rate == sample_rate:
        noise = spent[-1].noise_multiplier
        if total_epsilon([*spent, Charge(noise, sample_rate, to_come)], privacy.delta) <= privacy.epsilon:
            return noise
    return least_noise(spent, sample_rate=sample_rate, steps=to_come, epsilon=privacy.epsilon, delta=privacy.delta)


def sampling(workspace: Workspace, examples: int) -> tuple[float, int]:
    """The probability with which a step takes each of so many examples, and the steps of a round."""
    budget = workspace.agreement.client_training
    return min(1.0, budget.rows_per_step / examples), budget.steps_for(examples)


def claim(workspace: Workspace, client: int) -> PrivacyClaim | None:
    """What may be said of it in public: epsilon and delta since the last reset, rounded up; None without [privacy]."""
    privacy = workspace.agreement.privacy
    if not privacy.is_on:
        return None
    lines = read_ledger(workspace.privacy_ledger(client))
    epsilon = math.ceil(total_epsilon(charges(lines), privacy.delta) * 1e4) / 1e4
    is_reset = any(isinstance(line.entry, Reset) for line in lines)
    head = lines[-1].sha256 if lines else None
    return PrivacyClaim(unit="example", epsilon=epsilon, delta=privacy.delta, reset=is_reset, ledger_sha256=head)


def reset(workspace: Workspace, client: int) -> None:
    """Begin the ledger anew, whatever became of the old one, and say so in its first line."""
    path = workspace.privacy_ledger(client)
    replaced = reading.sha256(reading.read_own(path)) if path.is_file() else None
    with alone(path):
        rounds, named = _published(workspace, client), sorted(set(anchors(workspace, client).values()))
        append(path, [], Reset(rounds=rounds, replaced_sha256=replaced, anchors=named))


def _whole_ledger(workspace: Workspace, client: int) -> list[Line]:
    """The ledger, which must know every round of which there is a private adapter, and the line that each names."""
    path = workspace.privacy_ledger(client)
    lines = read_ledger(path)
    if unknown := [round for round in _published(workspace, client) if round not in rounds_of(lines)]:
        state = f"{path.name} does not know" if lines else f"{path.name} is missing:"
        adapter = workspace.shown(workspace.client_adapter(unknown[0], client))
        raise damaged(path, f"{state} what {adapter}, which was trained with differential privacy, has spent")
    if lost := unknown_anchors(lines, anchors(workspace, client)):
        message = (
            f"{path.name} has been cut short, or is another one: it lacks the line that {workspace.shown(lost[0])}"
        )
        raise damaged(path, f"{message} was made after")
    return lines


def anchors(workspace: Workspace, client: int) -> dict[Path, str]:
    """The line that the ledger ended with when each folder and each log of this client was made; by its path."""
    found: dict[Path, str] = {}
    for round in range(1, workspace.agreement.federation.rounds + 1):
        for place_of in (workspace.client_adapter, workspace.client_update, workspace.sent_by):
            place = place_of(round, client)
            claim = read_manifest(place)[0].privacy if place.exists() else None
            if claim and claim.ledger_sha256:
                found[place] = claim.ledger_sha256
        log = workspace.log("client-train", round, client)
        if named := reading.first_logged(log).get("ledger_sha256"):
            found[log] = str(named)
    return found


def unknown_anchors(lines: Sequence[Line], named: Mapping[Path, str]) -> list[Path]:
    """Those that name a line which the ledger has not, and did not give up in a reset."""
    known = {line.sha256 for line in lines}
    for line in lines:
        known |= set(line.entry.anchors) if isinstance(line.entry, Reset) else set()
    return [path for path, anchor in named.items() if anchor not in known]


def _published(workspace: Workspace, client: int) -> list[int]:
    """The rounds of which this client has an adapter that was trained with differential privacy, or the log of one."""
    rounds = range(1, workspace.agreement.federation.rounds + 1)
    trained = trained_here(workspace, client)
    return [round for round in rounds if round in trained or _is_private(workspace.client_adapter(round, client))]


def trained_here(workspace: Workspace, client: int) -> list[int]:
    """The rounds that this client's private folder shows to have been trained with differential privacy.

    By the log under this agreement, or by the adapter where clients keep theirs; else adapters lie on any machine.
    """
    privacy = workspace.agreement.privacy
    found: list[int] = []
    for round in range(1, workspace.agreement.federation.rounds + 1):
        agreed = reading.logged_inputs(workspace.log("client-train", round, client)).get("agreement")
        is_logged = privacy.is_on and agreed == workspace.agreement_sha256
        if is_logged or (workspace.sends_of_theirs and _is_private(workspace.client_adapter(round, client))):
            found.append(round)
    return found


def _is_private(adapter: Path) -> bool:
    return adapter.exists() and read_manifest(adapter)[0].privacy is not None
