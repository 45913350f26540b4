"""LoRA adapters on a loaded base: attached, made fresh from a seed, put in strictly, taken out, proven to act."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.artefacts.adapter_files import Layout, Tensors, check_finite, config_bytes, numbers_in, weights_bytes
from stages.runtime import quiet
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.runtime.imports import out_of_sight
from stages.workspace.agreement import Lora, Model
from stages.workspace.averaging import Factors
from stages.workspace.commands import Command
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def attach(base: PreTrainedModel, settings: Model, *, where: Path | None = None) -> PeftModel:
    """The base, frozen, with a LoRA adapter of the agreed shape; only the adapter is trainable, in float32.

    where: the settings' file. Raises UsageProblem if the target modules do not exist, naming those that do.
    """
    lora = settings.lora
    _check_targets(base, lora.target_modules, where)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or None,
    )
    try:
        # PEFT sets fan_in_fan_out for Conv1D and warns of it; and of any model it asks for bitsandbytes, which has been
        # imported where the base is in few bits.
        with quiet.libraries(), out_of_sight("bitsandbytes"):
            model = get_peft_model(base, config)
    except ValueError as error:
        wanted = lora.target_modules or "PEFT's default"
        message = f"target_modules {wanted} do not fit {base.config.model_type}: {error}"
        raise UsageProblem(message, where=where, mend=_among(base)) from error
    assert isinstance(model, PeftModel)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module in (model.get_input_embeddings(), model.get_output_embeddings()):
            message = f"target_modules include {name.rpartition('.')[2]}: embeddings tell which tokens the data holds"
            raise UsageProblem(message, where=where, mend="name attention and MLP layers in lora.target_modules")
    return model


def _check_targets(base: PreTrainedModel, targets: list[str], where: Path | None) -> None:
    """Raise UsageProblem unless each name fits linear layers alone, in all blocks of a stack or in none, and once.

    PEFT passes over a name that fits nothing as long as another fits, and the parties train less than was agreed.
    """
    stacks = _stacks(base)
    for target in targets:
        fitting = {name: module for name, module in base.named_modules() if f".{name}".endswith(f".{target}")}
        problem = ""
        if not target or not fitting:
            problem = f"{target!r} fits no layer"
        elif targets.count(target) > 1:
            problem = f"{target} is named {targets.count(target)} times"
        elif other := next((name for name, one in fitting.items() if not _takes_lora(one)), ""):
            problem = f"{target} fits {other}, which is no linear layer but {type(fitting[other]).__name__}"
        for stack, size in stacks.items():
            blocks = {name.removeprefix(f"{stack}.").split(".")[0] for name in fitting if name.startswith(f"{stack}.")}
            if not problem and blocks and len(blocks) < size:
                problem = f"{target} fits {len(blocks)} of the {size} layers in {stack}"
        if problem:
            message = f"target_modules {targets} do not fit {base.config.model_type}: {problem}"
            raise UsageProblem(message, where=where, mend=_among(base))


def _stacks(base: PreTrainedModel) -> dict[str, int]:
    """The outermost lists of blocks, by name, and how many blocks each has."""
    found: dict[str, int] = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{stack}.") for stack in found):
            found[name] = len(module)
    return found


def _among(base: PreTrainedModel) -> str:
    """What could be named instead: linear layers that each block has; never what lies outside, such as lm_head."""
    layers: dict[str, set[tuple[str, str]]] = {}
    stacks = _stacks(base)
    for name, module in base.named_modules():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is not None and _takes_lora(module):
            blocks = layers.setdefault(name.rpartition(".")[2], set())
            blocks.add((stack, name.removeprefix(f"{stack}.").split(".")[0]))
    everywhere = [
        layer
        for layer, blocks in layers.items()
        if all(sum(one == stack for one, _ in blocks) in (0, size) for stack, size in stacks.items())
    ]
    return f"set lora.target_modules among: {', '.join(sorted(everywhere))}"


def _takes_lora(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)  # those in few bits are such too


def make_fresh(model: PeftModel, seed: int) -> None:
    """Set the adapter to PEFT's initialisation (A random, B = 0) drawn from seed: the same wherever it is drawn."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if not isinstance(module, LoraLayer):
                continue
            a, b = module.lora_A["default"], module.lora_B["default"]
            assert isinstance(a, nn.Linear)
            assert isinstance(b, nn.Linear)
            a.weight.copy_(nn.init.kaiming_uniform_(torch.empty(a.weight.shape), a=5**0.5))
            b.weight.zero_()


def train_only(model: PeftModel, factors: Factors) -> None:
    """Have A, B or both trainable, and the other one frozen."""
    for name, parameter in model.named_parameters():
        which, _, whose = name.partition(".lora_")[2].partition(".")
        if which in ("A", "B"):
            parameter.requires_grad_(factors in (which, "AB") and whose.startswith("default."))


def take(model: PeftModel) -> Tensors:
    """The adapter's tensors by their PEFT names, float32, on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", torch.float32).numpy().copy() for name, tensor in state.items()}


def layout(model: PeftModel) -> Layout:
    """The names and shapes that an adapter for this model must have."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def put(model: PeftModel, tensors: Tensors) -> None:
    """Set the adapter to these tensors, whose layout has been checked, and prove that they arrived.

    PEFT only warns about what it could not place; here every tensor is read back and compared.
    """
    set_peft_model_state_dict(model, {name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    arrived = take(model)
    if arrived.keys() != tensors.keys() or any(not np.array_equal(arrived[name], tensors[name]) for name in tensors):
        raise BadNumbers(
            "the adapter did not arrive in the model unchanged", mend="check the versions of peft and torch"
        )


def as_files(model: PeftModel, lora: Lora) -> dict[str, bytes]:
    """The adapter as the two files that PEFT reads; checked to be finite."""
    tensors = take(model)
    check_finite(tensors, "the trained adapter")
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return {
        ADAPTER_CONFIG: config_bytes(lora, target_modules=modules(model), fan_in_fan_out=config.fan_in_fan_out),
        ADAPTER_WEIGHTS: weights_bytes(tensors),
    }


def modules(model: PeftModel) -> list[str]:
    """The names of the layers with an adapter, as PEFT resolved them: its defaults filled in."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    named = config.target_modules or []
    if not isinstance(named, str):
        return sorted(named)
    # A pattern, which is PEFT's default for some architectures.
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)})


def count(model: PeftModel) -> int:
    """The number of the adapter's parameters: what travels, Table 3."""
    return numbers_in(layout(model))


TRAIN_MORE = "train more steps, or raise the learning rate"


def check_trained(before: Tensors, after: Tensors) -> dict[str, float]:
    """Prove that training did something: B is not zero and the adapter has moved. Returns the norms, for the manifest.

    Raises BadNumbers naming what failed. (Systems have shipped the untrained adapter, or one of zeros, unnoticed.)
    """
    moved = _distance(before, after)
    size_b = float(np.sqrt(sum(np.sum(after[name].astype(np.float64) ** 2) for name in after if "lora_B" in name)))
    if changes_nothing(after):
        raise BadNumbers(
            "the trained adapter's B is all zero: it changes nothing",
            mend=TRAIN_MORE,
        )
    if moved == 0:
        raise BadNumbers("training left the adapter where it was", mend=TRAIN_MORE)
    return {"update_norm": moved, "lora_b_norm": size_b}


def check_can_train_a(start: Tensors, round: int) -> None:
    """Raise BadNumbers where A alone is to be trained and B is zero, as after a round of B that was given up."""
    if changes_nothing(start):
        message = f"B is zero in the broadcast of round {round}, in which clients train A alone: in vain"
        keep_old = Command("aggregate", round=round, keep_old=True)
        raise BadNumbers(message, mend=f"on the server: {keep_old}; B has its turn in the next round")


def changes_nothing(tensors: Tensors) -> bool:
    """Whether an adapter's B is all zero, as that of a fresh one: BA is then zero."""
    return not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def shortened(before: Tensors, after: Tensors, largest: float) -> Tensors:
    """The adapter after a change of at most this norm (L2, of all tensors as one vector) in the same direction."""
    share = np.float32(min(1.0, largest / _distance(before, after)))
    return {name: before[name] + share * (after[name] - before[name]) for name in after}


def _distance(before: Tensors, after: Tensors) -> float:
    return float(np.sqrt(sum(np.sum((after[name] - before[name]).astype(np.float64) ** 2) for name in after)))


NO_SETTING_OF_TRAINING = (
    "compute with --dtype float32; should that not help, take another base: the learning rate is not it"
)
"""The mend where a model says NaN before anything was trained."""


@torch.no_grad()
def logits(model: PeftModel | PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """What the model says to one text, without dropout: [length, vocabulary], float32, on the CPU.

    Raises BadNumbers if that is no number, whatever the weights are: of NaN nothing can be compared or chosen.
    """
    was_training = model.training
    model.eval()
    found: torch.Tensor = model(input_ids=torch.tensor([token_ids], device=model.device)).logits[0]
    model.train(was_training)
    if bool(torch.isnan(found).any()) or bool(torch.isposinf(found).any()):
        raise BadNumbers("the model's logits are NaN or infinite", mend=NO_SETTING_OF_TRAINING)
    return found.float().cpu()


def check_acts(model: PeftModel, token_ids: list[int]) -> float:
    """Prove that the adapter changes the logits. Returns the largest change; raises BadNumbers if it is none."""
    with_adapter = logits(model, token_ids)
    with model.disable_adapter():
        without = logits(model, token_ids)
    change = float((with_adapter - without).abs().max())
    if not change > 0:
        raise BadNumbers("the adapter does not change the model: its logits are the base's", mend="train it first")
    return change
