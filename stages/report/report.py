"""report: one self-contained page on a workspace: charts, tables, settings; and every chart's data as CSV.

Reads results/, manifests, exchanged adapters and this machine's private logs, and what compare and audit read.
Writes results/report: index.html and a CSV file for each chart, nothing of which needs a network or a script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Manifests
from stages.audit.audit import audit
from stages.audit.checks import lines, result
from stages.bases.base_names import name_of
from stages.files import writing
from stages.progress.status import status
from stages.report import attacked, own_rows, own_tasks, swept
from stages.report.heading import listed, measured
from stages.runtime.errors import NotReady, Problem
from stages.runtime.events import Event, Report, ignore
from stages.runtime.texts import in_line
from stages.study.comparison import ALL, Comparison, compare
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.report.charts import Chart
    from stages.report.drawing import Absent
    from stages.study.statistics import Difference
    from stages.study.table_rows import Row

    Differences = Mapping[Row, Mapping[str, Difference]]

PAGE = "index.html"
MOST_CLIENTS_NAMED = 8
"""Of more clients the digests are left out: the aggregate's manifest has them."""


class Words(Protocol):
    """A table in words."""

    @property
    def title(self) -> str:
        """What it shows."""

    @property
    def columns(self) -> list[str]:
        """Their names."""

    @property
    def rows(self) -> list[list[str]]:
        """Their cells."""


InWords = Callable[[Comparison], tuple[Sequence[Words], Sequence[str]]]
"""What compare found, as tables in words and the notes below them: the command line's way of putting it."""


@dataclass(frozen=True)
class Written:
    """The page's path, each chart's CSV file, and what is left out and why; paths as seen from the workspace."""

    path: str
    charts: dict[str, str]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Headline:
    """The last accuracy of one model by the workspace's own method, and what the error bars let one say of it."""

    title: str
    value: str
    readings: list[str]


@dataclass(frozen=True)
class Audited:
    """What audit finds: a row for each problem, and for each check without one: id, level, check and text."""

    rows: Sequence[tuple[str, str, str, str]]
    result: str


def write_report(workspace: Workspace, *, in_words: InWords, metric: str = "acc", report: Report = ignore) -> Written:
    """Write the page and its CSV files.

    Raises NotReady, with the next command, for a workspace that holds neither an adapter nor a result. The same files
    give the same bytes again.
    """
    from stages.report.charts import Chart
    from stages.report.drawing import draw
    from stages.report.knowledge_figures import figures_of
    from stages.report.page import render

    report(Event("stage", "report"))
    manifests = Manifests()
    planned = figures_of(workspace, metric, manifests)
    drawn: list[tuple[str, Chart | Absent]] = []
    for number, figure in enumerate(planned, 1):
        drawn.append((figure.section, draw(figure, workspace)))
        report(Event("step", figure.title, step=number, total=len(planned)))
    charts = [one for _, one in drawn if isinstance(one, Chart)]
    if not any(isinstance(one, Chart) for section, one in drawn if section != "data"):
        mend = status(workspace).next_command or f"{Command('status')} tells what this machine waits for"
        raise NotReady("there is nothing to report yet: no adapter, no log, no result", where=workspace.root, mend=mend)
    compared = _compared(workspace, metric, manifests)
    page = render(drawn, _words(workspace, charts, compared, in_words, manifests, metric=metric))
    contents = {f"{chart.name}.csv": chart.csv().encode() for chart in charts}
    writing.publish(workspace.report, contents | {PAGE: page.encode(errors="backslashreplace")})
    return Written(
        path=workspace.shown(workspace.report / PAGE),
        charts={chart.name: workspace.shown(workspace.report / f"{chart.name}.csv") for chart in charts},
        left_out={one.name: one.reason for _, one in drawn if not isinstance(one, Chart)}
        | ({"tables": compared} if isinstance(compared, str) else {}),
    )


def _compared(workspace: Workspace, metric: str, manifests: Manifests) -> Comparison | str:
    """What compare finds, or why it refuses."""
    from stages.report.drawing import in_sentences

    try:
        return compare(workspace, metric=metric, manifests=manifests)
    except Problem as problem:
        return in_sentences(problem)


def _words(
    workspace: Workspace,
    charts: list[Chart],
    compared: Comparison | str,
    in_words: InWords,
    manifests: Manifests,
    *,
    metric: str,
) -> dict[str, Any]:
    """Everything on the page but the charts, by the template's names."""
    import tomlkit

    from stages.report.page import without_folders

    tables, notes = ([], []) if isinstance(compared, str) else in_words(compared)
    differences = {} if isinstance(compared, str) else compared.differences
    by_chart = {f"accuracy-{table}": rows for table, rows in differences.items()}
    accuracies = [chart for chart in charts if chart.name.startswith("accuracy-")]
    headlines = [_headline(chart, workspace, by_chart.get(chart.name, {})) for chart in accuracies]
    return {
        "name": workspace.agreement.federation.name,
        "measured": measured(workspace),
        "headline": [one for one in headlines if one],
        "summary": _summary(charts, compared) + _left_out(workspace, manifests),
        "refusal": without_folders(compared) if isinstance(compared, str) else "",
        "tables": [*tables, *_more_tables(workspace, metric)],
        "notes": notes,
        "settings_name": AGREEMENT,
        "settings": without_folders(tomlkit.dumps(workspace.agreement.model_dump(exclude_none=True))),
        "audit": _audited(workspace),
        "provenance": _provenance(workspace, manifests),
    }


def _more_tables(workspace: Workspace, metric: str) -> list[Words]:
    """What other commands than compare have found."""
    return [
        *attacked.tables(workspace),
        *swept.tables(workspace, metric),
        *own_tasks.tables(workspace),
        *own_rows.tables(workspace),
    ]


def _audited(workspace: Workspace) -> Audited:
    from stages.report.page import without_folders

    try:
        found = audit([workspace.root])
    except NotReady as problem:
        return Audited([], problem.message)
    rows = [(one.id, one.level, one.check, in_line(without_folders(one.text))) for one in lines(found)]
    return Audited(rows, result(found, strict=False))


def _headline(chart: Chart, workspace: Workspace, differences: Differences) -> Headline | None:
    from stages.paper.reported import LABELS

    own = [row for row in chart.rows if row["method"] == LABELS[workspace.agreement.federation.method]]
    if not own:
        return None
    last = own[-1]
    base = [f"base alone {row['accuracy_percent']:.1f} %" for row in chart.rows if row["round"] == 0]
    return Headline(
        f"{chart.title}, round {last['round']}",
        f"{last['accuracy_percent']:.1f} ± {last['error_points']:.1f}",
        base + verdicts(differences),
    )


def verdicts(differences: Differences) -> list[str]:
    """What compare's differences of one table let one say; of one seed, nothing."""
    from stages.paper.reported import LABELS

    readings: dict[str, list[str]] = {"higher than": [], "lower than": [], "no difference shown from": []}
    for other, by_task in differences.items():
        found = by_task[ALL]
        sign = "higher than" if found.mean > 0 else "lower than"
        if found.half_width is not None:
            readings[sign if found.is_supported else "no difference shown from"].append(LABELS[other])
    return [f"{reading} {listed(names)}" for reading, names in readings.items() if names]


def _summary(charts: list[Chart], compared: Comparison | str) -> str:
    """What the figures above it are, and how far they can be trusted."""
    scored = [chart.rows[-1] for chart in charts if chart.name.startswith("accuracy-")]
    if not scored:
        return f"Nothing has been scored yet: {Command('run')} scores every round, {Command('evaluate')} a single one."
    of = f"Shares of right answers to {scored[0]['questions']} questions"
    if isinstance(compared, str):
        return f"{of}; what ± is, each chart says. Methods are not compared here; the tables say why."
    if len(compared.seeds) == 1:
        return (
            f"{of}; ± is the questions' binomial standard error. From one seed no difference between methods can be "
            f"claimed: {Command('compare', seeds='1,2,3')} runs more."
        )
    return (
        f"{of}; ± is the standard deviation over seeds. A difference is named only where the 95 % interval over seeds "
        "and questions leaves no doubt of its sign."
    )


def _left_out(workspace: Workspace, manifests: Manifests) -> str:
    """What the scores lack, and which are of other tasks than lie here now."""
    from stages.report.page import without_folders
    from stages.study.results import remarks

    stale = status(workspace, manifests=manifests).stale
    lines = [*remarks([workspace]), *([f"stale, and left out: {'; '.join(stale)}"] if stale else [])]
    return "".join(f" {line[:1].upper()}{line[1:]}." for line in map(in_line, map(without_folders, lines)))


def _provenance(workspace: Workspace, manifests: Manifests) -> list[tuple[str, str]]:
    """The digests that this page can be held against, and the versions of what made the adapters."""
    last: dict[str, tuple[Manifest, str]] = {}
    for round in range(1, workspace.agreement.federation.rounds + 1):
        places = [workspace.broadcast(round), workspace.aggregate(round), workspace.slm(round), workspace.llm(round)]
        for place in [*places, *(workspace.client_adapter(round, client) for client in workspace.clients)]:
            if place.exists():
                try:
                    last[workspace.shown(place)] = manifests.of(place)
                except Problem:  # fedcollm status and audit tell of damage
                    continue
    pairs = [(AGREEMENT, workspace.agreement_sha256)]
    pairs += _bases(workspace, [manifest for manifest, _ in last.values()])
    newest = max((manifest.round for manifest, _ in last.values()), default=0)
    pairs += [
        (f"{place}, manifest", digest)
        for place, (manifest, digest) in last.items()
        if manifest.round == newest and (manifest.client is None or len(workspace.clients) <= MOST_CLIENTS_NAMED)
    ]
    versions: dict[str, set[str]] = {}
    for manifest, _ in last.values():
        for library, version in manifest.versions.items():
            versions.setdefault(library, set()).add(version)
    return pairs + [(library, ", ".join(sorted(found))) for library, found in sorted(versions.items())]


def _bases(workspace: Workspace, manifests: list[Manifest]) -> list[tuple[str, str]]:
    """The digests of each base that was tuned; of a client's own model with its number."""
    from stages.report.page import without_folders

    pairs: dict[str, tuple[str, str]] = {}
    for role in ("slm", "llm"):
        for manifest in [manifest for manifest in manifests if manifest.role == role]:
            own = workspace if manifest.client is None else workspace.of_client(manifest.client)
            whose = f"client {own.own_model}'s SLM" if own.own_model else role.upper()
            base = f"{whose} base, {manifest.base.architecture}"
            if (name := name_of(own, role)) != (agreed := own.agreement.model_of(role).model):
                base = f"{base}; here {name}, not known to be {agreed}"
            pairs.setdefault(f"{whose} base", (in_line(without_folders(base)), manifest.base.weights_sha256))
            pairs.setdefault(f"{whose} tokenizer", (f"{whose} tokenizer", manifest.base.tokenizer_sha256))
    return list(pairs.values())
