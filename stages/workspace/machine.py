"""machine.toml: what holds on this machine alone, and is no part of the agreement."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages.workspace.budgets import Budget
from stages.workspace.settings import Dtype, Positive, Role, Settings

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class LocalModels(Settings):
    """Where this machine keeps the base models, instead of the hub."""

    slm: str | None = None
    llm: str | None = None
    clients: dict[str, str] = {}

    def of(self, role: Role, client: int | None) -> str | None:
        """Where a model is; client: who tunes the SLM, if it is a model of that client's own."""
        if role == "slm" and client is not None:
            return self.clients.get(str(client))
        return self.slm if role == "slm" else self.llm


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


SECRET = re.compile(r"pass|secret|token|credential|auth|sas|account_key|connection_string|^key$|pkey", re.IGNORECASE)
"""In the names of options that would be credentials."""


class Exchange(Settings):
    """Where the parties share files, so that none is carried by hand. Credentials never stand here."""

    remote: Annotated[str, Field(pattern=r"^(file|sftp|s3|gs|az|abfs|https?\+webdav)://[^\s:]\S*$")] | None = None
    options: dict[str, str | int | bool] = {}

    @field_validator("remote")
    @classmethod
    def _without_password(cls, remote: str | None) -> str | None:
        host = (remote or "").partition("://")[2].partition("/")[0]
        if "::" in (remote or "") or ":" in host.rpartition("@")[0]:
            raise ValueError("a remote holds no password and is one address; credentials are the library's own")
        return remote

    @field_validator("options")
    @classmethod
    def _without_secrets(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        if found := [name for name in options if SECRET.search(name)]:
            raise ValueError(f"{found[0]} looks like a secret, which stands in no file here; see docs/how-to")
        return options


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
    exchange: Exchange = Exchange()

    def rows_at_once(self, budget: Budget) -> int:
        """How many rows a forward pass takes at most; where that is to be found by trying, what is tried first."""
        asked = self.micro_batch if isinstance(self.micro_batch, int) else budget.batch_size
        return min(budget.batch_size, asked)
