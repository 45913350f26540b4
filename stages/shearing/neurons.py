"""The neurons of a decoder's MLPs: what each adds to the hidden states, and a model with fewer of them.

A neuron is a number that one layer of an MLP gives and the next one takes. It is judged as in Minitron (Muralidharan et
al., 2024, https://arxiv.org/abs/2407.14679), by its activation, and by the column that it is multiplied with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report
from stages.shearing.blocks import blocks_of

NAMES = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Qwen, Gemma, Mistral
    (("c_fc",), "c_proj"),  # GPT-2, GPT-Neo
    (("fc1",), "fc2"),  # OPT, Phi
)
"""What layers of MLPs are called: those that give neurons, and the one that takes them."""

WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
"""What configurations call the number of neurons in each MLP."""


class MLP(NamedTuple):
    """One block's MLP: what gives its neurons, and what takes them."""

    givers: list[Any]
    taker: Any

    @property
    def width(self) -> int:
        """How many neurons it has."""
        return int(_weight(self.taker).shape[1])


def _weight(layer: Any) -> Tensor:
    """A layer's weight as [out, in]; a view."""
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def mlps_of(model: Any) -> list[MLP]:
    """The MLP of each block, all of one width. Raises UsageProblem for an architecture that has no such."""
    found = [_mlp_of(block) for block in blocks_of(model).blocks]
    known = [one for one in found if one]
    text = model.config.get_text_config()
    widths = {one.width for one in known}
    if len(known) < len(found) or len(widths) > 1 or not _named(text, widths):
        message = f"how {model.config.model_type} makes the neurons of its MLPs is not known here"
        raise UsageProblem(message, mend="shear it by --layers alone")
    return known


def _mlp_of(block: nn.Module) -> MLP | None:
    """None where there is none, or more than one, as of experts."""
    found = []
    for module in block.modules():
        children = dict(module.named_children())
        for givers, taker in NAMES:
            if {*givers, taker} <= children.keys():
                found.append(MLP([children[name] for name in givers], children[taker]))
    is_plain = len(found) == 1 and all(
        isinstance(one, nn.Linear | Conv1D) for one in [*found[0].givers, found[0].taker]
    )
    return found[0] if is_plain else None


def _named(text: Any, widths: set[int]) -> str:
    """What the configuration calls a width, if it is one number there; None is four times the hidden size."""
    for name in WIDTHS:
        if hasattr(text, name) and getattr(text, name) in {*widths, None}:
            return name
    return ""


@torch.no_grad()
def norms(model: Any, rows: Sequence[list[int]], *, autocast: bool, report: Report) -> list[Tensor]:
    """Of each block, [neurons]: the norm of what each neuron adds to the hidden states, over all tokens of the rows."""
    mlps = mlps_of(model)
    squares = [torch.zeros(mlp.width, dtype=torch.float64) for mlp in mlps]

    def watch(number: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares[number] += args[0].double().square().reshape(-1, mlps[number].width).sum(0).cpu()

        return before

    with ExitStack() as stack:
        for number, mlp in enumerate(mlps):
            stack.callback(mlp.taker.register_forward_pre_hook(watch(number)).remove)
        for done, row in enumerate(rows, start=1):
            ids = torch.tensor([row], device=model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                model.base_model(input_ids=ids, use_cache=False)
            report(Event("step", step=done, total=len(rows)))
    return [
        total.sqrt() * _weight(mlp.taker).double().norm(dim=0).cpu() for total, mlp in zip(squares, mlps, strict=True)
    ]


@torch.no_grad()
def narrow(model: Any, norms: Sequence[Tensor], neurons: int) -> None:
    """Keep in each block's MLP so many neurons, those of the largest norms, in their order; of equal ones the first."""
    for mlp, norm in zip(mlps_of(model), norms, strict=True):
        order = torch.sort(norm, descending=True, stable=True).indices
        kept = order[:neurons].sort().values.to(mlp.taker.weight.device)
        for giver in mlp.givers:
            _keep(giver, kept, of_outputs=True)
        _keep(mlp.taker, kept, of_outputs=False)
    narrow_configuration(model.config, neurons)


def _keep(layer: Any, kept: Tensor, *, of_outputs: bool) -> None:
    dim = int(of_outputs == isinstance(layer, Conv1D))  # Linear has [out, in], Conv1D the other way round
    layer.weight = nn.Parameter(layer.weight.index_select(dim, kept).contiguous())
    if of_outputs and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.index_select(0, kept))
    outputs, inputs = _weight(layer).shape
    if isinstance(layer, Conv1D):
        layer.nf, layer.nx = outputs, inputs
    else:
        layer.out_features, layer.in_features = outputs, inputs


def narrow_configuration(config: Any, neurons: int) -> None:
    """Make a configuration that of so many neurons in each MLP."""
    text = config.get_text_config()
    for name in WIDTHS:
        if hasattr(text, name):
            setattr(text, name, neurons)
