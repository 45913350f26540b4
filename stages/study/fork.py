"""fork: a federation that goes on from a round of another, with other settings.

The fork is a workspace derived from the other: it takes what was made up to that round as it is, under the agreement of
then, and its own agreement says so (federation.fork). So all files of before keep their manifests, and what comes after
is linked to them as from round to round.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from stages.artefacts.reading import read_manifest
from stages.files import writing
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.study import variants
from stages.study.variants import Changes
from stages.workspace import edits
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT, round_name
from stages.workspace.paths import Workspace

FIXED = {
    "federation.name": "the rounds of before are of that federation",
    "federation.clients": "the rounds of before are of those clients",
    "federation.seed": "the first adapters were drawn from it",
    "federation.method": "another method has other steps; a baseline begins at round 1: `run --method`",
    "federation.fork": "the command says it itself",
    "aggregation.combine": "clients have adapters of that kind",
    "aggregation.personal": "clients have adapters of that kind",
    "aggregation.mode": "what clients keep for it begins with round 1",
    "aggregation.keep": "what clients keep for it begins with round 1",
    "aggregation.server": "what the server remembers for it begins with round 1",
    "slm.": "the adapters of before belong to that model",
    "llm.": "the adapters of before belong to that model",
    "clients.": "the adapters of before belong to those models",
    "data.": "the rows were dealt by it",
    "evaluation.": "an evaluation.toml changes it without a fork",
    "privacy.": "the promise is for all rounds of a federation together",
}
"""Settings, or tables, that a fork shares with what it goes on from, and why."""


def fork(study: Workspace, folder: Path, *, round: int, changes: Changes, report: Report = ignore) -> Workspace:
    """A workspace that goes on from a study after a round, with these settings changed. Returns it.

    Copied are this machine's rows and what it has of the rounds. Raises UsageProblem for a setting that cannot be
    another, Refused for a study that cannot be forked, NotReady for a round that has not ended.
    """
    report(Event("stage", f"fork after round {round}"))
    _check(study, folder, round, changes)
    settings = {**changes, "federation.fork": {"round": round, "agreement_sha256": study.agreement_sha256}}
    made_by = Command("fork", folder, round=round)
    fork = variants.make_variant(study, folder, settings, made_by=made_by)
    edits.keep(study)
    for place in _kept(study, round):
        target = folder / place.relative_to(study.root)
        if not target.exists():
            report(Event("note", f"{study.shown(place)}"))
            with writing.publishing(target) as draft:
                shutil.copytree(place, draft, dirs_exist_ok=True, ignore=_hidden)
    writing.write(fork.agreed(study.agreement_sha256), study.agreement_bytes)
    return fork


def _hidden(_: str, names: list[str]) -> list[str]:
    """Unfinished work and locks, which are not copied."""
    return [name for name in names if name.startswith(".")]


def _check(study: Workspace, folder: Path, round: int, changes: Changes) -> None:
    agreement, where = study.agreement, study.root / AGREEMENT
    study.check_round(round)
    for key in changes:
        table = next((fixed for fixed in FIXED if key == fixed or key.startswith(fixed.rstrip(".") + ".")), None)
        if table:
            message = f"{key} cannot be another in a fork: {FIXED[table]}"
            raise UsageProblem(message, mend=f"leave {key} out, or make a new workspace")
    if agreement.federation.fork.round:
        message = f"this workspace is a fork itself, since round {agreement.federation.fork.round}"
        raise UsageProblem(message, where=where, mend="fork what it goes on from")
    if agreement.federation.learns_in_public:
        message = f"method {agreement.federation.method} is not forked: what parties aligned belongs to one agreement"
        raise UsageProblem(message, where=where, mend="make a new workspace")
    if study.home != study.root:
        raise UsageProblem("a derived workspace is not forked", where=where, mend=f"fork {study.home}")
    if study.federation.exists():
        message = "the parties have enrolled for the agreement as it is, and each file is signed for that"
        raise Refused(message, where=study.federation, mend="agree on a new federation, and begin with `keys`")
    if agreement.privacy.is_on:
        message = f"privacy.epsilon is {FIXED['privacy.']}: two that go on from one round spend it twice"
        raise Refused(message, where=where, mend="make a new workspace")
    ended = study.round_result(round)
    own = [study.client_adapter(round, k) for k in study.clients if study.client_data(k).exists()]
    here = [ended] if study.auxiliary_data.exists() else own
    for place in here:
        if not place.exists():
            message = f"round {round} has not ended: {study.shown(place)} is not there"
            raise NotReady(message, where=place, mend=Command("run", workspace=study.root))
        made = read_manifest(place)[0]
        if made.agreement_sha256 != study.agreement_sha256:
            edited = edits.since(study, made.agreement_sha256)
            message = f"{study.shown(place)} was made under another agreement" + (f": {edited}" if edited else "")
            raise Refused(message, where=place, mend=f"undo the edit of {AGREEMENT}, or fork that study")
    if folder.exists() and any(folder.iterdir()) and not (folder / AGREEMENT).exists():
        raise Refused("the folder is there and is no workspace", where=folder, mend="name a new folder")


def _kept(study: Workspace, last: int) -> list[Path]:
    """The folders of the rounds so far, as far as they are here."""
    parties = [study.auxiliary_data.parent, *(study.client_data(k).parent for k in study.clients)]
    tops = [study.exchange, *parties]
    return [place for top in tops for n in range(1, last + 1) if (place := top / round_name(n)).is_dir()]
