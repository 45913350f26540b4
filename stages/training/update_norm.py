"""How far an update goes: its norm, and the agreed one to which it is shortened before it is sent."""

from __future__ import annotations

from collections.abc import Sequence

from stages.artefacts.adapter_files import Tensors
from stages.data.examples import Example
from stages.models import adapters
from stages.models.tuned import Tuned
from stages.runtime.events import Event, Report
from stages.training import micro_batch
from stages.training.objective import Objective, task_loss
from stages.workspace.paths import Workspace


def keep_short(
    slm: Tuned, received: Tensors, examples: Sequence[Example], workspace: Workspace, report: Report
) -> dict[str, float]:
    """Shorten the update to max_update_norm. Returns its norms, and where it was shortened the loss after that."""
    model = slm.model
    trained, largest = adapters.take(model), workspace.agreement.aggregation.max_update_norm
    norms = adapters.check_trained(received, trained)
    if largest is None or norms["update_norm"] <= largest:
        return norms
    report(Event("note", f"update shortened from norm {norms['update_norm']:.4g} to {largest:g}"))
    adapters.put(model, adapters.shortened(received, trained, largest))
    objective = Objective([slm], task_loss, {"slm_ft": 1.0})
    rows = micro_batch.rows_at_once(objective, examples, workspace.agreement.client_training, workspace.machine)
    after = objective.measure(examples, rows)
    return adapters.check_trained(received, adapters.take(model)) | {"slm_ft_after": after["slm_ft"]}
