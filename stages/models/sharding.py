"""A frozen base model spread over processes by FSDP2, for one that does not fit a GPU.

Each process keeps its share of the weights of every block, and gathers a block whole for the time of its forward or
backward pass. Embeddings, the head and the adapter stay whole in each: they are small, the head is used apart from the
blocks, and the adapter's gradients are added up as without sharding.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stages.runtime.errors import UsageProblem


def spread(model: PeftModel, device: torch.device, processes: int) -> None:
    """Spread the blocks of a model on the CPU over so many processes, in place; all of it is on the device then.

    No more than one block is whole on the device at a time. Raises UsageProblem for a model whose blocks
    transformers does not name.
    """
    base: Any = model.get_base_model()
    names = set(base._no_split_modules or [])
    blocks = [module for module in base.modules() if type(module).__name__ in names]
    if not blocks:
        message = f"{type(base).__name__} does not say which blocks it is made of, and cannot be spread over processes"
        raise UsageProblem(message, mend="take it out of sharding in machine.toml")
    mesh = init_device_mesh(device.type, (processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=_trained(block))
    spread_out = {parameter for block in blocks for parameter in block.parameters()}
    whole = set(base.base_model.parameters()) - spread_out | _trained(base.base_model)
    fully_shard(base.base_model, mesh=mesh, ignored_params=whole)  # keeps nothing; knows the order of the blocks
    model.to(device)


def _trained(module: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if parameter.requires_grad}
