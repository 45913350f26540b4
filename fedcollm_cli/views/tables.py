"""Tables in words: what compare and sweep found."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING

from fedcollm_cli.views import figures
from fedcollm_cli.views.sheets import Sheet, Tables
from stages.paper.reported import LABELS
from stages.parties.names import said
from stages.workspace import changing
from stages.workspace.commands import Command

if TYPE_CHECKING:
    from stages.federation.sweep import Swept
    from stages.study.budgets import Spent
    from stages.study.comparison import Comparison
    from stages.study.statistics import Difference, Estimate
    from stages.study.table_rows import Row, Table

TITLES: dict[Table, str] = {
    "llm": "the server's LLM (the paper's Table 1)",
    "clients": "the clients' own SLMs, mean of {clients} (the paper's Table 2)",
    "slm": "the server's SLM, which the clients would go on with",
    "aggregate": "the average of the clients' SLMs, which they would go on with",
}
POINTS = "points [95 % interval; * where it excludes zero]"
TITLES_OF_FEDMKT = TITLES | {"llm": "the server's LLM", "clients": TITLES["clients"].replace("Table 2", "Table 3")}
SHORT: dict[Table, str] = {"llm": "the LLM", "clients": "clients' own SLMs", "slm": "the server's SLM"}
SHORT |= {"aggregate": "their average"}


def comparison(found: Comparison) -> Tables:
    """All tables, and what they rest on."""
    return Tables(sheets(found), notes(found), *figures.of_comparison(found))


def sheets(found: Comparison) -> list[Sheet]:
    """Tables 1 and 2, the server's SLM, the differences, the budgets."""
    own = [name for name in found.tables if is_of_client(name)]
    tables = [_accuracies(found, name) for name in found.tables if name not in own]
    tables += [_each_client(found, own)] if own else []
    differences = _differences_of_each if own else _differences
    return [*tables, *([differences(found)] if any(found.differences.values()) else []), _budgets(found)]


def is_of_client(name: Table) -> bool:
    """Whether a table is of one client's own model."""
    return name not in TITLES


def short(name: Table) -> str:
    """Whose models a table scores."""
    return SHORT.get(name) or f"{said(name)}'s SLM"


def _accuracies(found: Comparison, name: Table) -> Sheet:
    tasks, in_paper = _columns(found, [name])
    titles = TITLES if "slm" in found.tables else TITLES_OF_FEDMKT
    title = titles[name].format(clients=found.clients)
    columns = ["method", *tasks, *(f"{task}, paper" for task in in_paper)]
    return Sheet(f"{title}: {found.metric} in %", columns, _lines(found, name, tasks, in_paper))


def _each_client(found: Comparison, names: list[Table]) -> Sheet:
    """A line for each client's own model and method."""
    tasks, in_paper = _columns(found, names)
    columns = ["client", "method", *tasks, *(f"{task}, paper" for task in in_paper)]
    lines = [[said(name), *line] for name in names for line in _lines(found, name, tasks, in_paper)]
    return Sheet(f"each client's own SLM (the paper's Table 2): {found.metric} in %", columns, lines, named=2, left=2)


def _columns(found: Comparison, names: list[Table]) -> tuple[list[str], list[str]]:
    """The tasks of some tables, and those for which the paper has a figure."""
    tasks = _tasks(found.tables[names[0]])
    reported = [row for name in names for row in _reported(found, name).values()]
    return tasks, [task for task in tasks if any(task in row for row in reported)]


def _lines(found: Comparison, name: Table, tasks: list[str], in_paper: list[str]) -> list[list[str]]:
    reported = _reported(found, name)
    return [
        [
            LABELS[row],
            *(_accuracy(by_task[task]) for task in tasks),
            *(str(reported.get(row, {}).get(task, "-")) for task in in_paper),
        ]
        for row, by_task in found.tables[name].items()
    ]


def _reported(found: Comparison, name: Table) -> dict[Row, dict[str, float]]:
    """The paper's figures beside a table, if they were asked for: percent, by row and task."""
    return found.paper.tables.get(name, {}) if found.paper else {}


def _tasks(rows: Mapping[Row, Mapping[str, object]]) -> list[str]:
    """The tasks' columns; that of all together only where there are several."""
    tasks = list(next(iter(rows.values())))
    return tasks if len(tasks) > 2 else tasks[:1]


def _accuracy(found: Estimate) -> str:
    return f"{100 * found.mean:.1f}" + ("" if found.deviation is None else f" ± {100 * found.deviation:.1f}")


def _differences(found: Comparison) -> Sheet:
    """FedCoLLM minus each other method, over all questions: a column for each table."""
    tables = found.differences
    lines = [[LABELS[row], *(_minus(tables[name], row) for name in tables)] for row in _others(found)]
    title = f"{LABELS[found.compared]} minus the other methods, {POINTS}"
    return Sheet(title, ["minus", *(short(name) for name in tables)], lines)


def _differences_of_each(found: Comparison) -> Sheet:
    """FedMKT minus each other method, a line for each model: of clients there can be many."""
    others = _others(found)
    mean = {"clients": "mean of clients"}
    lines = [
        [mean.get(name, short(name)), *(_minus(rows, row) for row in others)]
        for name, rows in found.differences.items()
    ]
    title = f"{LABELS[found.compared]} minus the other methods, {POINTS}"
    return Sheet(title, ["of", *(f"minus {LABELS[row]}" for row in others)], lines)


def _others(found: Comparison) -> list[Row]:
    return [row for row in LABELS if any(row in rows for rows in found.differences.values())]  # type: ignore[misc]


def _minus(rows: Mapping[Row, Mapping[str, Difference]], row: Row) -> str:
    return _difference(_overall(rows, row)) if row in rows else "-"


def _overall(rows: Mapping[Row, Mapping[str, Difference]], row: Row) -> Difference:
    return rows[row][_tasks(rows)[-1]]


def _difference(found: Difference) -> str:
    mean, half = 100 * found.mean, found.half_width
    if half is None:
        return f"{mean:+.1f} (one {'seed' if found.seeds_error is None else 'question'})"
    return f"{mean:+.1f} [{mean - 100 * half:.1f}, {mean + 100 * half:.1f}]{'*' if found.is_supported else ''}"


def _bought(found: Difference) -> str:
    if found.half_width is None:
        reading = f" (one {'seed' if found.seeds_error is None else 'question'}: no error bar)"
    elif found.half_width == 0:
        reading = " (the same answers: distillation has not reached them)"
    else:
        reading = "" if found.is_supported else ", not beyond its error bars"
    return f"{100 * found.mean:+.1f}{reading}"


def _budgets(found: Comparison) -> Sheet:
    rows = []
    for method, parties in found.budgets.items():
        clients = [done for party, done in parties.items() if party != "server"]
        server = [parties["server"]] if "server" in parties else []
        each = [_range(clients, key) for key in ("steps", "examples", "tokens")]
        rows.append([LABELS[method], *each, *(_range(server, key) for key in ("steps", "examples", "tokens"))])
    columns = [f"{party} {key}" for party in ("client", "server") for key in ("steps", "examples", "tokens")]
    return Sheet(f"what training took of each party, {found.rounds} rounds together", ["method", *columns], rows)


def _range(clients: list[Spent], key: str) -> str:
    values = sorted(set(map(attrgetter(key), clients)))
    return "-".join(map(str, dict.fromkeys([values[0], values[-1]]))) if values else "-"


def notes(found: Comparison) -> list[str]:
    """What the tables rest on."""
    rows = found.tables.get("slm") or found.tables["llm"]
    last = next(iter(rows.values()))[_tasks(rows)[-1]]
    seeds = ", ".join(map(str, found.seeds))
    several = len(found.seeds) > 1
    lines = [
        f"seed{'s' if several else ''} {seeds}"
        + ("; ± is the standard deviation over seeds" if several else ": no error bar")
        + f"; {last.questions} questions, themselves a sample: ± {100 * last.binomial:.1f}",
        *found.remarks,
    ]
    lines.append(
        "examples: a row counts each time it is trained on, and the last step of a stage is filled up with rows"
    )
    if "fedavg-aux" in rows:
        lines.append("FedAvg + D^a: the server trains both models on the auxiliary data, without distillation")
    if "standalone-public" in found.methods:
        lines.append("Standalone + D_p: each client trains on the public rows too, and learns from nobody")
    plain: Row = "fedavg-aux" if found.compared == "fedcollm" else "standalone-public"
    if bought := [(name, rows) for name, rows in found.differences.items() if plain in rows]:
        words = [f"{short(name)} {_bought(_overall(rows, plain))}" for name, rows in bought]
        what = "distillation and averaging" if "aggregate" in found.tables else "distillation"
        lines.append(f"what {what} bought beyond that, in points: {'; '.join(words)}")
    if found.paper:
        lines.append(f"paper: setting {found.paper.setting}; {found.paper.source}")
        if found.paper.other_models:
            lines.append(f"the paper's figures are of other models: {'; '.join(found.paper.other_models)}")
    if found.absent:
        lines.append("not run: " + "; ".join(str(Command("run", method=method)) for method in found.absent))
    return lines


def swept(found: Swept) -> Tables:
    """A row for each combination of settings: the models' scores, and their differences from the first row's."""
    axes = [key.rpartition(".")[2] for key in found.axes]
    values = [[changing.in_words(row.settings[key]) for key in found.axes] for row in found.rows]
    tables = list(found.rows[0].scores)
    columns = [*axes, *(short(table) for table in tables)]
    scores = [[_accuracy(row.scores[table]) for table in tables] for row in found.rows]
    minus = [[_difference(row.minus_first[table]) for table in tables] for row in found.rows if row.minus_first]
    seeds = f"seed{'s' if len(found.seeds) > 1 else ''} {', '.join(map(str, found.seeds))}"
    found_sheets = [
        Sheet(f"{found.metric} in %, {seeds}", columns, _joined(values, scores), len(axes)),
        *([Sheet(f"minus the first row, {POINTS}", columns, _joined(values[1:], minus), len(axes))] if minus else []),
    ]
    return Tables(found_sheets, found.remarks, *figures.of_sweep(found))


def _joined(lefts: list[list[str]], rights: list[list[str]]) -> list[list[str]]:
    return [[*left, *right] for left, right in zip(lefts, rights, strict=True)]
