"""The blocks of a decoder: where they stand, how much each of them does, and a model of some of them.

What a block does is measured as in ShortGPT (Men et al., 2024, https://arxiv.org/abs/2403.03853), Eq. 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report

NOT_BY_BLOCK = ("architectures", "token_id", "token_ids", "token_index")
"""Endings of the names of lists in a configuration whose items are no blocks, however many they are."""

NUMBERS = ("layer_idx", "layer_id")
"""What modules call the number of the block that they stand in."""


class Blocks(NamedTuple):
    """The list of a model's blocks, and which attribute of which of its modules it is."""

    path: str
    name: str
    blocks: nn.ModuleList


def blocks_of(model: Any) -> Blocks:
    """The one list of as many modules as the configuration has layers. Raises UsageProblem if there is none such."""
    count = model.config.get_text_config().num_hidden_layers
    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)  # such as the experts of one block
        if isinstance(module, nn.ModuleList) and len(module) == count and not is_inside:
            found.append(name)
    if len(found) != 1:
        what = "no list" if not found else f"{len(found)} lists"
        message = f"the LLM's architecture ({model.config.model_type}) has {what} of {count} layers to choose from"
        raise UsageProblem(message, mend="shear a model whose layers stand in one list: GPT-2, OPT, Llama, Qwen, Gemma")
    path, _, name = found[0].rpartition(".")
    return Blocks(path, name, model.get_submodule(found[0]))


@torch.no_grad()
def influence(model: Any, rows: Sequence[list[int]], *, autocast: bool, report: Report) -> list[float]:
    """Of each block, 1 - the mean cosine between the hidden states before and after it, over all tokens of the rows."""
    blocks = blocks_of(model).blocks
    apart = torch.zeros(len(blocks), dtype=torch.float64)

    def watch(number: int) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            behind = output[0] if isinstance(output, tuple) else output
            cosine: Tensor = F.cosine_similarity(before.float(), behind.float(), dim=-1)
            apart[number] += (1 - cosine).sum(dtype=torch.float64).cpu()

        return after

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(watch(number), with_kwargs=True).remove)
        for done, row in enumerate(rows, start=1):
            ids = torch.tensor([row], device=model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                model.base_model(input_ids=ids, use_cache=False)
            report(Event("step", step=done, total=len(rows)))
    found: list[float] = (apart / sum(map(len, rows))).tolist()
    return found


def most_influential(influence: Sequence[float], layers: int) -> list[int]:
    """The numbers of so many blocks, from 0, in their order; of equal ones the later go first."""
    by_influence = sorted(range(len(influence)), key=lambda block: (-influence[block], block))
    return sorted(by_influence[:layers])


def shortened(model: Any, kept: Sequence[int]) -> Any:
    """A copy of a model with these of its blocks alone, numbered anew; it shares nothing with the whole."""
    path, name, blocks = blocks_of(model)
    parent = model.get_submodule(path)
    setattr(parent, name, nn.ModuleList(blocks[number] for number in kept))
    try:
        cut = copy.deepcopy(model)  # of what is kept alone
    finally:
        setattr(parent, name, blocks)
    for number, block in enumerate(getattr(cut.get_submodule(path), name)):
        for module in block.modules():
            for name_of_number in NUMBERS:
                if isinstance(getattr(module, name_of_number, None), int):
                    setattr(module, name_of_number, number)
    shorten(cut.config, kept)
    return cut


def shorten(config: Any, kept: Sequence[int]) -> None:
    """Make a configuration that of these layers alone: their number, and every list that has an item for each."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count and not name.endswith(NOT_BY_BLOCK):
            setattr(text, name, [value[number] for number in kept])
    text.num_hidden_layers = len(kept)
