"""Frozen weights held in bfloat16 while a stage computes in it, instead of being cast in every step.

Autocast casts a weight each time that it is used, and keeps what it cast only where the weight trains: of a LoRA step
in bfloat16 on a CPU that was a fifth to a half. Held, the same numbers meet the same operations: logits, losses and
gradients are the same to the bit, which is tried out on a few tokens. Elsewhere, scoring above all, the weights are
float32 as ever. On a CPU they are also laid out for its instructions once (`prepacked`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stages.data.examples import Example
from stages.models import prepacked
from stages.models.packing import answer_logits, padded
from stages.models.tuned import Tuned

PROBE = Example([3, 1, 4, 1, 5, 9, 2], 3)
HARDLY = 1.25
"""Times the distance to float32 that two ways of rounding may differ by on so few tokens."""


@contextmanager
def held_in_bfloat16(*models: Tuned) -> Iterator[None]:
    """Inside, what autocast would cast again and again is cast once; outside, all is as it was, to the bit.

    Changes nothing of a model that computes in float32, nor of one that would say something else than `_hold` allows.
    """
    with ExitStack() as stack:
        for tuned in models:
            if tuned.autocast:
                _hold(tuned, stack)
        yield


def _hold(tuned: Tuned, stack: ExitStack) -> None:
    """Cast a model's weights, laid out for the processor or not, until the stack closes; or neither.

    Another layout may add in another order: then what comes out may be hardly further from float32 than it was.
    """
    before = _said(tuned)
    can_pack = any(prepacked.takes(layer) for layer, _ in castable(tuned.model))
    for packs in (True, False) if can_pack else (False,):
        with ExitStack() as one:
            one.enter_context(cast(tuned.model, packs=packs))
            found = _said_if_at_all(tuned)
            if found is not None and torch.equal(found, before):
                stack.push(one.pop_all())
                return
        if packs and found is not None:
            exact = _said(tuned, autocast=False)
            if (found - exact).norm() <= HARDLY * (before - exact).norm():
                stack.enter_context(cast(tuned.model, packs=True))
                return


@contextmanager
def cast(model: nn.Module, *, packs: bool = False) -> Iterator[None]:
    """Hold a model's frozen linear weights in bfloat16, and keep LoRA from casting what it is given there and back.

    But not where it drops out: that is done in float32, in which 1 / (1 - p) is not rounded to bfloat16. packs: lay
    them out for the processor too, where that can be. Then a layer's own weight is NaN, as nothing may read it.
    """
    shared = _shared(model)
    with ExitStack() as undo:
        for layer, name in castable(model):
            weight = getattr(layer, name)
            short = weight.data.bfloat16()
            is_kept = weight.is_meta or id(weight) in shared or not torch.equal(short.float(), weight)
            product = None
            if packs and name == "weight" and prepacked.takes(layer):
                layer.forward = product = prepacked.Prepacked(layer, short)
                short = short.new_full((), torch.nan).expand(short.shape)
            setattr(layer, name, nn.Parameter(short, requires_grad=False))
            undo.callback(_restore, layer, name, weight if is_kept else None, product)
        for module in model.modules():
            if isinstance(module, LoraLayer) and not _drops_out(module):
                undo.callback(setattr, module, "cast_input_dtype_enabled", module.cast_input_dtype_enabled)
                module.cast_input_dtype_enabled = False
        yield


def _drops_out(layer: LoraLayer) -> bool:
    return any(isinstance(one, nn.Dropout) for one in layer.lora_dropout.values())


def castable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The layers and names of the weights that `cast` casts: not of layers in few bits, nor spread over processes.

    Of a layer in few bits bitsandbytes casts the bias too, as it sees fit.
    """
    return [
        (layer, name)
        for layer in model.modules()
        if isinstance(layer, nn.Linear | Conv1D) and type(layer.weight) is nn.Parameter
        for name, weight in layer.named_parameters(recurse=False)
        if weight.dtype == torch.float32 and not weight.requires_grad
    ]


def _shared(model: nn.Module) -> set[int]:
    """The weights that more than one layer has, such as a head tied to the embedding, by id."""
    counts = Counter(id(weight) for layer in model.modules() for weight in layer.parameters(recurse=False))
    return {key for key, count in counts.items() if count > 1}


def _restore(layer: nn.Module, name: str, weight: nn.Parameter | None, product: prepacked.Prepacked | None) -> None:
    """Put a weight back; None: it is what bfloat16 holds, as of most published models, and was not kept beside it."""
    if product is not None:
        del layer.forward
    if weight is None:
        short = getattr(layer, name).data if product is None else product.weight()
        weight = nn.Parameter(short.float(), requires_grad=False)
    setattr(layer, name, weight)


def _said_if_at_all(tuned: Tuned) -> Tensor | None:
    try:
        return _said(tuned)
    except RuntimeError:  # a layer that autocast does not reach meets two types
        return None


@torch.no_grad()
def _said(tuned: Tuned, *, autocast: bool = True) -> Tensor:
    """The logits of the probe, in eval mode, float32."""
    model, was_training = tuned.model, tuned.model.training
    model.eval()
    batch = {name: tensor.to(model.device) for name, tensor in padded([PROBE]).items()}
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
            return answer_logits(model, batch).float()
    finally:
        model.train(was_training)
