"""Every chart of the report: what it is called, which rows it shows, how they are drawn, and what one reads off it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, Literal

from stages.aggregation.drift import drift
from stages.artefacts.reading import Manifests
from stages.paper.reported import LABELS
from stages.report import bar_charts, findings, line_charts
from stages.report.charts import Row, Spec
from stages.report.drawing import MOST_DRAWN, MOST_PARTED, STYLE_OF, Figure
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

MODELS = {
    "llm": "The server's LLM",
    "slm": "The server's SLM",
    "clients": "The clients' own SLMs, mean",
}


def figures(metric: str, manifests: Manifests | None = None) -> list[Figure]:
    """All of FedCoLLM's, in the order of the page. manifests: those that this command has read."""
    return [
        *(accuracy(model, title, metric) for model, title in MODELS.items()),
        client_losses(),
        *(_distillation(model) for model in ("slm", "llm")),
        lost_by_averaging(),
        *drifts(),
        *splits(),
        traffic(manifests=manifests),
        times(),
    ]


def accuracy(model: str, title: str, metric: str) -> Figure:
    """One model's, by method, after each round."""

    def rows(workspace: Workspace) -> list[Row]:
        found = findings.accuracies(workspace, model, metric)
        return [row | {"method": LABELS[row["method"]]} for row in found] if any(row["round"] for row in found) else []

    def spec(rows: list[Row]) -> Spec:
        return line_charts.lines_with_errors(
            rows,
            x="round",
            y="accuracy_percent",
            error="error_points",
            series="method",
            start=LABELS["zero-shot"],
            titles=("round (0: the base alone)", f"{metric}, %"),
            styles=STYLE_OF,
        )

    def caption(rows: list[Row]) -> str:
        seeds = max(row["seeds"] for row in rows)
        over_seeds = f"Bars: the standard deviation over {seeds} seeds"
        over_questions = f"the binomial standard error of {rows[0]['questions']} questions"
        of = {row["error_of"] for row in rows if row["round"]}
        which = {
            frozenset({"seeds"}): f"{over_seeds}; at round 0, {over_questions}.",
            frozenset({"questions"}): f"One seed: bars are {over_questions}.",
        }.get(frozenset(of), f"{over_seeds}; where there is one seed, and at round 0, {over_questions}.")
        return f"Share of right answers after each round that was scored. {which}"

    nothing = "None of its rounds has been scored: "
    nothing += f"{Command('run')} scores every round, {Command('evaluate')} a single one."
    return Figure("accuracy", f"accuracy-{model}", title, rows, spec, caption, nothing)


def client_losses() -> Figure:
    """Of local training."""
    return Figure(
        "losses",
        "loss-client-train",
        "client-train: L_FT of each client",
        findings.client_losses,
        functools.partial(loss_lines, series="client"),
        lambda rows: f"Cross-entropy of the answer tokens (Eq. 3). {points(rows)}{of_many(rows, 'client')}",
        "No log of a client's training is on this machine, or [privacy] is on: each client keeps its own.",
    )


def _distillation(model: str) -> Figure:
    name = model.upper()
    other = "SLM" if name == "LLM" else "LLM"
    return Figure(
        "losses",
        f"loss-co-distill-{model}",
        f"co-distill: L_FT and L_KD of the {name}",
        functools.partial(findings.distillation_losses, model=model),
        functools.partial(loss_lines, series="term"),
        lambda rows: (
            f"L_FT: the auxiliary answers; L_KD: the divergence from the {other} (Eq. 4 and 5). {points(rows)}"
        ),
        "No log of co-distill is on this machine: the server has it, if the method distils.",
    )


def loss_lines(rows: list[Row], series: str) -> Spec:
    """A line for each series, which ends with its round where rounds are few."""
    titles = ("step, counted over all rounds", "nats a token")
    part = "round" if _parts_rounds(rows) else None
    return line_charts.lines(rows, x="step", y="loss", series=series, titles=titles, points=False, part=part)


def _parts_rounds(rows: Sequence[Row]) -> bool:
    """Whether lines end with their rounds: not where a round is but a few points."""
    return len({row["round"] for row in rows}) <= MOST_PARTED


def points(rows: list[Row]) -> str:
    """What a point of a line of losses is, in a sentence."""
    steps = max(row["steps"] for row in rows)
    each = "Every step is shown" if steps == 1 else f"A point is the mean of {steps} steps"
    return f"{each}; a line ends with its round." if _parts_rounds(rows) else f"{each}."


def of_many(rows: Sequence[Row], series: str) -> str:
    """What a line is where there are too many for one each, in a sentence."""
    count = len({row[series] for row in rows})
    return f" Line: the mean of {count} clients; band: lowest to highest." if count > line_charts.MOST_SERIES else ""


def caption_of_traffic(rows: list[Row]) -> str:
    """How much it is together, and what travels."""
    total = sum(row["bytes"] for row in rows)
    return (
        f"{total / 1e6:,.2f} MB in all, in adapters of {rows[0]['parameters']:,} numbers each; "
        "a broadcast is counted once for each client."
    )


def traffic(caption: Callable[[list[Row]], str] = caption_of_traffic, manifests: Manifests | None = None) -> Figure:
    """What has travelled."""
    return Figure(
        "costs",
        "bytes",
        "Bytes per round",
        functools.partial(findings.traffic, manifests=manifests),
        lambda rows: bar_charts.bars(rows, x="round", y="bytes", series="direction", titles=("round", "bytes")),
        caption,
        "Nothing has been exchanged yet.",
    )


def lost_by_averaging() -> Figure:
    """What averaging loses."""

    def spec(rows: list[Row]) -> Spec:
        drawn = _some(rows, "round")
        return bar_charts.grid(drawn, x="round", y="layer", value="lost_percent", titles=("round", ""), form=".1f")

    def caption(rows: list[Row]) -> str:
        said = {
            "cross_term": "‖mean(BA) − mean(B)mean(A)‖ / ‖mean(BA)‖ in %: what is lost by averaging A and B apart.",
            "residual": "‖mean(BA) − mean(B)mean(A)‖ / ‖mean(BA)‖ in %: what averaging A and B apart would lose; it is "
            "kept beneath the adapter, so that nothing is lost.",
            "remainder": "‖mean(BA) − BA‖ / ‖mean(BA)‖ in %: what is lost by cutting mean(BA) back to the rank of BA.",
        }
        return f"{said[rows[0]['what']]}{_of_some(rows, 'round')}"

    nothing = "There is no aggregate on this machine: the server has it, if the method averages."
    return Figure(
        "averaging",
        "lost-by-averaging",
        "What averaging loses, per layer",
        findings.lost_by_averaging,
        spec,
        caption,
        nothing,
    )


def _some(rows: list[Row], key: str) -> list[Row]:
    """Only so many rounds or parties as a grid has room for, evenly chosen, the last among them."""
    values = list(dict.fromkeys(row[key] for row in rows))
    step = ceil(len(values) / MOST_DRAWN[key])
    kept = set(values[::-1][::step])
    return [row for row in rows if row[key] in kept]


def _of_some(rows: list[Row], key: str) -> str:
    every, drawn = ({row[key] for row in some} for some in (rows, _some(rows, key)))
    return f" {len(drawn)} of {len(every)} are drawn; the data has all." if len(drawn) < len(every) else ""


def drifts() -> list[Figure]:
    """How far clients go before they are averaged, and whether the same way."""

    @functools.cache  # both charts show the same adapters
    def rows(workspace: Workspace) -> list[Row]:
        return [
            {"client": f"client {one.client}", "round": one.round, "norm": one.norm, "cosine": one.cosine}
            for round in range(1, workspace.agreement.federation.rounds + 1)
            for one in drift(workspace, round)
        ]

    def figure(key: str, title: str, caption: str) -> Figure:
        return Figure(
            "averaging",
            f"drift-{key}",
            title,
            rows,
            lambda rows: line_charts.lines(rows, x="round", y=key, series="client", titles=("round", key)),
            lambda rows: f"{caption}{of_many(rows, 'client')}",
            "No client's update is here together with the broadcast that it began from.",
        )

    return [
        figure("norm", "Drift: norm of each client's update", "How far each client's training moves the adapter."),
        figure(
            "cosine",
            "Drift: cosine of each update to the mean",
            "1: every client goes the same way. Of K updates that have nothing in common it would be 1/√K.",
        ),
    ]


def splits() -> list[Figure]:
    """Who has which rows, as `prepare` dealt them."""

    def figure(by: Literal["labels", "sources"], name: str) -> Figure:
        def rows(workspace: Workspace) -> list[Row]:
            return _most_common(findings.data_split(workspace, by), name)

        def spec(rows: list[Row]) -> Spec:
            return bar_charts.grid(
                _some(rows, "party"), x=name, y="party", value="rows", titles=(f"{name} of the rows", ""), form="d"
            )

        return Figure(
            "data",
            f"split-{by}",
            f"Rows per party and {name}",
            rows,
            spec,
            lambda rows: (
                f"{sum(row['rows'] for row in rows):,} rows; the server's are the auxiliary data."
                f"{_of_some(rows, 'party')}"
            ),
            "The data was not dealt by prepare here: each party has its own, which is not opened for this page.",
        )

    return [figure("labels", "label"), figure("sources", "source")]


def _most_common(rows: list[Row], name: str) -> list[Row]:
    """Rows of a split with the labels beyond the most common ones counted together."""
    totals: dict[str, int] = {}
    for row in rows:
        totals[row[name]] = totals.get(row[name], 0) + row["rows"]
    if len(totals) <= bar_charts.MOST_COLUMNS:
        return rows
    kept = sorted(totals, key=lambda one: -totals[one])[: bar_charts.MOST_COLUMNS - 1]
    merged: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row[name] not in kept):
        shown = row[name] if row[name] in kept else "others"
        merged.setdefault((row["party"], shown), row | {name: shown, "rows": 0})["rows"] += row["rows"]
    return list(merged.values())


def times() -> Figure:
    """How long each stage took."""

    def spec(rows: list[Row]) -> Spec:
        totals: dict[str, list[float]] = {}
        for row in rows:
            totals.setdefault(row["stage"], []).append(row["seconds"])
        shown: list[dict[str, Any]] = [
            {"stage": stage, "seconds": sum(each), "label": f"{sum(each):,.2f} s, {len(each)} runs"}
            for stage, each in totals.items()
        ]
        return bar_charts.lying_bars(shown, x="seconds", y="stage", title="seconds", label="label")

    return Figure(
        "costs",
        "wall-time",
        "Wall time per stage",
        findings.wall_times,
        spec,
        lambda _: "Sums over rounds and parties, from this machine's private logs. Loading of models is not counted.",
        "No stage has left a log on this machine.",
    )
