"""The gate of aggregate: an average that makes the SLM worse on held-out rows is not taken.

It needs nothing of single updates, so that it works on a sum too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from stages.artefacts.adapter_files import loaded
from stages.artefacts.average import Average
from stages.artefacts.publishing import GATE_KEPT
from stages.artefacts.reading import Artefact
from stages.data.examples import Example, encode, tell_left_out
from stages.data.rows import Row
from stages.models import adapters, residual
from stages.models.devices import naming_memory_knobs
from stages.models.loading import Models
from stages.models.tuned import Tuned
from stages.runtime.errors import BadNumbers
from stages.runtime.events import Event, Report
from stages.training.micro_batch import rows_at_once
from stages.training.objective import Objective, task_loss
from stages.workspace.names import RESIDUAL
from stages.workspace.paths import Workspace


class Verdict(NamedTuple):
    """Whether the old adapter is kept, and what the manifest says of it: gate_kept is 1.0 if it is.

    metrics: gate, the amount; gate_before and gate_after, the loss per answer token in nats with the old adapter and
    with the average. gate_after is absent where it is no number. gate_rows_left_out:
    how many of the rows were too long, if any.
    """

    keeps_old: bool
    metrics: dict[str, float]


def gate(
    workspace: Workspace,
    theta: Artefact,
    average: Average,
    rows: Sequence[Row],
    *,
    amount: float,
    models: Models,
    report: Report,
) -> Verdict:
    """Keep theta if the average's loss on these rows is above theta's by more than the amount, or is no number.

    average: of theta's layout. Measured as training measures, but on all rows. Raises BadNumbers if theta's own loss is
    no number, since nothing can be compared with that.
    """
    models.use("slm")
    slm = models.with_adapter("slm", theta)
    settings = workspace.agreement.client_training
    examples = encode(
        rows,
        slm.tokenizer,
        max_length=settings.max_length,
        context=slm.context,
        too_long=workspace.agreement.data.too_long,
        path=workspace.held_out_data,
    )
    left_out = tell_left_out(rows, examples, workspace.held_out_data, report, "gate_rows_left_out")
    at_once = rows_at_once(_objective(slm), examples, settings, workspace.machine)
    before = _loss(slm, examples, at_once)
    if not math.isfinite(before):
        mend = "compute with --dtype float32; should that not help, train the round before again at lower rates"
        raise BadNumbers(f"the broadcast's own loss on the held-out rows is {before}", where=theta.path, mend=mend)
    adapters.put(slm.model, average.tensors)
    if RESIDUAL in average.beside:
        residual.put(slm.model, loaded(average.beside[RESIDUAL], theta.path / RESIDUAL))
    after = _loss(slm, examples, at_once)
    keeps_old = not after - before <= amount  # true of NaN too
    words = f"loss on {len(examples)} held-out rows {before:.4g} -> {after:.4g}"
    if keeps_old:
        report(Event("warning", f"the old adapter is kept: {words}, the gate is {amount:g}"))
    else:
        report(Event("note", words))
    measured = {"gate": amount, "gate_before": before, GATE_KEPT: float(keeps_old), **left_out}
    return Verdict(keeps_old, measured | ({"gate_after": after} if math.isfinite(after) else {}))


def _loss(slm: Tuned, examples: Sequence[Example], at_once: int) -> float:
    """The SLM's cross-entropy per answer token, Eq. 3."""
    with naming_memory_knobs():
        losses = _objective(slm).measure(examples, at_once, most=len(examples))
    return losses["slm_ft"]


def _objective(slm: Tuned) -> Objective:
    return Objective([slm], task_loss, {"slm_ft": 1.0})
