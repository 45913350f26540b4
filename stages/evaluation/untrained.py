"""Adapters that rightly change nothing: the server's before any training of it came through."""

from __future__ import annotations

from stages.artefacts.publishing import GATE_KEPT, KEPT_OLD
from stages.artefacts.reading import Artefact
from stages.models import adapters
from stages.models.tuned import Tuned
from stages.workspace.agreement import Agreement


def is_base(adapter: Artefact, tuned: Tuned, agreement: Agreement) -> bool:
    """Whether B is rightly zero: every B is a client's own, or no round was taken yet, by the gate or by keep_old."""
    said = adapter.manifest.metrics
    is_old = bool(said.get(GATE_KEPT) or said.get(KEPT_OLD))
    is_untrained = is_old or (agreement.server_has_no_b and adapter.manifest.client is None)
    return is_untrained and adapters.changes_nothing(adapters.take(tuned.model))
