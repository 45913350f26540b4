"""Which methods a study compares, and in which tables: whose models are scored there, and in which rows.

FedCoLLM's tables are those of its paper. FedMKT has none for a server's SLM, but one for the average of equal models,
and one for each client where clients have models of their own: a mean over unlike models says little.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from stages.parties import names
from stages.runtime.errors import UsageProblem
from stages.study.variants import unlike
from stages.workspace.methods import OF_FEDAVG, Compared, Method
from stages.workspace.paths import Workspace

Table = str
"""llm, the server's LLM; slm, the server's SLM; clients, the mean of the clients' own SLMs; aggregate, their average,
of FedMKT that has one; or client-2, that one's."""

Row = Literal["zero-shot", Compared]

METHODS: tuple[Compared, ...] = get_args(Compared)
FEDCOLLM: tuple[Method, ...] = ("fedcollm", "fedavg", "fedavg-aux", "standalone", "centralized")
"""FedCoLLM and its baselines."""
FEDMKT: tuple[Method, ...] = ("standalone", "centralized", "fedmkt", "llm2slm", "standalone-public")
"""FedMKT and its baselines; where all clients have one SLM, also those of AVERAGED."""
AVERAGED: tuple[Method, ...] = ("fedcollm", "fedavg")

AVERAGES: tuple[Row, ...] = ("fedavg", *OF_FEDAVG)
"""The rows whose last model is the average of the clients', which the server trains no further."""

ROWS: dict[Table, tuple[Row, ...]] = {
    # The server's LLM: the paper's Table 1.
    "llm": ("zero-shot", "centralized", "fedavg-aux", "fedcollm", "fedmkt"),
    # Each client's own SLM at the end, mean over clients: the paper's Table 2.
    "clients": (
        *("zero-shot", "standalone", "standalone-public", *AVERAGES),
        *("fedavg-aux", "llm2slm", "fedcollm", "fedmkt"),
    ),
    # The server's SLM at the end, which the clients would begin the next round with.
    "slm": ("zero-shot", *AVERAGES, "fedavg-aux", "fedcollm"),
}
OWN: tuple[Row, ...] = ("zero-shot", "standalone", "standalone-public", "llm2slm", "fedmkt")
"""The rows of one client's own SLM: FedMKT's Table 2, and two baselines."""
OF_AVERAGE: tuple[Row, ...] = ("zero-shot", *AVERAGES, "fedmkt")
"""The rows of the average of clients' SLMs, which they would begin the next round with: see aggregation.average."""


def is_of_fedmkt(workspace: Workspace) -> bool:
    """Whether a study of this workspace is about FedMKT: by its method, or since clients' models are set apart.

    Clients that differ in rank alone tune one model, which is averaged.
    """
    agreement = workspace.agreement
    is_apart = any(one.slm or one.learning_rate for one in agreement.clients.values())
    return agreement.federation.learns_in_public or is_apart


def own_method(workspace: Workspace) -> Method:
    """The method that all others are compared with."""
    return "fedmkt" if is_of_fedmkt(workspace) else "fedcollm"


def methods_of(workspace: Workspace) -> list[Compared]:
    """The methods that a study of this workspace compares, unless others are asked for."""
    if not is_of_fedmkt(workspace):
        return list(FEDCOLLM)
    without = [method for methods in left_out(workspace).values() for method in methods]
    return [method for method in METHODS if method in (*FEDMKT, *AVERAGED) and method not in without]


def left_out(workspace: Workspace) -> dict[str, tuple[Method, ...]]:
    """FedMKT's baselines that this workspace cannot have, by the reason."""
    if not is_of_fedmkt(workspace):
        return {}
    if why := unlike(workspace.agreement):
        return {f"they average adapters of one model: {why}": AVERAGED}
    from stages.models.loading import Models

    try:
        Models(workspace).check_both()
    except UsageProblem:
        return {"SLM and LLM have different tokenizers": ("fedcollm",)}
    return {}


def rows_of(workspace: Workspace) -> Mapping[Table, tuple[Row, ...]]:
    """The tables of a study, and which rows each can have."""
    if not is_of_fedmkt(workspace):
        return ROWS
    if workspace.agreement.is_of_one_slm:
        average = {"aggregate": OF_AVERAGE} if workspace.agreement.averages else {}
        return {"llm": ROWS["llm"], "clients": ROWS["clients"], **average}
    return {"llm": ROWS["llm"]} | {names.client(k): OWN for k in workspace.clients}


def base_of(workspace: Workspace, subject: str) -> str:
    """Under which name the base of a model is scored: slm, llm, or, of a client's own model, client-2."""
    if not subject.startswith("client-"):
        return "llm" if subject == "llm" else "slm"
    return subject if workspace.of_client(names.number_of(subject)).own_model else "slm"


def subjects(table: Table, row: Row, workspace: Workspace) -> list[str]:
    """Whom a row of a table scores."""
    if table == "clients" or row == "centralized":
        last = workspace.agreement.federation.rounds
        return [f"client-{client}" for client in workspace.client_adapters(last)]
    return ["aggregate" if table == "slm" and row in AVERAGES else table]
