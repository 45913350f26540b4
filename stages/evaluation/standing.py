"""A model as it is to be scored: its base, its adapter proven to be in it or rightly without effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.artefacts.reading import Artefact
from stages.evaluation.untrained import is_base
from stages.runtime.events import Event, Report
from stages.workspace.agreement import Agreement
from stages.workspace.settings import Role

if TYPE_CHECKING:
    from stages.models.loading import Models
    from stages.models.tuned import Tuned


def standing(
    models: Models, role: Role, adapter: Artefact | None, agreement: Agreement, report: Report
) -> tuple[Tuned, bool]:
    """The base with the adapter in it, if any, and whether it is to be scored with that: else as the base alone."""
    models.use(role)
    tuned = models.get(role) if adapter is None else models.with_adapter(role, adapter)
    is_plain = adapter is not None and is_base(adapter, tuned, agreement)
    if is_plain:
        words = "B is zero, as nobody has trained it here: the server's SLM is its base, and is scored as that"
        report(Event("warning", words))
    return tuned, adapter is not None and not is_plain
