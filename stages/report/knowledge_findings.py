"""What a workspace of FedMKT has to show beyond the others, as plain rows, one function for each chart.

Who taught whom, from manifests; how well vocabularies fit, from align's reports; losses on public rows, from logs.
"""

from __future__ import annotations

from stages.artefacts.reading import read_manifest
from stages.parties import names
from stages.report import findings
from stages.report.charts import Row
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

WON = "rows_from_"
"""What begins the metrics that say of how many rows a teacher's knowledge was taken."""


def choices_of_llm(workspace: Workspace) -> list[Row]:
    """Public rows of which the LLM learned from each client, by round."""
    return [
        {"teacher": names.said(key.removeprefix(WON)), "round": round, "rows": int(count)}
        for round in findings.rounds(workspace)
        if workspace.llm(round).exists()
        for key, count in sorted(read_manifest(workspace.llm(round))[0].metrics.items())
        if key.startswith(WON)
    ]


def choices_of_clients(workspace: Workspace) -> list[Row]:
    """Public rows of which each client learned from the LLM, by round."""
    return [
        {"client": f"client {client}", "round": round, "rows": int(metrics[WON + names.SERVER])}
        for round in findings.rounds(workspace)
        for client, place in workspace.client_adapters(round).items()
        if WON + names.SERVER in (metrics := read_manifest(place)[0].metrics)
    ]


def fits(workspace: Workspace) -> list[Row]:
    """Of each pair, the share of the student's answer positions at which the teacher has read the same bytes, in %.

    reached_percent: at which it also has a token for what comes next. The server's reports, else the clients' own.
    """
    from stages.distillation.aligning import read_report

    rows: list[Row] = []
    for client in workspace.clients:
        places = [workspace.alignment_with(client, at=at) for at in (None, client)]
        found = [place for place in places if place.exists()]
        for one in read_report(found[0], Command("align", client=client, overwrite=True)).directions if found else ():
            if one.measured is not None:
                rows.append(
                    {
                        "client": f"client {client}",
                        "teacher": "LLM teaches" if one.teacher == "llm" else "client teaches",
                        "coverage_percent": 100 * one.measured.coverage,
                        "reached_percent": 100 * (one.usable or 0.0),
                        "alignment": one.method,
                    }
                )
    return rows


def public_losses(workspace: Workspace, term: str) -> list[Row]:
    """L_FT or L_KD (ft, kd) of every client on the public rows, by step counted over all rounds, thinned."""
    logs = {
        (round, f"client {k}"): findings.losses(workspace.log("client-distill", round, k), f"slm_{term}")
        for round in findings.rounds(workspace)
        for k in workspace.clients
    }
    return [
        {"client": party, "round": round, "step": step, "steps": group, "loss": values[f"slm_{term}"]}
        for (round, party), step, group, values in findings.thinned(logs, findings.most_points(workspace))
    ]
