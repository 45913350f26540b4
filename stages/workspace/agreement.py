"""The settings: fedcollm.toml, agreed by every party, and machine.toml, one machine's own.

Strict: unknown keys are refused with the nearest known one, wrong types are not converted, and all mistakes of a file
are named at once. Absence means off; there is no -1. `workspace_template/fedcollm.toml` explains every key.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.workspace.attacks import Attack
from stages.workspace.averaging import Aggregation
from stages.workspace.budgets import ClientTraining, Distillation
from stages.workspace.commands import Command
from stages.workspace.settings import Dtype, Positive, Quantization, Rate, Settings

Method = Literal[
    "fedcollm", "fedavg", "fedavg-aux", "standalone", "centralized", "fedmkt", "llm2slm", "standalone-public"
]


class Federation(Settings):
    """Who takes part, for how long, by which method."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    clients: Positive = 4
    rounds: Positive = 5
    seed: Annotated[int, Field(ge=0)] = 1
    method: Method = "fedcollm"

    @property
    def averages(self) -> bool:
        """Whether the method averages clients' adapters (line 13); see Agreement.averages."""
        return self.method in ("fedcollm", "fedavg", "fedavg-aux")

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


class Lora(Settings):
    """The shape of one adapter. An empty target_modules means PEFT's default, which adapter_config.json names."""

    r: Positive = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] = []


class Model(Settings):
    """A base model, by hub id or by path (relative to the workspace), and its adapter."""

    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    lora: Lora = Lora()


class Client(Settings):
    """What one client has of its own: a model in the place of [slm], and how fast that learns."""

    slm: Model | None = None
    learning_rate: Rate | None = None


class Privacy(Settings):
    """Differential privacy of each client's examples; without epsilon and noise_multiplier there is none."""

    epsilon: Rate | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    noise_multiplier: Rate | None = None
    max_grad_norm: Rate = 1.0

    @property
    def is_on(self) -> bool:
        """Whether clients train with noise."""
        return self.epsilon is not None or self.noise_multiplier is not None


class Data(Settings):
    """Where `prepare` takes a public dataset from and how it splits it; parties with their own data leave it out."""

    tasks: list[str] = []
    files: list[str] = []
    split: Literal["iid", "dirichlet", "by-task"] = "iid"
    dirichlet_alpha: Rate = 0.5
    auxiliary_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    auxiliary_sources: list[str] = []
    unlabelled_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    too_long: Literal["refuse", "skip"] = "refuse"


class Evaluation(Settings):
    """What lm-eval scores, zero-shot."""

    tasks: list[str] = []
    limit: Positive | None = None
    batch_size: Positive = 16
    precision: Literal["full", "training"] = "full"
    attack: Attack = Attack()


def threshold(clients: int) -> int:
    """How many of the clients of a round must reveal before it can be unmasked: t."""
    return 2 * clients // 3 + 1


class Agreement(Settings):
    """fedcollm.toml: the same bytes at every party."""

    federation: Federation
    slm: Model
    llm: Model
    clients: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")], Client] = {}
    client_training: ClientTraining
    aggregation: Aggregation = Aggregation()
    privacy: Privacy = Privacy()
    distillation: Distillation
    data: Data = Data()
    evaluation: Evaluation = Evaluation()

    @property
    def smallest_round(self) -> int:
        """For how many clients a round of secure aggregation is opened at least: min_clients, else t of all."""
        return self.aggregation.min_clients or threshold(self.federation.clients)

    def quorum(self, opened: int) -> int:
        """How many of those that a round of secure aggregation was opened for must be in its sum."""
        return opened if self.aggregation.min_clients is None else self.smallest_round

    @model_validator(mode="after")
    def _quorum_is_reachable(self) -> Agreement:
        if (self.aggregation.min_clients or 1) > self.federation.clients:
            raise ValueError("aggregation.min_clients is larger than federation.clients")
        return self

    @model_validator(mode="after")
    def _rule_has_enough_updates(self) -> Agreement:
        if not self.averages:
            return self
        rule, outliers = self.aggregation.rule, self.aggregation.outliers or 0
        fewest = self.aggregation.min_clients or self.federation.clients
        withstood = {"trimmed-mean": (fewest - 1) // 2, "krum": max((fewest - 3) // 2, 0)}.get(rule, outliers)
        if withstood < outliers:
            need = {"trimmed-mean": "K > 2f", "krum": "K >= 2f + 3"}[rule]
            left = f"f={withstood}" + (", which is meaningless" if withstood == 0 else " at most")
            of = " (min_clients)" if self.aggregation.min_clients else ""
            raise ValueError(f"aggregation.rule {rule} needs {need} updates: K={fewest}{of} leaves {left}")
        return self

    @model_validator(mode="after")
    def _secure_needs_a_crowd(self) -> Agreement:
        if not self.aggregation.is_secure:
            return self
        clients, least = self.federation.clients, threshold(self.federation.clients)
        if self.federation.clients_tell:
            raise ValueError("aggregation.mode secure hides what each client tells: method fedmkt compares just that")
        if not self.federation.averages:
            raise ValueError(
                f"aggregation.mode secure has nothing to hide: method {self.federation.method} averages nothing"
            )
        if not 3 <= clients <= 256:
            raise ValueError(f"aggregation.mode secure takes 3 to 256 clients, here are {clients}")
        if (self.aggregation.min_clients or clients) < least:
            raise ValueError(f"aggregation.min_clients is below {least}, which mode secure needs of {clients} clients")
        return self

    @model_validator(mode="after")
    def _auxiliary_without_distillation(self) -> Agreement:
        if self.federation.method == "fedavg-aux" and (self.distillation.lambda_slm or self.distillation.lambda_llm):
            raise ValueError("method fedavg-aux has no distillation: set distillation.lambda_slm and lambda_llm to 0.0")
        return self

    @model_validator(mode="after")
    def _unlike_models_are_not_averaged(self) -> Agreement:
        for number in self.clients:
            if int(number) > self.federation.clients:
                raise ValueError(f"clients.{number}: there are clients 1 to {self.federation.clients}")
        if self.clients and self.federation.averages:
            raise ValueError(
                f"method {self.federation.method} averages adapters of one model: take out the tables [clients...], "
                'or set federation.method = "fedmkt"'
            )
        return self

    @model_validator(mode="after")
    def _adapters_of_one_slm_are_averaged(self) -> Agreement:
        if not self.aggregation.average:
            return self
        own = [number for number, client in self.clients.items() if client.slm]
        if self.federation.method != "fedmkt":
            raise ValueError(f"aggregation.average is for method fedmkt, here is {self.federation.method}: take it out")
        if own:
            raise ValueError(
                f"aggregation.average takes clients of one model: take out the table [clients.{own[0]}.slm], "
                "or set aggregation.average = false"
            )
        if self.aggregation.max_update_norm is not None:
            raise ValueError(
                "aggregation.max_update_norm holds for client-train alone, not for what aggregation.average averages: "
                'take it out; rule = "clipped-mean" shortens long updates'
            )
        return self

    @model_validator(mode="after")
    def _proximal_to_a_broadcast(self) -> Agreement:
        if self.client_training.proximal is None:
            return self
        if not self.federation.averages:
            method = self.federation.method
            raise ValueError(f"client_training.proximal is for methods that average, as fedcollm; here is {method}")
        if self.privacy.is_on:
            raise ValueError("client_training.proximal is not for the training of differential privacy: choose one")
        return self

    @model_validator(mode="after")
    def _adversarial_without_noise(self) -> Agreement:
        if self.client_training.adversarial.is_on and self.privacy.is_on:
            raise ValueError("client_training.adversarial is not for the training of differential privacy: choose one")
        return self

    @model_validator(mode="after")
    def _across_tokenizers_only(self) -> Agreement:
        settings, method = self.distillation, self.federation.method
        if not self.federation.server_tells:
            if settings.divergence in ("spans", "sorted"):
                raise ValueError(
                    f"distillation.divergence {settings.divergence} is for method fedmkt, here is {method}"
                )
            if settings.select == "none":
                raise ValueError("distillation.select none is for method fedmkt: set lambda_slm and lambda_llm to 0.0")
        elif settings.order == "alternating":
            raise ValueError(f"distillation.order alternating has no turns to take: {method} trains models apart")
        return self

    @model_validator(mode="after")
    def _centralized_is_one_party_with_the_llm(self) -> Agreement:
        if self.federation.method == "centralized" and (self.federation.clients > 1 or self.slm != self.llm):
            command = Command("run", method="centralized")
            raise ValueError(f"method centralized is one client that tunes the LLM: `{command}`")
        return self

    def model_of(self, role: str) -> Model:
        """The settings of the model that plays this role, "slm" or "llm"."""
        return {"slm": self.slm, "llm": self.llm}[role]

    @property
    def averages(self) -> bool:
        """Whether clients' adapters are averaged; if not, each goes on with its own, round after round.

        By the method; or, after each round of FedMKT, as aggregation.average says.
        """
        return self.federation.averages or self.aggregation.average

    def broadcasts(self, round: int) -> bool:
        """Whether the server sends all clients the adapter that they begin a round with."""
        return self.averages or (round == 1 and self.is_of_one_slm)

    @property
    def is_of_one_slm(self) -> bool:
        """Whether all clients tune the model in [slm]: one theta^1 can then be broadcast to all."""
        return not any(client.slm for client in self.clients.values())

    def of_client(self, number: int) -> Agreement:
        """The same as a client reads it: [slm] is the model that it tunes, at its own learning rates."""
        own = self.clients.get(str(number))
        if own is None:
            return self
        rates = {} if own.learning_rate is None else {"learning_rate": own.learning_rate}
        distilled = {f"slm_{name}": value for name, value in rates.items()}
        return self.model_copy(
            update={
                "slm": own.slm or self.slm,
                "client_training": self.client_training.model_copy(update=rates),
                "distillation": self.distillation.model_copy(update=distilled),
            }
        )
