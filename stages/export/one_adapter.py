"""An adapter and what it stands on as one adapter, which PEFT, vLLM and lm-eval load: their products are added up."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from stages.artefacts.adapter_files import A, B, Tensors, layers_of, loaded, weights_bytes
from stages.artefacts.reading import Artefact
from stages.files import reading
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RESIDUAL


def one_adapter(adapter: Artefact) -> tuple[dict[str, Any], bytes]:
    """The configuration and the weights of an adapter that was read; without anything beneath it, byte for byte.

    Else A and B are those of both, side by side. Layers of a smaller rank are filled up with zeros, since not all who
    load an adapter know of ranks by layer; the rank is one at which alpha is a whole number and alpha / r the same.
    """
    config = reading.parse_json(adapter.contents[ADAPTER_CONFIG])
    content = adapter.contents[ADAPTER_WEIGHTS]
    beneath = loaded(adapter.contents[RESIDUAL], Path(RESIDUAL)) if RESIDUAL in adapter.contents else {}
    if not beneath:
        return config, content
    rank, alpha = int(config["r"]), int(config["lora_alpha"])
    step = rank // gcd(rank, alpha)
    most = rank + max(len(beneath[layer + A]) for layer in layers_of(beneath))
    whole = -(-most // step) * step
    tensors = loaded(content, Path(ADAPTER_WEIGHTS))
    joined = Tensors()
    for name, tensor in tensors.items():
        joined[name] = tensor
        if name.endswith((A, B)):
            axis = 0 if name.endswith(A) else 1
            both = np.concatenate([tensor, beneath[name]], axis) if name in beneath else tensor
            rest = [(0, whole - size if number == axis else 0) for number, size in enumerate(both.shape)]
            joined[name] = np.pad(both, rest)
    return config | {"r": whole, "lora_alpha": alpha * whole // rank}, weights_bytes(joined)
