"""prepare, a simulation's first step: a public dataset divided among the clients and the server.

Reads lm-eval tasks (by their own prompts) or JSONL files, as [data] in fedcollm.toml says.
Writes private/client-k/train.jsonl for every k, private/server/auxiliary.jsonl, with data.held_out_share
private/server/held-out.jsonl, with FedMKT a copy of the auxiliary rows at each client, private/client-k/public.jsonl,
and, last, private/split.json.
Parties with data of their own put it in those places instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stages.bases import one_tokenizer
from stages.data.row_files import read_rows
from stages.data.rows import Row, check_one_form, rows_bytes
from stages.data.spacing import warn_of_spacing
from stages.data.split_file import Share, Split
from stages.files import reading, writing
from stages.parties.enrolment import sign_of_one_party
from stages.runtime.errors import Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace import edits
from stages.workspace.names import AGREEMENT, MACHINE
from stages.workspace.paths import Workspace, require


def prepare(workspace: Workspace, *, overwrite: bool = False, report: Report = ignore) -> Split:
    """Split the dataset of the agreement. Returns what split.json says: sources, duplicates, rows and labels per party.

    No row lands in two places: rows that occur twice are used once, by the server if one of their sources is in
    data.auxiliary_sources. Rows whose prompt is also a test prompt are counted, not removed. Data that is already there
    is never replaced unless overwrite says so. Raises UsageProblem for two models that the method could not train
    together.
    """
    report(Event("stage", "prepare"))
    _check_simulates(workspace)
    one_tokenizer.check(workspace)
    parties, summary = dealt(workspace, report)
    if left_out := summary.get("left_out"):
        report(Event("note", f"{left_out} rows of data.auxiliary_sources are left out, by data.auxiliary_share"))
    if beyond := summary.get("beyond_limit"):
        report(Event("note", f"{beyond} rows of clients are left out, by data.limit"))
    return _publish(workspace, parties, summary, overwrite, report)


def _check_simulates(workspace: Workspace) -> None:
    """Raise Refused on a machine of one party, as machine.toml says, or as what lies here does: nothing is invented."""
    said = workspace.machine.simulation
    one_party = "machine.toml says that this is none" if said is False else ""
    if said is None and not workspace.split.exists():
        one_party = sign_of_one_party(workspace)
    if one_party:
        message = f"prepare deals public rows to all parties of a simulation; {one_party}"
        mend = "put the party's own rows in their place; see status"
        if said is None:
            mend += "; or, where one person plays all parties, set simulation = true in machine.toml"
        raise Refused(message, where=workspace.root / MACHINE, mend=mend)


def dealt(workspace: Workspace, report: Report = ignore) -> tuple[dict[Path, list[Row]], Split]:
    """The rows of each file that prepare writes, and what split.json says of them; nothing is written."""
    data = workspace.agreement.data
    if bool(data.tasks) == bool(data.files):
        mend = "list lm-eval tasks or JSONL files there; parties with their own data skip prepare"
        raise UsageProblem(
            "prepare needs exactly one of data.tasks and data.files", where=workspace.root / AGREEMENT, mend=mend
        )
    if data.tasks:
        rows, test = _from_tasks(workspace, report)
    else:
        rows, test = [row for name in data.files for row in _from_file(workspace, name)], None
        check_one_form(rows, "the rows of data.files")
    warn_of_spacing(rows, report)
    return _divide(workspace, rows, test)


def _from_tasks(workspace: Workspace, report: Report) -> tuple[list[Row], set[str]]:
    from stages.data import tasks

    agreement = workspace.agreement
    rows: list[Row] = []
    loaded = tasks.load(workspace, agreement.data.tasks, report)
    for task in loaded:
        found = tasks.training_rows(task)
        report(Event("note", f"{task.config.task}: {len(found)} rows"))
        rows += found
    is_same = agreement.evaluation.tasks in ([], agreement.data.tasks)
    scored = loaded if is_same else tasks.load(workspace, agreement.evaluation.tasks, report)
    return rows, {prompt for task in scored for prompt in tasks.test_prompts(task)}


def _from_file(workspace: Workspace, name: str) -> list[Row]:
    path = workspace.local(name)
    require(path, f"the data file {name} is not there", "correct data.files in fedcollm.toml")
    return [replace(row, source=row.source or str(Path(name).with_suffix(""))) for row in read_rows(path)[0]]


def _divide(workspace: Workspace, rows: list[Row], test: set[str] | None) -> tuple[dict[Path, list[Row]], Split]:
    from stages.data.partition import hold_out, limited, split, unlabel

    agreement, data = workspace.agreement, workspace.agreement.data
    unique = _unique(rows, data.auxiliary_sources)
    clients = agreement.federation.clients
    deal, auxiliary = split(
        unique,
        clients,
        kind=data.split,
        alpha=data.dirichlet_alpha,
        auxiliary_share=data.auxiliary_share,
        auxiliary_sources=data.auxiliary_sources,
        seed=workspace.seed_for("prepare", 1),
    )
    left_out = len(unique) - len(auxiliary) - sum(map(len, deal))
    whole = sum(map(len, deal))
    deal = [
        limited(share, data.limit, seed=workspace.seed_for("limit", 1, k))
        for k, share in zip(workspace.clients, deal, strict=True)
    ]
    parties = {workspace.dealt_data(k): share for k, share in zip(workspace.clients, deal, strict=True)}
    auxiliary, held_out = hold_out(auxiliary, data.held_out_share or 0.0)
    auxiliary = unlabel(auxiliary, data.unlabelled_share or 0.0, seed=workspace.seed_for("unlabel", 1))
    parties[workspace.auxiliary_data] = auxiliary
    unlabelled = sum(row.completion is None for row in auxiliary)
    summary: Split = {
        "agreement_sha256": workspace.agreement_sha256,
        "sources": data.tasks or data.files,
        "sources_sha256": workspace.sources_sha256(),
        "split": data.split,
        "rows": len(rows),
        "duplicates_dropped": len(rows) - len(unique),
        "also_in_test": None if test is None else sum(row.prompt in test for row in unique),
        "auxiliary": {"labelled": len(auxiliary) - unlabelled, "unlabelled": unlabelled},
        "parties": {path.parent.name: _counts(share) for path, share in parties.items()},
    }
    if left_out:
        summary["left_out"] = left_out
    if beyond := whole - sum(map(len, deal)):
        summary["beyond_limit"] = beyond
    if agreement.federation.learns_in_public:
        parties |= {workspace.public_data(k): auxiliary for k in workspace.clients}
    if held_out:
        parties[workspace.held_out_data] = held_out
        summary["held_out"] = _counts(held_out)
    return parties, summary


def _unique(rows: list[Row], public: Sequence[str]) -> list[Row]:
    """Each row once, as its last source has it; a row of these public sources stays theirs, whatever comes after."""
    found: dict[tuple[str, str | None], Row] = {}
    for row in rows:
        before = found.get((row.prompt, row.completion))
        if before is None or row.source in public or before.source not in public:
            found[row.prompt, row.completion] = row
    return list(found.values())


def _counts(share: list[Row]) -> Share:
    """What split.json says of some rows."""
    return {
        "rows": len(share),
        "sha256": reading.sha256(rows_bytes(share)),
        "labels": dict(sorted(Counter(row.label for row in share).items())),
        "sources": dict(sorted(Counter(row.source for row in share).items())),
    }


def _publish(
    workspace: Workspace, parties: dict[Path, list[Row]], summary: Split, overwrite: bool, report: Report
) -> Split:
    for k in workspace.clients:
        if (own := workspace.client_data(k)) != workspace.dealt_data(k):
            message = f"client {k} has rows of its own in {workspace.shown(own)}"
            raise Refused(message, where=own, mend="move it away, if rows are to be dealt here")
    if not overwrite:
        existing = [path for path in parties if path.exists()]
        changed = [path for path in existing if reading.read_own(path) != rows_bytes(parties[path])]
        if changed:
            message = f"{workspace.shown(changed[0])} is there already and is not what prepare would write"
            raise Refused(message, where=changed[0], mend="move it away, or give --overwrite to replace it")
        if len(existing) == len(parties) and workspace.split.exists():
            if reading.read_own(workspace.split) != reading.json_bytes(summary):  # other sources, the same rows of them
                edits.keep(workspace)
                writing.write(workspace.split, reading.json_bytes(summary))
            report(Event("note", "already done"))
            return summary
    edits.keep(workspace)
    for path, share in parties.items():
        writing.write(path, rows_bytes(share))
    writing.write(workspace.split, reading.json_bytes(summary))
    return summary
