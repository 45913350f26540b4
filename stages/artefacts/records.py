"""What a workspace keeps beside its folders with manifests: results, private logs, rows, tasks, checkpoints, secrets.

Each is compared with the digest that was written with it. That notices damage and edits; who means to forge can write
the digest anew.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.accounting import budget
from stages.artefacts import checkpoints
from stages.artefacts.manifest import Artefact, BaseIdentity, check_signed, read_artefact, read_manifest
from stages.artefacts.subjects import folder_of, is_subject
from stages.files import writing
from stages.parties import roster
from stages.parties.vault import SERVER, Vault, client
from stages.runtime.errors import Damaged, Problem
from stages.workspace.paths import AGREEMENT, SIGNATURE, Workspace

NOT_COVERED = (
    "machine.toml, private/split.json, exports/, slurm/, TensorBoard's files, the report; tasks/ before anything is "
    "scored; base models, which are hashed when they are loaded"
)
"""By `status --verify`."""

DIGEST = "result_sha256"
EARLIER = ("subject", "round", "agreement_sha256", "adapter_sha256", "manifest_sha256", "base", "tasks_sha256", "dtype")
LATER = ("limit", "batch_size", "weights_dtype", "versions", "tasks")
MEND = "score again: fedcollm evaluate ... --overwrite"


def stamped(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result with the digest of all the rest of it."""
    return dict(result) | {DIGEST: writing.sha256(writing.json_bytes(dict(result)))}


def read_result(path: Path) -> dict[str, Any]:
    """A result, without its digest. Raises Damaged if it is not as it was written; an earlier version wrote none."""
    result, _ = writing.read_json(path)
    named = result.pop(DIGEST, None)
    is_changed = (
        named != writing.sha256(writing.json_bytes(result)) if named else bool(set(result) - {*EARLIER, *LATER})
    )
    if is_changed:
        raise Damaged(f"{path.name} has been changed since it was written", where=path, mend=MEND)
    return result


def is_of_base(result: Mapping[str, Any], base: BaseIdentity) -> bool:
    """Whether a result is of this base model."""
    try:
        return BaseIdentity.model_validate(result.get("base")).is_of(base)
    except ValidationError:
        return False


def stale(workspace: Workspace) -> Iterator[tuple[Path, str, str]]:
    """Each result that is of other questions, settings or adapters than lie here now: its path, why, and the mend.

    Damaged ones are left to `faults`; of an adapter that is not here nothing is said.
    """
    tasks_sha256: str | None = None
    for path in sorted((workspace.root / "results").glob("*/*.json")):
        number = path.parent.name.removeprefix("round-")
        if not (number.isdecimal() or number == "zero-shot") or not is_subject(path.stem):
            continue
        try:
            result = read_result(path)
        except (Problem, OSError):
            continue
        if tasks_sha256 is None:
            tasks_sha256 = _tasks_sha256(workspace)
        round = None if number == "zero-shot" else int(number)
        why = []
        if result.get("tasks_sha256") != tasks_sha256:
            why.append("tasks/, or data that it names, was edited since")
        if result.get("agreement_sha256") != workspace.agreement_sha256:
            why.append(f"{AGREEMENT} was edited since")
        if round is not None and _is_of_another(folder_of(workspace, round, path.stem), result):
            why.append("the adapter is another one now")
        if why:
            yield path, "; ".join(why), scored_by(round, path.stem)


def _tasks_sha256(workspace: Workspace) -> str:
    try:
        return workspace.tasks_sha256()
    except (Problem, OSError):
        return ""


def _is_of_another(adapter: Path, result: Mapping[str, Any]) -> bool:
    try:
        return read_manifest(adapter)[1] != result.get("manifest_sha256")
    except (Problem, OSError):
        return False


def scored_by(round: int | None, subject: str) -> str:
    """The command that makes a result."""
    whose = f"--client {subject.partition('-')[2]}" if subject.startswith("client-") else f"--model {subject}"
    return f"fedcollm evaluate {'--zero-shot' if round is None else f'--round {round}'} {whose}"


Fault = tuple[Path, str, str]
"""A path, what was found there, and what was expected."""


def faults(workspace: Workspace) -> Iterator[Fault]:
    """Each record that is not as it was written."""
    results = sorted((workspace.root / "results").glob("*/*.json"))
    for path in (path for path in results if path.parent.name.startswith(("round-", "zero-shot"))):
        yield from _fault(path, read_result)
    for path in sorted(workspace.private.glob("agreements/*.toml")):
        yield from _fault(path, _check_copy)
    for path in sorted(workspace.private.glob("*/round-*/*.jsonl")):
        yield from _fault(path, writing.check_log)
    for k in workspace.clients:
        yield from _rows(workspace, workspace.client_data(k), "client-train", k)
    yield from _rows(workspace, workspace.auxiliary_data, "co-distill", None)
    yield from _rows(workspace, workspace.held_out_data, "aggregate", None, name="held-out")
    for path in sorted(workspace.private.glob(f"*/round-*/.*/*/checkpoint-*/{checkpoints.COMPLETE}")):
        if not checkpoints.is_whole(path.parent):
            yield path.parent, "is not what was sealed: training will pass it over", "the bytes that were written"


def _check_copy(path: Path) -> None:
    """Raise Damaged unless a kept copy of the agreement has the digest that it is named by."""
    if not writing.sha256(writing.read_own(path)).startswith(path.stem):
        raise Damaged("is not the agreement that its name says", where=path, mend="remove it: it is a copy")


def others(workspace: Workspace) -> Iterator[Fault]:
    """The same of what other checks of an audit look at: keys and roster, ledgers, a client's own adapters, secrets."""
    if os.path.lexists(workspace.federation):
        yield from _fault(workspace.federation, roster.read_federation)
    for k in workspace.clients:
        if os.path.lexists(workspace.public_keys(k)):
            yield from _fault(workspace.public_keys(k), roster.read_keys)
        yield from _fault(workspace.privacy_ledger(k), budget.read_ledger)
    yield from _signatures(workspace)
    for folder in sorted(workspace.private.glob("client-*/round-*/*/")):
        if not folder.name.startswith(".") or folder.name == workspace.masked_update(1, 1).name:
            yield from _fault(folder, read_artefact)
    for party in (SERVER, *map(client, workspace.clients)):
        vault = Vault.find(workspace, party)
        for problem in vault.faults() if vault else ():
            yield Path(problem.where or ""), problem.message, "the secret as it was written"


def _signatures(workspace: Workspace) -> Iterator[Fault]:
    """Every folder's signature, by the roster in exchange/; of one that cannot be read, its round says so."""
    try:
        members = roster.anyones(workspace)
    except (Problem, OSError):
        return
    if members is None:
        return
    for top in (workspace.exchange, workspace.private):
        for path in sorted(top.glob(f"**/round-*/*/{SIGNATURE}")):
            try:
                folder = read_artefact(path.parent, only=[])
            except (Problem, OSError):
                continue
            by = folder.manifest.client
            yield from _fault(
                path, functools.partial(_check_signed, folder, members, SERVER if by is None else client(by))
            )


def _check_signed(folder: Artefact, members: roster.Roster, party: str, _: Path) -> None:
    check_signed(folder, members, party)


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
        named = writing.logged_inputs(log).get(name)
        if not named:
            continue
        if os.path.lexists(data):
            try:
                found = writing.sha256(writing.read_own(data))
            except FileNotFoundError:
                yield data, writing.not_there(data).message, "rows that can be read"
                return
            except (Problem, OSError) as problem:
                yield data, str(problem), "rows that can be read"
                return
            if found != named:
                said = f"the rows that {workspace.shown(log)} names, {named[:16]}..."
                yield data, f"sha256 {found[:16]}...", said
        return
