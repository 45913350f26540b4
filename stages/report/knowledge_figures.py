"""The charts of a workspace of FedMKT, or of its baselines: what applies to its method, and nothing that does not."""

from __future__ import annotations

import functools

from stages.artefacts.reading import Manifests
from stages.bases.base_names import name_of
from stages.parties import names
from stages.report import bar_charts, figures, findings, knowledge_findings, line_charts, server_figures
from stages.report.charts import Row, Spec
from stages.report.drawing import Figure
from stages.report.findings import shortened
from stages.study.table_rows import is_of_fedmkt
from stages.workspace.paths import Workspace


def figures_of(workspace: Workspace, metric: str, manifests: Manifests | None = None) -> list[Figure]:
    """All charts that apply to a workspace, in the order of the page. manifests: those that this command has read."""
    server = workspace.agreement.aggregation.server
    stepped = [] if server == "none" else [server_figures.steps(server)]
    if not is_of_fedmkt(workspace):
        return [*figures.figures(metric, manifests), *stepped]
    federation = workspace.agreement.federation
    llm = [figures.accuracy("llm", figures.MODELS["llm"], metric)] if federation.clients_tell else []
    found = [*llm, *_of_clients(workspace, metric), figures.client_losses()]
    if federation.learns_in_public:
        found.append(_losses("ft"))
    if federation.server_tells:
        found += [_losses("kd"), _choices_of_clients(), _fits()]
    if federation.clients_tell:
        found += [_losses_of_llm(), _choices_of_llm()]
    averages = workspace.agreement.averages
    found += [figures.lost_by_averaging(), *figures.drifts(), *stepped] if averages else []
    traffic = figures.traffic(functools.partial(_caption_of_traffic, averages=averages), manifests)
    return [*found, *figures.splits(), traffic, figures.times()]


def _of_clients(workspace: Workspace, metric: str) -> list[Figure]:
    if workspace.agreement.is_of_one_slm:
        models = {"clients": figures.MODELS["clients"]}
        models |= {"aggregate": "The average of the clients' SLMs"} if workspace.agreement.averages else {}
        return [figures.accuracy(model, title, metric) for model, title in models.items()]
    titles = {k: f"Client {k}'s SLM, {shortened(name_of(workspace.of_client(k), 'slm'))}" for k in workspace.clients}
    return [figures.accuracy(names.client(k), title, metric) for k, title in titles.items()]


def _losses(term: str) -> Figure:
    what = {
        "ft": "Cross-entropy of the public answers",
        "kd": "Divergence from what the LLM has told, where it teaches",
    }
    equation = {"ft": "Eq. 4", "kd": "Eq. 8"}
    return Figure(
        "losses",
        f"loss-client-distill-{term}",
        f"client-distill: L_{term.upper()} of each client",
        functools.partial(knowledge_findings.public_losses, term=term),
        functools.partial(figures.loss_lines, series="client"),
        lambda rows: f"{what[term]} ({equation[term]}). {figures.points(rows)}{figures.of_many(rows, 'client')}",
        "No log of client-distill is on this machine: each client keeps its own.",
    )


def _losses_of_llm() -> Figure:
    return Figure(
        "losses",
        "loss-co-distill-llm",
        "co-distill: L_FT and L_KD of the LLM",
        functools.partial(findings.distillation_losses, model="llm"),
        functools.partial(figures.loss_lines, series="term"),
        lambda rows: (
            "L_FT: the public answers; L_KD: the divergence from what clients have told, where they teach (Eq. 7). "
            f"{figures.points(rows)}"
        ),
        "No log of co-distill is on this machine: the server has it.",
    )


def _choices_of_llm() -> Figure:
    return Figure(
        "choices",
        "choices-llm",
        "Who teaches the LLM",
        knowledge_findings.choices_of_llm,
        functools.partial(_rows_by_round, series="teacher"),
        lambda rows: (
            f"Public rows of which the LLM learned from each client.{_of_none(rows, 'teacher', 'taught it nothing')}"
            f"{figures.of_many(rows, 'teacher')}"
        ),
        "The LLM has not learned from clients on this machine: the server has it.",
    )


def _choices_of_clients() -> Figure:
    return Figure(
        "choices",
        "choices-clients",
        "What the LLM teaches",
        knowledge_findings.choices_of_clients,
        functools.partial(_rows_by_round, series="client"),
        lambda rows: (
            f"Public rows of which each client learned from the LLM.{_of_none(rows, 'client', 'learned nothing')}"
            f"{figures.of_many(rows, 'client')}"
        ),
        "No client has learned from the LLM on this machine.",
    )


def _rows_by_round(rows: list[Row], series: str) -> Spec:
    return line_charts.lines(rows, x="round", y="rows", series=series, titles=("round", "public rows"))


def _of_none(rows: list[Row], key: str, what: str) -> str:
    """Who was never chosen, in a sentence."""
    chosen = {row[key] for row in rows if row["rows"]}
    never = [name for name in dict.fromkeys(row[key] for row in rows) if name not in chosen]
    return f" {', '.join(never).capitalize()} {what}." if never else ""


def _fits() -> Figure:
    def spec(rows: list[Row]) -> Spec:
        return bar_charts.bars(
            rows, x="client", y="reached_percent", series="teacher", titles=("", "% of answer positions"), form="d"
        )

    return Figure(
        "choices",
        "alignment",
        "How far each teacher reaches",
        knowledge_findings.fits,
        spec,
        lambda rows: (
            "Of the student's answer positions, the share at which the teacher has read the same bytes and has a token "
            f"for what comes next. The same bytes: {min(row['coverage_percent'] for row in rows):.0f} % at least."
        ),
        "No two vocabularies have been aligned on this machine, or there were no rows to measure on.",
    )


def _caption_of_traffic(rows: list[Row], *, averages: bool) -> str:
    total = sum(row["bytes"] for row in rows)
    adapters = f"Adapters, which are averaged, have {max(row['parameters'] for row in rows):,} numbers each."
    also = adapters if averages else "No adapter travels."
    return f"{total / 1e6:,.2f} MB in all: vocabularies, and what models know of the public rows. {also}"
