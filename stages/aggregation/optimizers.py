"""The server's optimisers: how far theta moves towards what the clients' adapters were combined to.

That is theta_bar, and Delta = theta_bar - theta_t is the server's gradient, with the sign of a step downhill.
FedAdagrad, FedAdam and FedYogi are Algorithm 2 of Reddi et al., 2021 (https://arxiv.org/abs/2003.00295), which corrects
no bias of the first rounds; FedAvgM is of Hsu et al., 2019 (https://arxiv.org/abs/1909.06335).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stages.artefacts.adapter_files import Tensors
from stages.workspace.averaging import Server

Keys = Mapping[str, float]
"""An optimiser's keys of the agreement: Aggregation.server_keys."""


class State(NamedTuple):
    """What is remembered from round to round, of an adapter's names and shapes, float32.

    m: of the changes, m_t; v: of their squares, v_t, at least zero; empty where the optimiser has none.
    """

    m: Tensors
    v: Tensors


class Stepped(NamedTuple):
    """The adapter after a step, float32, what is remembered of it, and two Euclidean norms over all of its numbers."""

    tensors: Tensors
    state: State
    delta_norm: float
    step_norm: float


Array = npt.NDArray[np.float64]
Moment = Callable[[Array, Array, Keys], Array]
"""The next m of the last one and Delta, or the next v of the last one and Delta^2; float64."""


def _with_momentum(m: Array, delta: Array, keys: Keys) -> Array:
    return keys["server_momentum"] * m + delta


def _mean(m: Array, delta: Array, keys: Keys) -> Array:
    return keys["beta_1"] * m + (1 - keys["beta_1"]) * delta


def _adagrad(v: Array, square: Array, _keys: Keys) -> Array:
    return v + square


def _adam(v: Array, square: Array, keys: Keys) -> Array:
    return keys["beta_2"] * v + (1 - keys["beta_2"]) * square


def _yogi(v: Array, square: Array, keys: Keys) -> Array:
    return v - (1 - keys["beta_2"]) * square * np.sign(v - square)


FIRST: dict[Server, Moment] = {"fedavgm": _with_momentum, "fedadagrad": _mean, "fedadam": _mean, "fedyogi": _mean}
SECOND: dict[Server, Moment] = {"fedadagrad": _adagrad, "fedadam": _adam, "fedyogi": _yogi}


def first_state(server: Server, keys: Keys, theta: Tensors) -> State:
    """What is remembered before round 1: m is zero, and v the least that the paper allows, tau^2."""
    m = {name: np.zeros_like(tensor) for name, tensor in theta.items()}
    if server not in SECOND:
        return State(m, {})
    return State(m, {name: np.full_like(tensor, keys["tau"] ** 2) for name, tensor in theta.items()})


def step(server: Server, keys: Keys, theta: Tensors, average: Tensors, before: State) -> Stepped:
    """The next adapter: theta and a step of this optimiser along average - theta. Computed in float64.

    theta, average: of one layout, float32. before: the state that the round before left. What is beyond float32 becomes
    infinite, and is for the caller to find.
    """
    made, m, v, squares = Tensors(), Tensors(), Tensors(), np.zeros(2)
    with np.errstate(over="ignore", invalid="ignore"):
        for name, old in theta.items():
            delta = average[name].astype(np.float64) - old
            first = FIRST[server](before.m[name].astype(np.float64), delta, keys)
            second = None
            if server in SECOND:
                second = SECOND[server](before.v[name].astype(np.float64), np.square(delta), keys)
                v[name] = second.astype(np.float32)
            change = change_by(first, second, keys)
            made[name], m[name] = (old + change).astype(np.float32), first.astype(np.float32)
            squares += np.vdot(delta, delta), np.vdot(change, change)
    delta_norm, step_norm = np.sqrt(squares)
    return Stepped(made, State(m, v), float(delta_norm), float(step_norm))


def change_by(m: Array, v: Array | None, keys: Keys) -> Array:
    """What is added to theta: eta m, or eta m / (sqrt(v) + tau). float64."""
    change = keys["server_learning_rate"] * m
    return change if v is None else change / (np.sqrt(v) + keys["tau"])
