"""Clients of a smaller rank: what they begin with is the nearest to the broadcast that they can hold.

As FlexLoRA has it (Bai et al., 2024, https://arxiv.org/abs/2402.11505): the server averages products, whatever the
ranks of their factors, and each client takes the average at its own.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from threadpoolctl import threadpool_limits

from stages.aggregation.products import best_of_rank
from stages.artefacts.adapter_files import A, B, config_bytes, layers_of, modules_of, read_adapter, weights_bytes
from stages.artefacts.reading import Artefact
from stages.files import reading
from stages.workspace.agreement import Lora
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def at_rank_of(theta: Artefact, lora: Lora) -> Artefact:
    """An adapter at the rank of a client: of all BA of that rank the nearest to its BA, in each layer.

    It has this shape already where it is the client's own, or all have one rank.
    """
    if theta.manifest.lora.r == lora.r:
        return theta
    wide = read_adapter(theta, None, theta.manifest.lora)
    made, one = dict(wide), np.ones(1)
    with threadpool_limits(1, "blas"):  # the same bits, however many threads there are
        for layer in layers_of(wide):
            a, b = wide[layer + A][None], wide[layer + B][None]
            made[layer + A], made[layer + B], _ = best_of_rank(a, b, one, lora.r)
    is_turned = bool(reading.parse_json(theta.contents[ADAPTER_CONFIG])["fan_in_fan_out"])
    config = config_bytes(lora, target_modules=modules_of(theta), fan_in_fan_out=is_turned)
    return replace(theta, contents=theta.contents | {ADAPTER_CONFIG: config, ADAPTER_WEIGHTS: weights_bytes(made)})
