"""Bases held in 4 or 8 bits by bitsandbytes, for models that do not fit otherwise. Adapters stay float32.

"4bit" is NF4 in blocks of 64 with the blocks' scales quantised too (QLoRA, Dettmers et al., 2023), about 0.52 bytes a
weight; "8bit" is LLM.int8() (Dettmers et al., 2022), one byte a weight. Of a model its linear layers are so held, not
its embeddings, its norms and its output layer.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from stages.runtime import quiet
from stages.runtime.errors import UsageProblem
from stages.workspace.settings import Quantization, Role

INSTALL = "pip install 'fedcollm[quant]'"


def loading(
    role: Role, quantization: Quantization | None, compute: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What from_pretrained takes beside the rest, to load a base so. Raises UsageProblem where that cannot be done.

    compute: what a layer's weights are taken back to when it is computed.
    """
    if quantization is None:
        return {}
    wanted = f'{role}.quantization = "{quantization}"'
    if not is_installed():
        raise UsageProblem(f"{wanted} needs bitsandbytes, which is not installed", mend=INSTALL)
    with quiet.libraries():
        import bitsandbytes
        from peft import import_utils as in_peft
        from transformers import BitsAndBytesConfig
        from transformers.utils import import_utils as in_transformers

    # Until now both may have taken it to be absent, see runtime.imports, and remember that.
    for is_there in (
        in_peft.is_bnb_available,
        in_peft.is_bnb_4bit_available,
        in_transformers.is_bitsandbytes_available,
    ):
        is_there.cache_clear()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which tells of every layer that it casts to float16

    if device.type not in bitsandbytes.supported_torch_devices:
        mend = f"give --device cuda or cpu, or agree to leave {role}.quantization out"
        raise UsageProblem(f"{wanted}: bitsandbytes has nothing for the device {device.type}", mend=mend)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings["bnb_4bit_compute_dtype"] = compute
    config: Any = BitsAndBytesConfig
    place = torch.cuda.current_device() if device.type == "cuda" else device.type  # as transformers itself would say
    return {"quantization_config": config(**settings), "device_map": {"": place}}


def is_installed() -> bool:
    """Whether bitsandbytes is on this machine."""
    return importlib.util.find_spec("bitsandbytes") is not None


def never_repack(model: Any) -> None:
    """Have a CPU with AVX-512 bfloat16 compute a 4-bit model as any other device does.

    There bitsandbytes repacks a layer for good in its first forward pass in eval mode. It then computes in bfloat16,
    and passes no gradient on, in training mode either: adapters below it would silently learn nothing.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
