"""The part of the agreement that says how clients' updates become one, and what the server sees of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.workspace.settings import Positive, Rate, Settings, Share

Rule = Literal["mean", "median", "trimmed-mean", "clipped-mean", "krum", "geometric-median"]
Combine = Literal["factors", "product", "residual", "freeze-a", "alternate"]
Factors = Literal["A", "B", "AB"]
"""Which matrices of a LoRA layer: one of them, or both."""
Server = Literal["none", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]
Decay = Annotated[float, Field(ge=0, lt=1)]
Tau = Annotated[float, Field(ge=1e-8, le=1e6)]
"""Of smaller ones the square, where v begins, is soon no number of float32."""

BLIND = "with personal B and no training at the server that is its base, whatever is averaged"
"""Why a gate would pass everything."""

OF_SERVER: dict[Server, dict[str, float]] = {
    "none": {},
    "fedavgm": {"server_learning_rate": 1.0, "server_momentum": 0.9},
    "fedadagrad": {"server_learning_rate": 0.01, "beta_1": 0.0, "tau": 1e-3},
    "fedadam": {"server_learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3},
    "fedyogi": {"server_learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3},
}
"""The keys that each of the server's optimisers has, and what holds where one is absent."""


def threshold(clients: int) -> int:
    """How many of the clients of a round must reveal before it can be unmasked: t."""
    return 2 * clients // 3 + 1


class Aggregation(Settings):
    """Line 13 of Algorithm 1. Without min_clients every client must have answered."""

    mode: Literal["plain", "secure", "encrypted"] = "plain"
    opener: Positive | None = None
    weighting: Literal["uniform", "samples"] = "uniform"
    min_clients: Positive | None = None
    max_update_norm: Rate | None = None
    rule: Rule = "mean"
    combine: Combine = "factors"
    personal: Literal["A", "B"] | None = None
    keep: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    outliers: Positive | None = None
    server: Server = "none"
    server_learning_rate: Rate | None = None
    server_momentum: Decay | None = None
    beta_1: Decay | None = None
    beta_2: Decay | None = None
    tau: Tau | None = None
    gate: Share | None = None
    average: bool = False
    max_update_value: Rate = 8.0
    max_examples: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    @property
    def is_secure(self) -> bool:
        """Whether clients mask their updates, so that nobody sees one."""
        return self.mode == "secure"

    @property
    def is_hidden(self) -> bool:
        """Whether the server sees nothing of the clients' updates but their sum."""
        return self.mode != "plain"

    @property
    def key_holder(self) -> int | None:
        """The one client that can open what is encrypted, and so opens each round's sum; None where nothing is."""
        return self.opener or 1 if self.mode == "encrypted" else None

    def reveals_needed(self, clients: int) -> int:
        """How many of a round's clients must reveal before the server has their sum."""
        return threshold(clients) if self.is_secure else 1

    def trained_in(self, round: int) -> Factors:
        """Which matrices clients train in a round, and send; the other one stays as the broadcast has it.

        B first: while it is zero A learns nothing.
        """
        alternating: Factors = "B" if round % 2 else "A"
        by_combine: dict[Combine, Factors] = {"freeze-a": "B", "alternate": alternating}
        return by_combine.get(self.combine, "AB")

    def sent_in(self, round: int) -> Factors:
        """Which matrices clients send in a round: what they train, without what stays with each."""
        sent: dict[str | None, Factors] = {"A": "B", "B": "A"}
        return sent.get(self.personal) or self.trained_in(round)

    @property
    def trains_part(self) -> bool:
        """Whether A or B stays as it is in every round."""
        return self.trained_in(1) != "AB"

    @property
    def server_keys(self) -> dict[str, float]:
        """What the agreed optimiser of the server goes by: each of its keys, as set or by default."""
        told = ((key, getattr(self, key), default) for key, default in OF_SERVER[self.server].items())
        return {key: default if value is None else value for key, value, default in told}

    @model_validator(mode="after")
    def _rule_has_what_it_needs(self) -> Aggregation:
        if self.rule in ("trimmed-mean", "krum") and self.outliers is None:
            raise ValueError(f"rule {self.rule} needs outliers, the number f of updates that may be bad")
        if self.rule in ("median", "trimmed-mean", "krum") and self.weighting != "uniform":
            raise ValueError(f"rule {self.rule} counts every client alike: weighting {self.weighting} is for means")
        return self

    @model_validator(mode="after")
    def _what_is_personal_is_trained(self) -> Aggregation:
        if self.personal and self.combine != "factors":
            raise ValueError(f"personal is for A and B that are averaged apart: combine {self.combine} has another way")
        return self

    @model_validator(mode="after")
    def _products_are_of_each_client(self) -> Aggregation:
        if self.combine not in ("product", "residual"):
            return self
        combine = f"combine {self.combine}"
        if self.rule != "mean":
            raise ValueError(f"rule {self.rule} is for A and B as they are, {combine} averages BA: choose one")
        if self.is_hidden:
            raise ValueError(f"{combine} needs each client's A and B, mode {self.mode} shows their sums: choose one")
        return self

    @model_validator(mode="after")
    def _sparse_updates_are_of_each_client(self) -> Aggregation:
        if self.keep and self.is_hidden:
            mode = f"mode {self.mode} adds the same ones"
            raise ValueError(f"keep has each client send other numbers, {mode}: choose one")
        if self.keep and self.combine == "residual":
            raise ValueError("keep leaves numbers out, combine residual leaves nothing out: choose one")
        return self

    @model_validator(mode="after")
    def _server_takes_its_own_keys(self) -> Aggregation:
        for key in dict.fromkeys(key for keys in OF_SERVER.values() for key in keys):
            if getattr(self, key) is not None and key not in OF_SERVER[self.server]:
                those = ", ".join(name for name, keys in OF_SERVER.items() if key in keys)
                raise ValueError(f"{key} is for server {those}; here is {self.server}")
        if self.server != "none" and self.combine in ("product", "residual", "alternate"):
            whys = {"product": "makes other A and B", "alternate": "trains one of them in a round"}
            whys |= {"residual": "makes up for what their means lose, and for nothing else"}
            why = f"combine {self.combine} {whys[self.combine]}"
            raise ValueError(f"server {self.server} steps along changes of A and B, {why}")
        return self

    @model_validator(mode="after")
    def _the_sum_alone_is_seen(self) -> Aggregation:
        mode = self.mode
        if self.is_hidden and self.rule != "mean":
            raise ValueError(f"rule {self.rule} needs each client's update, mode {mode} shows their sum: choose one")
        if self.is_hidden and self.weighting == "samples" and self.max_examples is None:
            raise ValueError(f"weighting samples in mode {mode} needs max_examples, the most that a client trains on")
        return self
