"""The part of the agreement that says how clients' updates become one, and what the server sees of each."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.workspace.settings import Positive, Rate, Settings, Share

Rule = Literal["mean", "median", "trimmed-mean", "clipped-mean", "krum", "geometric-median"]
Combine = Literal["factors", "product", "freeze-a", "alternate"]
Factors = Literal["A", "B", "AB"]
"""Which matrices of a LoRA layer: one of them, or both."""


class Aggregation(Settings):
    """Line 13 of Algorithm 1. Without min_clients every client must have answered."""

    mode: Literal["plain", "secure"] = "plain"
    weighting: Literal["uniform", "samples"] = "uniform"
    min_clients: Positive | None = None
    max_update_norm: Rate | None = None
    rule: Rule = "mean"
    combine: Combine = "factors"
    personal: Literal["A", "B"] | None = None
    keep: Annotated[float, Field(gt=0, lt=0.5)] | None = None
    outliers: Positive | None = None
    gate: Share | None = None
    average: bool = False
    max_update_value: Rate = 8.0
    max_examples: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    @property
    def is_secure(self) -> bool:
        """Whether the server sees nothing of the clients' updates but their sum."""
        return self.mode == "secure"

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
        if self.combine == "product" and self.rule != "mean":
            raise ValueError(f"rule {self.rule} is for A and B as they are, combine product averages BA: choose one")
        if self.combine == "product" and self.is_secure:
            raise ValueError("combine product needs each client's A and B, mode secure shows their sums: choose one")
        return self

    @model_validator(mode="after")
    def _sparse_updates_are_of_each_client(self) -> Aggregation:
        if self.keep and self.is_secure:
            raise ValueError("keep has each client send other numbers, mode secure adds the same ones: choose one")
        return self

    @model_validator(mode="after")
    def _secure_sees_the_sum_alone(self) -> Aggregation:
        if self.is_secure and self.rule != "mean":
            raise ValueError(f"rule {self.rule} needs each client's update, mode secure shows their sum: choose one")
        if self.is_secure and self.weighting == "samples" and self.max_examples is None:
            raise ValueError("weighting samples in mode secure needs max_examples, the most that a client trains on")
        return self
