"""A model made ready to be asked: its adapter proven to act, or left out, in the precision that is agreed on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from stages.data.tasks import HARMLESS
from stages.evaluation.harness import Harness
from stages.models import adapters
from stages.models.devices import naming_memory_knobs
from stages.models.held import held_in_bfloat16
from stages.models.identity import PROBE_TEXTS
from stages.models.tuned import Tuned
from stages.runtime import quiet
from stages.runtime.events import Report
from stages.runtime.processes import ALONE, Processes


@contextlib.contextmanager
def asking(
    tuned: Tuned,
    *,
    with_adapter: bool,
    batch_size: int,
    as_trained: bool = False,
    processes: Processes = ALONE,
    shares: bool = True,
    report: Report,
) -> Iterator[Harness]:
    """Inside, lm-eval's view of a model, without dropout, lm-eval's own talk told as warnings.

    with_adapter: the base with its adapter, after proof that the adapter changes the logits; else the base alone.
    as_trained: compute as training does, with probabilities in float32; else all as the weights are held.
    processes: each does its share of the work, unless shares is False.
    """
    model = tuned.model
    was_training = model.training
    model.eval()
    scope = contextlib.nullcontext() if with_adapter else model.disable_adapter()
    computing = _as_trained(tuned) if as_trained else contextlib.nullcontext()
    probe = tuned.tokenizer.encode(PROBE_TEXTS[0])[: tuned.context]
    if with_adapter:
        adapters.check_acts(model, probe)
    telling = quiet.telling(report, "lm_eval", but_for=HARMLESS)
    with naming_memory_knobs(), scope, computing, quiet.libraries(), telling:
        adapters.logits(model, probe)  # which raises if they are no numbers
        precision = {"mixed_precision_dtype": "bfloat16" if as_trained and tuned.autocast else None}
        precision["softmax_dtype"] = "float32" if as_trained else None
        lm = Harness(pretrained=model.get_base_model(), tokenizer=tuned.tokenizer, batch_size=batch_size, **precision)
        lm.report, lm.processes, lm.shares = report, processes, shares
        yield lm
    model.train(was_training)


@contextlib.contextmanager
def _as_trained(tuned: Tuned) -> Iterator[None]:
    """Inside, a model computes as it does in training."""
    with held_in_bfloat16(tuned), torch.autocast(tuned.model.device.type, torch.bfloat16, enabled=tuned.autocast):
        yield
