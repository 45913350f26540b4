"""sharding: a model spread over two processes says and learns what the whole one does, and each holds half of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders import Family, examples, random_adapter, tuned
from processes import call_together
from stages.runtime.processes import Processes


def said_and_learned(processes: Processes, family: Family, is_attacked: bool, stands: bool) -> dict[str, Any]:
    """The losses and gradients of a tiny model, spread if the processes are several, and what one of them holds.

    stands: whether it has a residual beneath its adapter, which is put there when the model is spread already.
    """
    import torch
    from torch.distributed.tensor import DTensor

    from stages.models import adapters, residual, sharding
    from stages.training.adversarial import objective_of
    from stages.workspace.attacks import Adversarial

    slm = tuned("slm", family=family)
    blocks = sum(p.numel() for name, p in slm.model.named_parameters() if ".0." in name and not p.requires_grad)
    if processes.count > 1:
        sharding.spread(slm.model, torch.device("cpu"), processes.count)
    if stands:
        residual.put(slm.model, random_adapter(adapters.layout(slm.model), seed=5))
    objective = objective_of(slm, Adversarial(radius=0.2 if is_attacked else None, steps=2))
    rows = examples([(5, 2), (1, 1), (9, 4)])
    before = objective.measure(rows, 2)
    batch = objective.collate(rows)
    loss = objective(**batch)["loss"]
    loss.backward()
    held = sum(
        p.to_local().numel() for name, p in slm.model.named_parameters() if isinstance(p, DTensor) and ".0." in name
    )
    gradients = [p.grad.numpy() for p in objective.adapter_parameters("slm")]
    return {
        "loss": float(loss.detach()),
        "measured": before["slm_ft"],
        "gradients": np.concatenate([one.ravel() for one in gradients]),
        "adapter": adapters.take(slm.model),
        "held": held / blocks,
        "moved": float(adapters.check_acts(slm.model, [3, 1, 4])),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "is_attacked", "stands"),
    [
        ("gpt2", False, False),
        ("opt", False, False),
        ("llama", False, False),
        ("gpt2", True, False),
        ("llama", True, False),
        ("gpt2", False, True),
        ("llama", False, True),
    ],
)
def test_a_model_spread_over_two_processes_says_and_learns_what_the_whole_one_does(
    family: Family, is_attacked: bool, stands: bool
) -> None:
    whole = said_and_learned(Processes(), family, is_attacked, stands)
    for one in call_together(2, said_and_learned, family, is_attacked, stands):
        assert one["held"] == pytest.approx(0.5, abs=0.01)
        assert whole["held"] == 0
        for name in ("loss", "measured", "moved"):
            assert one[name] == pytest.approx(whole[name], rel=1e-5)
        np.testing.assert_allclose(one["gradients"], whole["gradients"], rtol=0, atol=1e-6)
        assert one["adapter"].keys() == whole["adapter"].keys()
        assert all(np.array_equal(one["adapter"][name], whole["adapter"][name]) for name in whole["adapter"])
