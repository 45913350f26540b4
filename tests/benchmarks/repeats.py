"""How repeated figures are shown, and on what processor they were taken."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median

CPU_INFO = Path("/proc/cpuinfo")


def shown(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and the smallest and the largest."""
    low, middle, high = (format(value, form) for value in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def processor() -> str:
    """Its name, how many threads torch computes with, and the fastest instructions that torch finds in it."""
    import torch

    has = {
        "amx": torch.cpu._is_amx_tile_supported,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
        "avx512": torch.cpu._is_avx512_supported,
        "avx2": torch.cpu._is_avx2_supported,
    }
    found = [name for name, is_there in has.items() if is_there()]
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {', '.join(found) or 'no vector instructions that count here'}"
