"""Every record of a workspace that is not as it was written."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.accounting import ledger
from stages.artefacts import checkpoints, row_records
from stages.artefacts.lineage import check_signed
from stages.artefacts.reading import Artefact, read_artefact
from stages.artefacts.records import _check_copy, read_result
from stages.files import reading
from stages.parties import roster_files
from stages.parties.party import Onlooker, all_of
from stages.parties.roster import Roster
from stages.runtime.errors import Problem
from stages.workspace import listing
from stages.workspace.paths import Workspace

NOT_COVERED = (
    "machine.toml, private/split.json, exports/, slurm/, TensorBoard's files, the report; unsent.safetensors, until "
    "the next round adds it; tasks/ before anything is scored; manifests that nobody signed, until something is made "
    "from them; base models, which are hashed when loaded"
)
"""By `status --verify`."""


Fault = tuple[Path, str, str]
"""A path, what was found there, and what was expected."""


def faults(workspace: Workspace) -> Iterator[Fault]:
    """Each record that is not as it was written."""
    for path in [*listing.results(workspace), *listing.task_results(workspace)]:
        yield from _fault(path, read_result)
    for path in listing.rows_results(workspace):
        yield from _fault(path, row_records.read_rows_result)
    for path in listing.agreements(workspace):
        yield from _fault(path, _check_copy)
    for path in listing.logs(workspace):
        yield from _fault(path, reading.check_log)
    for k in workspace.clients:
        yield from _rows(workspace, workspace.client_data(k), "client-train", k)
        yield from _rows(workspace, workspace.public_data(k), "client-distill", k)
    tells_alone = workspace.agreement.federation.server_tells and not workspace.agreement.federation.clients_tell
    yield from _rows(workspace, workspace.auxiliary_data, "share-knowledge" if tells_alone else "co-distill", None)
    yield from _rows(workspace, workspace.held_out_data, "aggregate", None, name="held-out")
    for path in listing.checkpoints(workspace, checkpoints.COMPLETE):
        if not checkpoints.is_whole(path.parent):
            yield path.parent, "is not what was sealed: training will pass it over", "the bytes that were written"


def others(workspace: Workspace) -> Iterator[Fault]:
    """The same of what other checks of an audit look at: keys and roster, ledgers, a client's own adapters, secrets."""
    if os.path.lexists(workspace.federation):
        yield from _fault(workspace.federation, roster_files.read_federation)
    for k in workspace.clients:
        if os.path.lexists(workspace.public_keys(k)):
            yield from _fault(workspace.public_keys(k), roster_files.read_keys)
        yield from _fault(workspace.privacy_ledger(k), ledger.read_ledger)
    yield from _signatures(workspace)
    for folder in listing.clients_own(workspace):
        if not folder.name.startswith(".") or folder.name == workspace.masked_update(1, 1).name:
            yield from _fault(folder, read_artefact)
    for party in all_of(workspace):
        for problem in party.vault.faults() if party.vault else ():
            yield Path(problem.where or ""), problem.message, "the secret as it was written"


def _signatures(workspace: Workspace) -> Iterator[Fault]:
    """Every folder's signature, by the roster in exchange/; of one that cannot be read, its round says so."""
    try:
        members = Onlooker(workspace).members
    except (Problem, OSError):
        return
    if members is None:
        return
    for path in listing.signatures(workspace):
        try:
            folder = read_artefact(path.parent, only=[])
        except (Problem, OSError):
            continue
        yield from _fault(path, functools.partial(_check_signed, folder, members))


def _check_signed(folder: Artefact, members: Roster, _: Path) -> None:
    check_signed(folder, members, folder.manifest.party)


def _fault(path: Path, read: Callable[[Path], object]) -> Iterator[Fault]:
    try:
        read(path)
    except Problem as problem:
        yield path, problem.message, "the file as it was written"
    except OSError as error:
        yield path, error.strerror or str(error), "a file that can be read"


def _rows(workspace: Workspace, data: Path, stage: str, client: int | None, *, name: str = "data") -> Iterator[Fault]:
    """A party's rows against the newest log of a stage that has read them. name: what the log calls them."""
    for round in range(workspace.agreement.federation.rounds, 0, -1):
        log = workspace.log(stage, round, client)
        named = reading.logged_inputs(log).get(name)
        if not named:
            continue
        if os.path.lexists(data):
            try:
                found = reading.sha256(reading.read_own(data))
            except FileNotFoundError:
                yield data, reading.not_there(data).message, "rows that can be read"
                return
            except (Problem, OSError) as problem:
                yield data, str(problem), "rows that can be read"
                return
            if found != named:
                said = f"the rows that {workspace.shown(log)} names, {named[:16]}..."
                yield data, f"sha256 {found[:16]}...", said
        return
