"""The model that is sheared: the base of [llm], found and checked without its weights, then loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.artefacts.manifest import BaseIdentity
from stages.bases import base_files, base_folders
from stages.bases.base_names import hub_id
from stages.export.exported import stored_dtype
from stages.models.base_loading import check_fits, empty_model, load_model, load_tokenizer, read_configuration
from stages.models.devices import device_of, precision
from stages.models.fused import fuse
from stages.models.identity import identify
from stages.models.tuned import Tuned, context_in
from stages.runtime.errors import UsageProblem
from stages.shearing.blocks import blocks_of
from stages.shearing.neurons import mlps_of
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

WHOSE = "the LLM"


@dataclass(frozen=True)
class Whole:
    """What is known of the whole model before its weights are read."""

    name: str
    folder: Path
    tokenizer: Any
    config: Any
    device: torch.device
    compute: torch.dtype
    kept_in: torch.dtype

    @staticmethod
    def of(workspace: Workspace, layers: int, neurons: int | None = None) -> Whole:
        """The base of [llm], of which so many layers, and neurons of each, can be kept.

        Raises UsageProblem, or as loading would.
        """
        where = workspace.root / AGREEMENT
        if bits := workspace.agreement.llm.quantization:
            message = f"the LLM is agreed to be held in {bits}; a model is made from whole weights"
            mend = "shear in a workspace whose llm.quantization is left out; the result can be named in [slm] of any"
            raise UsageProblem(message, where=where, mend=mend)
        folder = base_folders.folder(workspace, "llm")
        base_files.check(folder, "llm", None)
        config = read_configuration(folder, WHOSE)
        empty = empty_model(config, torch.float32, WHOSE, folder)
        blocks = blocks_of(empty).blocks
        most = len(blocks) - (neurons is None)
        if not 1 <= layers <= most:
            message = f"{layers} layers cannot be kept of a model that has {len(blocks)}"
            mend = f"give --layers from 1 to {most}" if most else "take a deeper model, or give --neurons"
            raise UsageProblem(message, where=folder, mend=mend)
        width = mlps_of(empty)[0].width if neurons is not None else 0
        if neurons is not None and not 1 <= neurons < width:
            message = f"{neurons} neurons cannot be kept of MLPs that have {width}"
            raise UsageProblem(message, where=folder, mend=f"give --neurons from 1 to {width - 1}")
        tokenizer = load_tokenizer(folder, WHOSE)
        check_fits(tokenizer, int(config.get_text_config().vocab_size), WHOSE)
        device = device_of(workspace.machine)
        compute, kept_in = precision(workspace, "llm", device)
        # What is kept in fewer bits than it is stored in could not be written as it was.
        kept_in = kept_in if kept_in == stored_dtype(folder) else torch.float32
        name = hub_id(workspace, "llm") or folder.name  # no path: it stands in the card
        return Whole(name, folder, tokenizer, config, device, compute, kept_in)

    @functools.cached_property
    def identity(self) -> BaseIdentity:
        """By content: reads all weights once."""
        return identify(self.folder, self.tokenizer)

    @property
    def context(self) -> int:
        """The longest sequence it takes, in tokens."""
        return context_in(self.config)

    @property
    def autocast(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.compute == torch.bfloat16

    def load(self) -> Any:
        """The model with its weights, in eval mode."""
        model = load_model(self.folder, WHOSE, dtype=self.kept_in).to(self.device)
        fuse(model)
        return model.eval()

    def tuned(self, model: Any) -> Tuned:
        """The whole model or a cut one, as training takes it: each is taught, or teaches, as "slm"."""
        return Tuned("slm", model, self.tokenizer, self.identity, autocast=self.autocast, longest_packed=0)
