"""What is added to the frozen weights beneath the adapter, as a second, frozen LoRA path: alpha / r B A, exactly.

It is not folded into the weights. In bfloat16 an entry of W has 8 bits, so that most of what is added would be rounded
away; a base in few bits takes nothing at all; and weights that other rounds and methods share would have to be put
back. `disable_adapter` leaves both paths out, and `merge_and_unload` merges both.
"""

from __future__ import annotations

import numpy as np
import torch
from peft import LoraConfig, LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from stages.artefacts.adapter_files import A, B, Tensors, layers_of
from stages.runtime import quiet
from stages.runtime.errors import BadNumbers
from stages.runtime.imports import out_of_sight

NAME = "beneath"
PREFIX = "base_model.model."
"""How PEFT's names of tensors begin."""


def put(model: PeftModel, tensors: Tensors) -> None:
    """Have this and nothing else beneath the adapter; no tensors: nothing. Their layout has been checked.

    Its factor alpha / r is the adapter's own. Every tensor is read back and compared.
    """
    if NAME in model.peft_config:
        model.delete_adapter(NAME)
        _set_active(model, "default")
    if not tensors:
        return
    ranks = {layer.removeprefix(PREFIX): len(tensors[layer + A]) for layer in layers_of(tensors)}
    own = model.peft_config["default"]
    assert isinstance(own, LoraConfig)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=list(ranks),
        r=max(ranks.values()),
        rank_pattern=ranks,
        fan_in_fan_out=own.fan_in_fan_out,
        init_lora_weights=False,
    )
    with quiet.libraries(), out_of_sight("bitsandbytes"):
        model.add_adapter(NAME, config)
    _set_active(model, "default", NAME)
    with torch.no_grad():
        for layer, module in _layers(model).items():
            module.scaling[NAME] = module.scaling["default"]
            for end, one in ((A, module.lora_A[NAME]), (B, module.lora_B[NAME])):
                assert isinstance(one, nn.Linear)
                one.weight.copy_(torch.from_numpy(tensors[layer + end]))
                one.weight.requires_grad_(False)
    arrived = take(model)
    if arrived.keys() != tensors.keys() or any(not np.array_equal(arrived[name], tensors[name]) for name in tensors):
        message = "what is beneath the adapter did not arrive in the model unchanged"
        raise BadNumbers(message, mend="check the versions of peft and torch")


def take(model: PeftModel) -> Tensors:
    """What is beneath the adapter, by the adapter's names, float32, on the CPU; nothing where nothing is."""
    found = Tensors()
    for layer, module in _layers(model).items():
        for end, one in ((A, module.lora_A[NAME]), (B, module.lora_B[NAME])):
            assert isinstance(one, nn.Linear)
            found[layer + end] = one.weight.detach().to("cpu", torch.float32).numpy().copy()
    return found


def _set_active(model: PeftModel, *names: str) -> None:
    """Have the layers add these; PEFT's own model takes one name alone."""
    assert isinstance(model.base_model, LoraModel)
    model.base_model.set_adapter([*names])


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Those of which anything is beneath the adapter, by the names that their tensors begin with."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and NAME in module.lora_A
    }
