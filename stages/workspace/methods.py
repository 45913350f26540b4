"""The part of the agreement that says who takes part, and by which method: what each of them does and does not."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from stages.workspace.settings import Positive, Settings

Method = Literal[
    "fedcollm", "fedavg", "fedavg-aux", "standalone", "centralized", "fedmkt", "llm2slm", "standalone-public"
]

OfFedAvg = Literal["fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]
"""FedAvg with one part of another system, in the loss or in the server's step: agreements say it by keys."""
Compared = Literal[Method, OfFedAvg]
"""What a comparison can have a row of."""
OF_FEDAVG: tuple[OfFedAvg, ...] = get_args(OfFedAvg)

AVERAGING = ("fedcollm", "fedavg", "fedavg-aux")


class Fork(Settings):
    """Up to which round this federation is another one, and the sha256 of the fedcollm.toml of that; or neither."""

    round: Positive | None = None
    agreement_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _of_both(self) -> Fork:
        if (self.round is None) != (self.agreement_sha256 is None):
            raise ValueError("federation.fork has both round and agreement_sha256, or neither")
        return self

    def has(self, round: int | None) -> bool:
        """Whether a round was made before the fork."""
        return self.round is not None and round is not None and round <= self.round


class Federation(Settings):
    """Who takes part, for how long, by which method."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    clients: Positive = 4
    rounds: Positive = 5
    seed: Annotated[int, Field(ge=0)] = 1
    method: Method = "fedcollm"
    fork: Fork = Fork()

    @field_validator("method", mode="before")
    @classmethod
    def _as_agreements_say_it(cls, value: object) -> object:
        if value in OF_FEDAVG:
            part = "client_training.proximal" if value == "fedprox" else f'aggregation.server = "{value}"'
            raise ValueError(f'{value} is for run --method; an agreement says it by method = "fedavg" and {part}')
        return value

    @model_validator(mode="after")
    def _fork_goes_on(self) -> Federation:
        if self.fork.has(self.rounds):
            raise ValueError(f"federation.fork.round = {self.fork.round} leaves nothing to do of {self.rounds} rounds")
        return self

    @property
    def averages(self) -> bool:
        """Whether the method averages clients' adapters (line 13); see Agreement.averages."""
        return self.method in AVERAGING

    @property
    def distils(self) -> bool:
        """Whether the server trains both models on the auxiliary data (lines 14-20)."""
        return self.method in ("fedcollm", "fedavg-aux")

    @property
    def learns_in_public(self) -> bool:
        """Whether each client trains on public rows too, after its own, and keeps its adapter to itself (FedMKT)."""
        return self.method in ("fedmkt", "llm2slm", "standalone-public")

    @property
    def server_tells(self) -> bool:
        """Whether the server tells the clients what its LLM knows of the public rows (S_0)."""
        return self.method in ("fedmkt", "llm2slm")

    @property
    def clients_tell(self) -> bool:
        """Whether each client tells the server what its model knows of the public rows (S_k), and the LLM learns."""
        return self.method == "fedmkt"
