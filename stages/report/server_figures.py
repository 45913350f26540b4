"""The chart of the server's optimiser: how long the clients' combined update was in each round, and the step."""

from __future__ import annotations

from stages.artefacts.reading import read_manifest
from stages.report import line_charts
from stages.report.charts import Row
from stages.report.drawing import Figure
from stages.workspace.paths import Workspace

SERIES = {"delta_norm": "the clients' update", "step_norm": "the server's step"}


def steps_of(workspace: Workspace) -> list[Row]:
    """Both norms of every round, from the manifests of the aggregates that are here."""
    places = map(workspace.aggregate, range(1, workspace.agreement.federation.rounds + 1))
    manifests = [read_manifest(place)[0] for place in places if place.exists()]
    return [
        {"what": said, "round": manifest.round, "norm": manifest.metrics[name]}
        for manifest in manifests
        for name, said in SERIES.items()
        if name in manifest.metrics
    ]


def steps(server: str) -> Figure:
    """By round. server: the optimiser's name."""
    return Figure(
        "averaging",
        "server-step",
        f"The server's steps: {server}",
        steps_of,
        lambda rows: line_charts.lines(rows, x="round", y="norm", series="what", titles=("round", "norm")),
        lambda _: (
            "How far the average lies from the broadcast, and how far the server's optimiser went. A step that the "
            "gate refused is drawn too."
        ),
        "There is no aggregate on this machine: the server has it.",
    )
