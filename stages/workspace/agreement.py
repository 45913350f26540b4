"""The settings: fedcollm.toml, agreed by every party, and machine.toml, one machine's own.

Strict: unknown keys are refused with the nearest known one, wrong types are not converted, and all mistakes of a file
are named at once. Absence means off; there is no -1. `workspace_template/fedcollm.toml` explains every key.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stages.runtime.errors import UsageProblem
from stages.runtime.texts import lines

Dtype = Literal["auto", "float32", "bfloat16"]
Role = Literal["slm", "llm"]
Quantization = Literal["4bit", "8bit"]
ROLES: tuple[Role, ...] = ("slm", "llm")
Method = Literal["fedcollm", "fedavg", "fedavg-aux", "standalone", "centralized"]
Rule = Literal["mean", "median", "trimmed-mean", "clipped-mean", "krum"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0)]


class Settings(BaseModel):
    """Strict and frozen; the one place that says so."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Federation(Settings):
    """Who takes part, for how long, by which method."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    clients: Positive = 4
    rounds: Positive = 5
    seed: Annotated[int, Field(ge=0)] = 1
    method: Method = "fedcollm"

    @property
    def averages(self) -> bool:
        """Whether clients' adapters are averaged (line 13); if not, each goes on with its own, round after round."""
        return self.method not in ("standalone", "centralized")

    @property
    def distils(self) -> bool:
        """Whether the server trains both models on the auxiliary data (lines 14-20)."""
        return self.method in ("fedcollm", "fedavg-aux")


class Lora(Settings):
    """The shape of one adapter. An empty target_modules means PEFT's default for the architecture."""

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


class Budget(Settings):
    """How long and on what batches a model is trained: epochs or steps, exactly one of them."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    batch_size: Positive = 8
    gradient_accumulation: Positive = 1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Share = 0.0
    max_length: Positive = 512

    @model_validator(mode="after")
    def _one_budget(self) -> Budget:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of epochs and steps")
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimiser step sees."""
        return self.batch_size * self.gradient_accumulation

    def steps_for(self, rows: int) -> int:
        """How many optimiser steps that is on so many rows."""
        return self.steps or math.ceil((self.epochs or 1.0) * rows / self.rows_per_step)


class ClientTraining(Budget):
    """Local training, Eq. 3."""

    learning_rate: Rate = 3e-4
    max_grad_norm: Rate | None = None


class Distillation(Budget):
    """Mutual distillation, Eq. 4-6."""

    slm_learning_rate: Rate = 3e-4
    llm_learning_rate: Rate = 3e-4
    slm_max_grad_norm: Rate | None = None
    llm_max_grad_norm: Rate | None = None
    lambda_slm: Share = 1.0
    lambda_llm: Share = 1.0
    temperature: Rate = 1.0
    divergence: Literal["forward", "reverse", "jensen-shannon"] = "forward"
    min_confidence: Annotated[float, Field(gt=0, le=1)] | None = None
    order: Literal["simultaneous", "alternating"] = "simultaneous"


class Aggregation(Settings):
    """Line 13 of Algorithm 1. Without min_clients every client must have answered."""

    mode: Literal["plain", "secure"] = "plain"
    weighting: Literal["uniform", "samples"] = "uniform"
    min_clients: Positive | None = None
    max_update_norm: Rate | None = None
    rule: Rule = "mean"
    outliers: Positive | None = None
    gate: Share | None = None
    max_update_value: Rate = 8.0
    max_examples: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    @property
    def is_secure(self) -> bool:
        """Whether the server sees nothing of the clients' updates but their sum."""
        return self.mode == "secure"

    @model_validator(mode="after")
    def _rule_has_what_it_needs(self) -> Aggregation:
        if self.rule in ("trimmed-mean", "krum") and self.outliers is None:
            raise ValueError(f"rule {self.rule} needs outliers, the number f of updates that may be bad")
        if self.rule in ("median", "trimmed-mean", "krum") and self.weighting != "uniform":
            raise ValueError(f"rule {self.rule} counts every client alike: weighting {self.weighting} is for means")
        return self

    @model_validator(mode="after")
    def _secure_sees_the_sum_alone(self) -> Aggregation:
        if self.is_secure and self.rule != "mean":
            raise ValueError(f"rule {self.rule} needs each client's update, mode secure shows their sum: choose one")
        if self.is_secure and self.weighting == "samples" and self.max_examples is None:
            raise ValueError("weighting samples in mode secure needs max_examples, the most that a client trains on")
        return self


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
    unlabelled_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    too_long: Literal["refuse", "skip"] = "refuse"


class Evaluation(Settings):
    """What lm-eval scores, zero-shot."""

    tasks: list[str] = []
    limit: Positive | None = None
    batch_size: Positive = 16


def threshold(clients: int) -> int:
    """How many of the clients of a round must reveal before it can be unmasked: t."""
    return 2 * clients // 3 + 1


class Agreement(Settings):
    """fedcollm.toml: the same bytes at every party."""

    federation: Federation
    slm: Model
    llm: Model
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
        if not self.federation.averages:
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
    def _centralized_is_one_party_with_the_llm(self) -> Agreement:
        if self.federation.method == "centralized" and (self.federation.clients > 1 or self.slm != self.llm):
            raise ValueError("method centralized is one client that tunes the LLM: `fedcollm run --method centralized`")
        return self

    def model_of(self, role: str) -> Model:
        """The settings of the model that plays this role, "slm" or "llm"."""
        return {"slm": self.slm, "llm": self.llm}[role]


class LocalModels(Settings):
    """Where this machine keeps the base models, instead of the hub."""

    slm: str | None = None
    llm: str | None = None


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:@+=/-]{0,127}$")]
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9_.,:@+=/&|*()\[\]-]+)?$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f\x85\u2028\u2029]+$")]


class Slurm(Settings):
    """What this site's Slurm is asked for. No value can end its line in a script."""

    partition: Word | None = None
    account: Word | None = None
    gpus_per_task: Annotated[int, Field(ge=0, le=64)] | None = None
    cpus_per_task: Positive | None = None
    mem: Annotated[str, Field(pattern=r"^[0-9]{1,9}[KMGT]?$")] | None = None
    time: Annotated[str, Field(pattern=r"^([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{2}){0,2}$")] | None = None
    options: list[Option] = []
    client_options: list[Option] = []
    server_options: list[Option] = []
    setup: list[Line] = []
    retries: Annotated[int, Field(ge=0, le=100)] = 2
    stop_before_s: Annotated[int, Field(ge=1, le=65535)] = 120
    two_phases: bool = False
    parallel: Positive | None = None
    window: Positive | None = None


class Machine(Settings):
    """machine.toml: what differs between machines and changes no meaning."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    dtype: Dtype | None = None
    micro_batch: Positive | Literal["auto"] | None = None
    gradient_checkpointing: bool = False
    offload_idle: bool = False
    checkpoint_steps: Positive = 100
    processes: Positive | None = None
    sharding: list[Role] = []
    simulation: bool | None = None
    home: str | None = None
    secrets: str | None = None
    run_task_code: bool = False
    trackers: list[Tracker] = []
    models: LocalModels = LocalModels()
    slurm: Slurm = Slurm()

    def rows_at_once(self, budget: Budget) -> int:
        """How many rows a forward pass takes at most; where that is to be found by trying, what is tried first."""
        asked = self.micro_batch if isinstance(self.micro_batch, int) else budget.batch_size
        return min(budget.batch_size, asked)


S = TypeVar("S", bound=Settings)


def parse(kind: type[S], text: bytes, path: Path) -> S:
    """The settings in a TOML file. Raises UsageProblem naming every mistake with its key, and the nearest known key."""
    try:
        values = tomllib.loads(text.decode("utf-8-sig"))  # some editors begin with a byte order mark
    except UnicodeDecodeError as error:
        raise UsageProblem(f"not UTF-8: {error}", where=path, mend="save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageProblem(f"not valid TOML: {error}", where=path, mend="correct that line") from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        mistakes = [_mistake(kind, found) for found in error.errors()]
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        message = lines([f"{count} in the settings", *mistakes], "\n  - ")
        raise UsageProblem(
            message, where=path, mend="every key is explained in the template's fedcollm.toml"
        ) from error


def _mistake(kind: type[Settings], found: object) -> str:
    """One line for one of pydantic's error dicts."""
    assert isinstance(found, dict)
    place = found["loc"]
    key = ".".join(str(part) for part in place)
    if found["type"] == "extra_forbidden":
        known = _known_keys(kind, place[:-1])
        near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if found["type"] == "missing":
        return f"{key}: missing"
    value = "" if found["type"] == "value_error" else f", found {found['input']!r}"
    text = str(found["msg"]).removeprefix("Value error, ")
    return f"{key}: {text}{value}" if key else text


def _known_keys(kind: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """The keys of the table at this place."""
    for part in place:
        field = kind.model_fields[str(part)].annotation
        if not (isinstance(field, type) and issubclass(field, BaseModel)):
            return []
        kind = field
    return list(kind.model_fields)
