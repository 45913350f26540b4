"""Base models with their adapters in form only: parameters and bytes, counted on the meta device, no weights read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from stages.artefacts.adapter_files import Layout
from stages.bases import base_files, base_folders
from stages.models import adapters, base_loading
from stages.models.fused import fuse
from stages.models.held import castable
from stages.models.tuned import context_of
from stages.paper import reported
from stages.runtime.errors import NotReady
from stages.workspace.agreement import Lora, Model
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace
from stages.workspace.settings import Quantization, Role

FLOAT32_BYTES = 4
DTYPE_BYTES = {"float32": FLOAT32_BYTES, "float16": 2, "bfloat16": 2}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHIPPED = "shipped with fedcollm"


@dataclass(frozen=True)
class Shape:
    """A base model with its adapter, in form only.

    stored_dtype: of the weights as they were published, where that is known. came_from: where its configuration lies.
    quantization: how its linear layers are held once loaded; in the model here they are as they would be without.
    """

    model: PeftModel
    parameters: int
    layout: Layout
    stored_dtype: str | None
    came_from: str
    quantization: Quantization | None = None

    @property
    def adapter_parameters(self) -> int:
        """What travels, or is trained."""
        return adapters.count(self.model)

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return context_of(self.model)


def of_workspace(workspace: Workspace, role: Role, dtype: torch.dtype = torch.float32) -> Shape:
    """The agreed model, by the configuration that is here, or else the shipped one of a base model of the paper.

    Raises NotReady where there is neither, and what loading it would, as far as that is known without its weights.
    """
    settings = workspace.agreement.model_of(role)
    shipped = None if base_folders.own_folder(workspace, role) else reported.checkpoints().get(settings.model)
    if found := base_folders.configuration(workspace, role):
        base_loading.check_unread(found, role, settings.quantization)
        config = base_loading.read_configuration(found, f"the {role.upper()}")
        stored = _stored_dtype(found, config) or (shipped.stored_dtype if shipped else None)
        came_from = workspace.shown(found / "config.json")
    elif shipped:
        config, stored, came_from = AutoConfig.for_model(**shipped.config), shipped.stored_dtype, SHIPPED
    else:
        message = f"the configuration of the {role.upper()} {settings.model} is not here"
        raise NotReady(message, mend=base_folders.fetching(workspace, role))
    return _shape(config, settings, dtype, workspace, stored=stored, came_from=came_from)


def _stored_dtype(folder: Path, config: Any) -> str | None:
    """The type of the largest tensor of the weights, if they are here as safetensors; else what the configuration says.

    Weights are not read, only the header that describes them.
    """
    for path in base_files.weight_files(folder):
        if path.suffix == ".safetensors" and (tensors := base_files.headers(path)):
            dtype, _ = max(tensors.values(), key=lambda one: math.prod(one[1]))
            return DTYPE_NAMES.get(dtype)
    said = config.dtype
    return None if said is None else str(said).removeprefix("torch.")


def of_paper(setting: str, role: Role) -> Shape:
    """A base model of the paper with the adapter of its setting: s1, s2 or s3."""
    preset = reported.SETTINGS[setting]
    checkpoint = reported.checkpoints()[preset.slm if role == "slm" else preset.llm]
    lora = Lora(r=preset.rank, alpha=2 * preset.rank, target_modules=list(preset.target_modules))
    settings = Model(model=checkpoint.model, lora=lora)
    config = AutoConfig.for_model(**checkpoint.config)
    return _shape(config, settings, torch.float32, None, stored=checkpoint.stored_dtype, came_from=SHIPPED)


def _shape(
    config: Any, settings: Model, dtype: torch.dtype, workspace: Workspace | None, *, stored: str | None, came_from: str
) -> Shape:
    base = base_loading.empty_model(config, dtype, f"the model {settings.model}", None)
    base.config.use_cache = False
    fuse(base)
    if workspace and workspace.machine.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = sum(parameter.numel() for parameter in base.parameters())
    with torch.device("meta"):
        model = adapters.attach(base, settings, where=workspace.root / AGREEMENT if workspace else None)
    return Shape(model, parameters, adapters.layout(model), stored, came_from, settings.quantization)


def weight_bytes(shape: Shape) -> int:
    """The base's weights as they are held in memory; the adapter not counted."""
    frozen = sum(parameter.nbytes for parameter in shape.model.parameters() if not parameter.requires_grad)
    less: int = sum(layer.weight.nbytes - _held_bytes(layer, shape.quantization) for layer in _quantized(shape))
    return frozen - less


def held_bytes(shape: Shape, compute: torch.dtype, device: torch.device) -> int:
    """What a stage that computes in bfloat16 holds beside float32 weights; of weights published so, nothing.

    On a CPU they are laid out for both ways, there and back, which is as much as float32.
    """
    if compute != torch.bfloat16 or shape.stored_dtype == "bfloat16":
        return 0
    copies = 2 if device.type == "cpu" else 1
    weights = [getattr(layer, name) for layer, name in castable(shape.model)]
    return sum(copies * compute.itemsize * weight.numel() for weight in weights)


def unpacked_bytes(shape: Shape, compute: torch.dtype) -> int:
    """Of a base in few bits, its largest layer, which is taken back to full weights whenever it is computed."""
    largest: int = max((layer.weight.numel() for layer in _quantized(shape)), default=0)
    return largest * compute.itemsize


def _quantized(shape: Shape) -> list[Any]:
    """The layers that are held in few bits: the linear ones, but not the output layer nor adapters."""
    if shape.quantization is None:
        return []
    output = shape.model.get_output_embeddings()
    linear = [one for one in shape.model.modules() if isinstance(one, nn.Linear | Conv1D) and one is not output]
    return [one for one in linear if not one.weight.requires_grad]


def _held_bytes(layer: Any, quantization: Quantization | None) -> int:
    """As bitsandbytes holds it.

    4 bits and a byte for each 64 weights, with a float32 for 256 such; or a byte, and a float32 for each output.
    """
    count: int = layer.weight.numel()
    if quantization == "8bit":
        outputs: int = layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
        return count + FLOAT32_BYTES * outputs
    return count // 2 + count // 64 + FLOAT32_BYTES * -(-count // (64 * 256))


def file_bytes(layout: Layout) -> int:
    """The size of adapter_model.safetensors: a length of 8 bytes, a header padded to 8, and float32 values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(layout):
        start, end = end, end + FLOAT32_BYTES * torch.Size(layout[name]).numel()
        header[name] = {"dtype": "F32", "shape": list(layout[name]), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end
