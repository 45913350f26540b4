"""What another method takes back of an agreement's settings, since it does not have them: they would be refused."""

from __future__ import annotations

from typing import Any

from stages.workspace.agreement import Agreement
from stages.workspace.methods import Federation


def not_had_by(method: Federation, agreement: Agreement) -> dict[str, Any]:
    """The keys of this agreement that a method takes back: dotted, each with None, which takes it out."""
    changes: dict[str, Any] = {}
    if method.method != "fedmkt" and agreement.aggregation.average:
        changes["aggregation.average"] = None
    is_averaged = method.averages or (method.method == "fedmkt" and agreement.aggregation.average)
    if not is_averaged and agreement.aggregation.server != "none":
        changes |= {f"aggregation.{key}": None for key in ("server", *agreement.aggregation.server_keys)}
    is_b_personal = method.averages and agreement.aggregation.personal == "B"
    if is_b_personal and agreement.aggregation.gate is not None and not method.distils:
        changes["aggregation.gate"] = None  # it would look at the base
    if not method.averages and agreement.client_training.proximal:
        changes["client_training.proximal"] = None
    has_ranks = method.averages or method.method == "standalone"
    if (method.averages and not agreement.ranks) or (agreement.ranks and not has_ranks):
        changes |= {"clients": None} if agreement.clients else {}  # they say what holds for all: see unlike
    if not method.server_tells and agreement.distillation.divergence in ("spans", "sorted"):
        changes["distillation.divergence"] = None
    if not method.server_tells and agreement.distillation.select == "none":
        changes["distillation.select"] = None
    if method.server_tells and agreement.distillation.order == "alternating":
        changes["distillation.order"] = None
    return changes
