"""Which device a stage computes on, at which precision, and what to do where its memory is full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from stages.models.base_loading import (
    is_out_of_memory,
)
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.workspace.machine import Machine
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role


def device_of(machine: Machine) -> torch.device:
    """The device that a machine's settings ask for. Raises UsageProblem if it has none such."""
    wanted = machine.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    kind = wanted.partition(":")[0]  # the command line shows CUDA the one GPU that was chosen
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UsageProblem(f"there is no device {wanted} here", mend="give --device cpu, or auto")
    return torch.device(kind)


def precision(workspace: Workspace, role: Role, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """The types that a base model computes in and is kept in."""
    wanted = workspace.machine.dtype or workspace.agreement.model_of(role).dtype
    if wanted == "auto":
        wanted = "bfloat16" if _has_fast_bfloat16(device) else "float32"
    compute = torch.bfloat16 if wanted == "bfloat16" else torch.float32
    # bfloat16 weights are faster on a GPU; on a CPU float32 weights under autocast are, and serve evaluation too.
    return compute, compute if device.type == "cuda" else torch.float32


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


MEMORY_KNOBS = (
    "set micro_batch = 1 (or a small number) and gradient_checkpointing = true in machine.toml, "
    "give --dtype bfloat16, or agree on a smaller max_length or evaluation.batch_size"
)


@contextlib.contextmanager
def naming_memory_knobs(mend: str = MEMORY_KNOBS) -> Iterator[None]:
    """Turn running out of memory into BadNumbers that names what needs less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        text = str(error) or type(error).__name__
        raise BadNumbers(f"out of memory: {text.splitlines()[0]}", mend=mend) from error
