"""The server's optimisers: by the papers' formulas over several rounds, written out number by number; their file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import random_adapter
from stages.aggregation import optimizers
from stages.aggregation.optimizers import State
from stages.aggregation.server_state import read_state, state_bytes
from stages.artefacts.adapter_files import Tensors, layout_of
from stages.runtime.errors import BadNumbers, Damaged
from stages.workspace.averaging import Aggregation, Server

LAYOUT = {f"h.{i}.lora_{which}.weight": shape for i in (0, 1) for which, shape in (("A", (2, 6)), ("B", (5, 2)))}
ADAPTIVE: tuple[Server, ...] = ("fedadagrad", "fedadam", "fedyogi")
ROUNDS = 5
PLACE = Path("server_state.safetensors")


def keys_of(server: Server, **given: float) -> dict[str, float]:
    return Aggregation.model_validate({"server": server, **given}).server_keys


def averages() -> list[Tensors]:
    """What clients come to in each round, wherever the server stands; the changes become smaller and turn."""
    return [random_adapter(LAYOUT, seed=round, scale=0.5 / round**3) for round in range(1, ROUNDS + 1)]


def played(server: Server, keys: Mapping[str, float], start: Tensors) -> list[Tensors]:
    """Every round's adapter, by the program; the state goes through its file."""
    theta, state, found = start, optimizers.first_state(server, keys, start), []
    for average in averages():
        stepped = optimizers.step(server, keys, theta, average, state)
        theta, state = stepped.tensors, read_state(state_bytes(stepped.state), PLACE, server, LAYOUT)
        found.append(theta)
    return found


# --- Hsu et al., 2019, and Algorithm 2 of Reddi et al., 2021, for one number x; delta is the clients' mean change


def hsu(x: float, delta: float, kept: dict[str, float], *, eta: float, beta: float) -> float:
    kept["v"] = beta * kept.get("v", 0.0) + delta
    return x + eta * kept["v"]


def reddi(second: Callable[[float, float], float]) -> Callable[..., float]:
    def one_round(x: float, delta: float, kept: dict[str, float], *, eta: float, beta_1: float, tau: float) -> float:
        kept["m"] = beta_1 * kept.get("m", 0.0) + (1 - beta_1) * delta
        kept["v"] = second(kept.get("v", tau**2), delta**2)
        return x + eta * kept["m"] / (math.sqrt(kept["v"]) + tau)

    return one_round


def sign(number: float) -> int:
    return (number > 0) - (number < 0)


BETA_2 = 0.7
BY_HAND: dict[Server, tuple[Callable[..., float], dict[str, float]]] = {
    "fedavgm": (hsu, {"eta": 0.8, "beta": 0.6}),
    "fedadagrad": (reddi(lambda v, square: v + square), {"eta": 0.05, "beta_1": 0.3, "tau": 0.01}),
    "fedadam": (
        reddi(lambda v, square: BETA_2 * v + (1 - BETA_2) * square),
        {"eta": 0.05, "beta_1": 0.8, "tau": 0.01},
    ),
    "fedyogi": (
        reddi(lambda v, square: v - (1 - BETA_2) * square * sign(v - square)),
        {"eta": 0.05, "beta_1": 0.8, "tau": 0.01},
    ),
}
NAMES = {"eta": "server_learning_rate", "beta": "server_momentum"}


@pytest.mark.parametrize("server", BY_HAND)
def test_five_rounds_are_those_of_the_papers_formulas(server: Server) -> None:
    one_round, symbols = BY_HAND[server]
    given = {NAMES.get(symbol, symbol): value for symbol, value in symbols.items()}
    given |= {"beta_2": BETA_2} if server in ("fedadam", "fedyogi") else {}
    start = random_adapter(LAYOUT, seed=77)
    found = played(server, keys_of(server, **given), start)
    for name in LAYOUT:
        for place in np.ndindex(LAYOUT[name]):
            x, kept = float(start[name][place]), dict[str, float]()
            for average, theta in zip(averages(), found, strict=True):
                x = one_round(x, float(average[name][place]) - x, kept, **symbols)
                # float32 cuts theta and the state in each round, and what was cut is of the next round's delta
                assert theta[name][place] == pytest.approx(x, abs=2e-5, rel=2e-5)
        assert found[-1][name].dtype == np.float32


def test_yogi_takes_away_where_adam_forgets() -> None:
    """v of 1, and a change of 0.1: Adam's v is 0.99 + 0.01 * 0.01, Yogi's 1 - 0.01 * 0.01."""
    zero = {"x": np.zeros((1, 1), np.float32)}
    before = State(zero, {"x": np.ones((1, 1), np.float32)})
    average = {"x": np.full((1, 1), 0.1, np.float32)}
    v = {
        server: float(optimizers.step(server, keys_of(server), zero, average, before).state.v["x"][0, 0])
        for server in ADAPTIVE
    }
    assert v == pytest.approx({"fedadagrad": 1.01, "fedadam": 0.9901, "fedyogi": 0.9999}, rel=1e-6)


def test_without_momentum_at_rate_1_the_average_is_taken_bit_for_bit() -> None:
    keys = keys_of("fedavgm", server_momentum=0.0, server_learning_rate=1.0)
    for found, expected in zip(played("fedavgm", keys, random_adapter(LAYOUT, seed=77)), averages(), strict=True):
        for name in LAYOUT:
            np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("server", ADAPTIVE)
def test_a_number_that_never_changes_stays_as_it_is(server: Server) -> None:
    theta = random_adapter(LAYOUT, seed=1)
    keys = keys_of(server)
    stepped = optimizers.step(server, keys, theta, theta, optimizers.first_state(server, keys, theta))
    for name in LAYOUT:
        np.testing.assert_array_equal(stepped.tensors[name], theta[name])
    assert (stepped.delta_norm, stepped.step_norm) == (0.0, 0.0)


def test_the_norms_are_of_the_change_that_was_averaged_and_of_the_step() -> None:
    theta, average = random_adapter(LAYOUT, seed=1), random_adapter(LAYOUT, seed=2)
    keys = keys_of("fedadam", server_learning_rate=0.3)
    stepped = optimizers.step("fedadam", keys, theta, average, optimizers.first_state("fedadam", keys, theta))

    def norm(other: Tensors) -> float:
        flat = [(other[name].astype(np.float64) - theta[name]).ravel() for name in LAYOUT]
        return float(np.linalg.norm(np.concatenate(flat)))

    assert stepped.delta_norm == pytest.approx(norm(average), rel=1e-9)
    assert stepped.step_norm == pytest.approx(norm(stepped.tensors), rel=1e-5)


# --- the file


def state(server: Server) -> State:
    m = random_adapter(LAYOUT, seed=4)
    return State(m, {name: np.square(tensor) for name, tensor in m.items()} if server in ADAPTIVE else {})


@pytest.mark.parametrize("server", ["fedavgm", *ADAPTIVE])
def test_a_state_is_read_as_it_was_written(server: Server) -> None:
    written = state(server)
    content = state_bytes(written)
    found = read_state(content, PLACE, server, LAYOUT)
    assert layout_of(found.v) == (LAYOUT if server in ADAPTIVE else {})
    for kind in ("m", "v"):
        for name, tensor in getattr(written, kind).items():
            np.testing.assert_array_equal(getattr(found, kind)[name], tensor)
            stored = safetensors.numpy.load(content)[f"{kind}/{name}"]
            np.testing.assert_array_equal(stored, tensor)


NAME = "h.1.lora_B.weight"


def changed(**tensors: np.ndarray | None) -> bytes:
    """The file of a state of fedadam in which m/ or v/ of one tensor is another, or none."""
    named = safetensors.numpy.load(state_bytes(state("fedadam")))
    for kind, tensor in tensors.items():
        del named[f"{kind}/{NAME}"]
        named |= {} if tensor is None else {f"{kind}/{NAME}": tensor}
    return safetensors.numpy.save(named, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: state_bytes(state("fedavgm")), "v/h.0.lora_A.weight is no tensor, expected [2, 6]"),
        (lambda: changed(m=None), f"m/{NAME} is no tensor, expected [5, 2]"),
        (lambda: changed(v=np.ones((5, 3), np.float32)), f"v/{NAME} is [5, 3], expected [5, 2]"),
        (lambda: changed(m=np.ones((5, 2), np.float64)), f"holds m/{NAME} as F64"),
        (lambda: changed(v=np.full((5, 2), -1.0, np.float32)), f"has a sum of squares below zero in v/{NAME}"),
        (lambda: changed()[:-1], "not a sound safetensors file"),
        (lambda: b"\x80\x04", "is a pickle, which is never opened"),
    ],
)
def test_a_state_of_another_optimiser_or_adapter_or_a_broken_one_is_damaged(
    content: Callable[[], bytes], message: str
) -> None:
    with pytest.raises(Damaged) as caught:
        read_state(content(), PLACE, "fedadam", LAYOUT)
    assert message in caught.value.message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(BadNumbers, match=f"v/{NAME} holds NaN or infinity"):
        read_state(changed(v=np.full((5, 2), value, np.float32)), PLACE, "fedadam", LAYOUT)
