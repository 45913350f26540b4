"""The model card of an export: what manifest, agreement, `prepare` and `evaluate` have written down, as a README.

Nothing in it names a person, a host or a path, and there is no time in it: the same files give the same card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.artefacts.adapter_files import modules_of
from stages.artefacts.manifest import BaseIdentity, Manifest
from stages.artefacts.reading import Artefact, read_manifest
from stages.artefacts.records import ROBUST, Result, TaskScores, attack_of, is_of_base, read_result
from stages.artefacts.subjects import scored_by
from stages.bases.base_names import hub_id
from stages.data.split_file import read_split
from stages.export.cards import template
from stages.files import reading
from stages.parties import names
from stages.study.table_rows import base_of
from stages.workspace.budgets import Budget
from stages.workspace.methods import Method
from stages.workspace.names import ADAPTER_WEIGHTS, AGREEMENT, MANIFEST, RESIDUAL
from stages.workspace.paths import Workspace

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
TAUGHT_ROWS = "rows_from_"
"""What begins the metrics that tell of how many rows somebody has taught the model."""

LOSSES = {
    "slm_ft": "SLM, cross-entropy of the answers, nats a token",
    "slm_adv": "SLM, cross-entropy of the answers under attack, nats a token",
    "slm_kd": "SLM, divergence from the LLM, nats a token",
    "llm_ft": "LLM, cross-entropy of the answers, nats a token",
    "llm_kd": "LLM, divergence from the SLM, nats a token",
    "slm_taught": "SLM, share of the answers at which the LLM taught it",
    "llm_taught": "LLM, share of the answers at which the SLM taught it",
}


TAUGHT: dict[Method, str] = {
    "fedcollm": ", and taught by the clients' averaged small one",
    "fedmkt": " on public rows, on which the clients' models taught it",
}
"""By whom the large model was taught."""

FEDAVG = "clients tune LoRA adapters of a small language model on data that stay where they are; a server averages them"
OWN = "each client tunes a LoRA adapter of a model of its own on data that stay where they are"
AVERAGED = " After each round a server averages the clients' adapters, and all begin the next one with the average."
"""Of FedMKT whose clients tune one model, where aggregation.average says so."""

STEPPED = " The server did not take the average as it was, but a step towards it by {}, which remembers earlier rounds."
"""Where aggregation.server names an optimiser."""
KEPT = (
    " What the separate means of A and B lose of the mean of their products is kept beneath the adapter (FedEx-LoRA, "
    "https://arxiv.org/abs/2410.09432), and is in this folder too: so is the rank of what is here larger than r."
)
"""Where aggregation.combine is "residual"."""
METHODS: dict[Method, str] = {
    "fedcollm": f"FedCoLLM (https://arxiv.org/abs/2411.11707): {FEDAVG} and lets small and large model teach each "
    "other.",
    "fedavg": f"FedAvg, a baseline of FedCoLLM: {FEDAVG}.",
    "fedavg-aux": f"a baseline of FedCoLLM: {FEDAVG} and tunes small and large model on data of its own, each by "
    "itself.",
    "standalone": "a baseline of FedCoLLM: no adapter is averaged, each client goes on with its own.",
    "centralized": "a baseline of FedCoLLM that no federation could have: one party with everyone's data.",
    "fedmkt": f"FedMKT (https://arxiv.org/abs/2406.02224): {OWN}; what travels is what each model knows of public "
    "rows, and the clients' models and the server's large one learn from each other by that.",
    "llm2slm": f"LLM2SLM, a baseline of FedMKT: {OWN}; a large model that stays as it is tells what it knows of public "
    "rows.",
    "standalone-public": f"a baseline of FedMKT: {OWN} and on public rows, and learns from nobody.",
}


def model_card(
    workspace: Workspace, adapter: Artefact, subject: str, *, merged: bool, base_model: str | None, revision: str | None
) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    subject: "slm", "llm", "aggregate" or "client-2". base_model, revision: of the base on a hub, None for a folder.
    """
    manifest = adapter.manifest
    return template(TEMPLATE).render(
        manifest=manifest,
        agreement=workspace.agreement,
        subject=subject,
        modules=modules_of(adapter),
        merged=merged,
        base_model=base_model,
        revision=revision,
        method=method_of(manifest, workspace.agreement.federation.method)
        + (AVERAGED if workspace.agreement.aggregation.average else "")
        + (STEPPED.format(server) if (server := workspace.agreement.aggregation.server) != "none" else "")
        + (KEPT if RESIDUAL in adapter.contents else ""),
        is_public=workspace.agreement.federation.learns_in_public,
        teachers=_teachers(workspace, manifest),
        budget=_budget,
        losses=_losses(manifest),
        is_dealt=workspace.split.exists(),  # else rows are the parties' own, whatever tasks [data] names
        parties=_rows_of_parties(workspace),
        scores=_scores(workspace, adapter, subject),
        evaluate=str(scored_by(manifest.round, subject)),
        hashes=_hashes(adapter),
    )


def method_of(manifest: Manifest, method: Method) -> str:
    """How an adapter was made, in a sentence or two."""
    whose, large = f"The small model of client {manifest.client}", "The large model"
    distilled = method == "fedcollm"
    last = {
        "standalone": f"{whose}, tuned on its own data alone",
        "centralized": f"{large}, tuned on the data of all parties in one place",
    }.get(method) or {
        "client-train": f"{whose}, tuned on its own data from what the server sent",
        "client-distill": f"The model of client {manifest.client}, tuned on its own data and then on public rows"
        + ("" if method == "standalone-public" else ", on which the server's large model taught it"),
        "aggregate": "The average of the clients' small models",
        "slm": "The small model: the average of the clients', then "
        + ("taught by the server's large one" if distilled else "tuned on the server's auxiliary data"),
        "llm": f"{large}: tuned at the server" + TAUGHT.get(method, ""),
    }[manifest.role if manifest.stage == "co-distill" else manifest.stage]
    return f"{last}. Made with {METHODS[method]}"


def _teachers(workspace: Workspace, manifest: Manifest) -> list[tuple[str, str, int]]:
    """With FedMKT: who taught the model in its round, the base of who did, and of how many public rows."""
    found = []
    for key, rows in manifest.metrics.items():
        if not key.startswith(TAUGHT_ROWS):
            continue
        teacher = key.removeprefix(TAUGHT_ROWS)
        number = None if teacher == names.SERVER else names.number_of(teacher)
        name = hub_id(workspace, "llm") if number is None else hub_id(workspace.of_client(number), "slm")
        told = workspace.vocabulary(number)
        if name is None and told.exists():
            base = read_manifest(told)[0].base
            name = f"of architecture {base.architecture}, weights {base.weights_sha256}"
        found.append((names.said(teacher), name or "not known here", int(rows)))
    return found


def _budget(settings: Budget) -> str:
    length = f"{settings.steps} steps" if settings.steps else f"{settings.epochs:g} epochs"
    name = {"adamw": "AdamW", "sgd": "SGD"}.get(settings.optimizer, settings.optimizer.title())
    return f"{length} of {name}, {settings.rows_per_step} rows a step"


def _losses(manifest: Manifest) -> list[tuple[str, str, str]]:
    return [
        (words, f"{manifest.metrics[f'{name}_before']:.4g}", f"{manifest.metrics[f'{name}_after']:.4g}")
        for name, words in LOSSES.items()
        if f"{name}_before" in manifest.metrics
    ]


def _rows_of_parties(workspace: Workspace) -> list[tuple[str, int]]:
    """What `prepare` dealt under this agreement; nothing where the parties have data of their own."""
    if not workspace.split.exists():
        return []
    split = read_split(workspace)
    if split["agreement_sha256"] != workspace.agreement_sha256:
        return []
    return [(party, found["rows"]) for party, found in split["parties"].items()]


@dataclass(frozen=True)
class Score:
    """A line of the card's table: the adapter's value with its standard error, and its base's; "-" without one."""

    task: str
    metric: str
    questions: str
    value: str
    base: str


def _scores(workspace: Workspace, adapter: Artefact, subject: str) -> list[Score]:
    """What `evaluate` measured of this very adapter, beside the same of its base alone; empty if it did not."""
    manifest = adapter.manifest
    ours = _result(workspace.result(manifest.round, subject), manifest.files[ADAPTER_WEIGHTS].sha256, manifest.base)
    alone = "llm" if manifest.role == "llm" else base_of(workspace, subject)
    base = dict(_metrics(_result(workspace.result(None, alone), None, manifest.base)))
    return [
        Score(task, metric, questions, value, base.get((task, metric), ("-", ""))[0])
        for (task, metric), (value, questions) in _metrics(ours)
    ]


def _result(path: Path, adapter_sha256: str | None, base: BaseIdentity) -> dict[str, TaskScores]:
    """The tasks of a result, if it is there and of this adapter (None: of the base alone) on this base."""
    if not path.exists():
        return {}
    result = read_result(path)
    is_this = result.get("adapter_sha256") == adapter_sha256 and is_of_base(result, base)
    return _naming_the_attack(result) if is_this else {}


def _naming_the_attack(result: Result) -> dict[str, TaskScores]:
    """The scores, in which the attack is part of the metric's name: under another one it is another metric."""
    named = f"{ROBUST} ({attack_of(result)})"
    return {
        task: {**found, "metrics": {name.replace(ROBUST, named): one for name, one in found["metrics"].items()}}
        for task, found in result["tasks"].items()
    }


def _metrics(tasks: dict[str, TaskScores]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """(task, metric) -> (value with its standard error, number of questions)."""
    for task, found in tasks.items():
        metrics = found["metrics"]
        for name in sorted(metrics):
            if name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr")
            value = f"{metrics[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            in_all = found.get("questions_in_all", found["questions"])
            asked = f"{found['questions']}" + (f" of {in_all}" if found["questions"] < in_all else "")
            yield (task, name), (value, f"{asked}, {found['cut']} cut" if found.get("cut") else asked)


def _hashes(adapter: Artefact) -> list[tuple[str, str]]:
    manifest = adapter.manifest
    content = adapter.contents.get(RESIDUAL)
    beneath = [] if content is None else [(f"what lies beneath it, `{RESIDUAL}`", reading.sha256(content))]
    return [
        (f"the adapter, `{ADAPTER_WEIGHTS}`", manifest.files[ADAPTER_WEIGHTS].sha256),
        *beneath,
        (f"its manifest, `{MANIFEST}`", adapter.sha256),
        (f"the agreement of all parties, `{AGREEMENT}`", manifest.agreement_sha256),
        ("the base's weights", manifest.base.weights_sha256),
        ("the base's tokenizer", manifest.base.tokenizer_sha256),
    ]
