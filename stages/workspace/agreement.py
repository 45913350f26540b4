"""The settings: fedcollm.toml, agreed by every party, and machine.toml, one machine's own.

Strict: unknown keys are refused with the nearest known one, wrong types are not converted, and all mistakes of a file
are named at once. Absence means off; there is no -1. `workspace_template/fedcollm.toml` explains every key.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from stages.workspace.averaging import BLIND, Aggregation, Factors, threshold
from stages.workspace.budgets import ClientTraining, Distillation
from stages.workspace.commands import Command
from stages.workspace.hiding import check_hidden
from stages.workspace.methods import AVERAGING, Federation
from stages.workspace.privacy import Privacy
from stages.workspace.rows_and_scores import Data, Evaluation
from stages.workspace.settings import Dtype, Positive, Quantization, Rate, Settings


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
    """What one client has of its own: a model in the place of [slm], how fast that learns; or a smaller rank."""

    slm: Model | None = None
    learning_rate: Rate | None = None
    rank: Positive | None = None


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
    def _a_sum_hides_in_a_crowd(self) -> Agreement:
        if self.aggregation.is_hidden:
            check_hidden(self.aggregation, self.federation)
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
        if self.federation.averages and any(one.slm or one.learning_rate for one in self.clients.values()):
            raise ValueError(
                f"method {self.federation.method} averages adapters of one model: take out the tables [clients...], "
                'or set federation.method = "fedmkt"'
            )
        return self

    @model_validator(mode="after")
    def _ranks_are_of_products(self) -> Agreement:
        lora, methods = self.slm.lora, (*AVERAGING, "standalone")
        for number, rank in self.ranks.items():
            name = f"clients.{number}.rank = {rank}"
            if self.federation.method not in methods:
                raise ValueError(f"{name} is for {', '.join(methods)}: other methods have [clients.{number}.slm.lora]")
            if rank >= lora.r:
                raise ValueError(f"{name} is not below slm.lora.r = {lora.r}, which all others have")
            if lora.alpha * rank % lora.r:
                raise ValueError(f"{name} keeps alpha / r = {lora.alpha} / {lora.r}, of which alpha is no whole number")
        if self.ranks and self.keep:
            raise ValueError(
                "clients of other ranks begin with other adapters, and aggregation.keep is of one: choose one"
            )
        if self.ranks and self.federation.averages and self.aggregation.combine != "product":
            raise ValueError('clients of other ranks have A and B of other shapes: set aggregation.combine = "product"')
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
        if self.aggregation.sent_in(1) != "AB" or self.aggregation.keep or self.aggregation.combine == "residual":
            raise ValueError(
                "aggregation.average takes whole adapters: take out personal and keep, and combine but for product"
            )
        if self.aggregation.max_update_norm is not None:
            raise ValueError(
                "aggregation.max_update_norm holds for client-train alone, not for what aggregation.average averages: "
                'take it out; rule = "clipped-mean" shortens long updates'
            )
        return self

    @model_validator(mode="after")
    def _server_steps_where_it_averages(self) -> Agreement:
        if self.aggregation.server != "none" and not self.averages:
            method, server = self.federation.method, self.aggregation.server
            also = " without aggregation.average" if method == "fedmkt" else ""
            raise ValueError(f"aggregation.server {server} is for methods that average, here is {method}{also}")
        return self

    @model_validator(mode="after")
    def _gate_has_a_b_to_look_at(self) -> Agreement:
        if self.aggregation.gate is not None and self.server_has_no_b:
            raise ValueError(f"aggregation.gate looks at the server's SLM: {BLIND}, take it out")
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

    @property
    def sends_part(self) -> bool:
        """Whether clients keep their adapters and send A or B alone, or few numbers. Not where nothing is averaged."""
        return self.sent_in(1) != "AB" or self.keep is not None

    @property
    def keep(self) -> float | None:
        """Which share of an update's numbers clients send; None: all."""
        return self.aggregation.keep if self.federation.averages else None

    def trained_in(self, round: int) -> Factors:
        """Which matrices clients train in a round; the others stay as the broadcast has them."""
        return self.aggregation.trained_in(round) if self.federation.averages else "AB"

    def sent_in(self, round: int) -> Factors:
        """Which matrices clients send in a round, and the server averages."""
        return self.aggregation.sent_in(round) if self.federation.averages else "AB"

    @property
    def personal(self) -> bool:
        """Whether each client goes on with an A, or a B, of its own."""
        return self.federation.averages and self.aggregation.personal is not None

    @property
    def server_has_no_b(self) -> bool:
        """Whether the server's SLM remains its base: every B is a client's, and the server trains none."""
        return self.personal and self.aggregation.personal == "B" and not self.federation.distils

    @property
    def needs_completions(self) -> bool:
        """Whether D^a without any completion teaches a model nothing."""
        said, is_idle = self.distillation, 0 in (self.distillation.lambda_slm, self.distillation.lambda_llm)
        return self.federation.learns_in_public or (self.federation.distils and (said.select == "min-ce" or is_idle))

    def broadcasts(self, round: int) -> bool:
        """Whether the server sends all clients the adapter that they begin a round with."""
        return self.averages or (round == 1 and self.is_of_one_slm)

    @property
    def is_of_one_slm(self) -> bool:
        """Whether all clients tune the model in [slm]: one theta^1 can then be broadcast to all."""
        return not any(client.slm for client in self.clients.values())

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each client that has another one than all, by its number."""
        return {number: client.rank for number, client in self.clients.items() if client.rank}

    def of_client(self, number: int) -> Agreement:
        """The same as a client reads it: [slm] is the model that it tunes, at its own learning rates and rank.

        alpha / r, which BA is multiplied by, is that of all.
        """
        own = self.clients.get(str(number))
        if own is None:
            return self
        rates = {} if own.learning_rate is None else {"learning_rate": own.learning_rate}
        distilled = {f"slm_{name}": value for name, value in rates.items()}
        slm = own.slm or self.slm
        if own.rank:
            shape = {"r": own.rank, "alpha": slm.lora.alpha * own.rank // slm.lora.r}
            slm = slm.model_copy(update={"lora": slm.lora.model_copy(update=shape)})
        return self.model_copy(
            update={
                "slm": slm,
                "client_training": self.client_training.model_copy(update=rates),
                "distillation": self.distillation.model_copy(update=distilled),
            }
        )
