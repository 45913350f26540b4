"""Adapters that rightly change nothing: the server's before any training of it came through."""

from __future__ import annotations

from stages.artefacts.publishing import keeps_old
from stages.artefacts.reading import Artefact
from stages.models import adapters, residual
from stages.models.tuned import Tuned
from stages.workspace.agreement import Agreement


def is_base(adapter: Artefact, tuned: Tuned, agreement: Agreement) -> bool:
    """Whether B is rightly zero: every B is a client's own, or no round was taken yet, by the gate or by keep_old."""
    is_untrained = keeps_old(adapter.manifest) or (agreement.server_has_no_b and adapter.manifest.client is None)
    changes_nothing = adapters.changes_nothing(adapters.take(tuned.model)) and not residual.take(tuned.model)
    return is_untrained and changes_nothing
