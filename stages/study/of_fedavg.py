"""FedAvg with one part of another system, as a row of a comparison: which keys of the agreement make each of them."""

from __future__ import annotations

from typing import Any, cast

from stages.runtime.errors import UsageProblem
from stages.workspace.agreement import Agreement
from stages.workspace.averaging import OF_SERVER
from stages.workspace.commands import Command
from stages.workspace.methods import OF_FEDAVG, Compared, Federation, Method

MU = 0.01
"""FedProx's; its paper tried 0.001, 0.01, 0.1 and 1."""


def federation_of(compared: Compared) -> Federation:
    """The method as an agreement says it, and nothing else."""
    return Federation(name="x", method="fedavg" if compared in OF_FEDAVG else cast(Method, compared))


def part_of(compared: Compared, agreement: Agreement) -> dict[str, Any]:
    """The keys that it has beside FedAvg's: dotted, with None those that are taken out. Of another method none.

    Raises UsageProblem where the agreement has that part for every method that averages: it would be FedAvg's row.
    """
    if compared not in OF_FEDAVG:
        return {}
    if compared == "fedprox":
        _check_absent("client_training.proximal", agreement.client_training.proximal, compared)
        return {"client_training.proximal": MU}
    server = agreement.aggregation.server
    _check_absent("aggregation.server", server if server == compared else None, compared)
    return {f"aggregation.{key}": None for key in OF_SERVER[server]} | {"aggregation.server": compared}


def _check_absent(key: str, found: object, compared: Compared) -> None:
    if found is not None:
        message = f"{compared} is fedavg here: {key} = {found} in this agreement is for every method that averages"
        raise UsageProblem(message, mend=f"leave it out, or compare values by {Command('sweep', set=f'{key}=...')}")
