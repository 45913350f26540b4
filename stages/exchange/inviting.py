"""pack --invite: what a party needs to begin, as one file.

Reads fedcollm.toml, evaluation.toml, tasks/, the keys and the roster in exchange/, and base models that lie here, for
the digests of their files. Writes one file, outside the exchange; the same files give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from stages.bases import base_files, base_folders
from stages.exchange.bundles import Member, bundle_bytes
from stages.exchange.invites import (
    LARGEST_INVITE_BYTES,
    LARGEST_TASK_BYTES,
    MOST_TASKS,
    TASK_ENDS,
    Invite,
    NamedModel,
    Participant,
    extras_of,
    members_of,
    task_name_fits,
)
from stages.exchange.pack import Packed, write_bundle
from stages.files import reading
from stages.parties import names
from stages.parties.roster import fingerprint
from stages.parties.roster_files import read_federation, read_keys
from stages.runtime.errors import Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.runtime.version import VERSION
from stages.workspace import listing, shipped_tasks, task_files
from stages.workspace.names import EVALUATION
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role


def pack_invite(
    workspace: Workspace,
    *,
    folder: Path,
    client: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    report: Report = ignore,
) -> Packed:
    """Write an invitation for this client, or for the server. folder: where it goes without output.

    Raises Refused for a task file that would run code or lies elsewhere, and rather than replace another file;
    UsageProblem for a task of the agreement that is neither here nor lm-eval's.
    """
    if client is not None:
        workspace.check_client(client)
    agreement = workspace.agreement_of_all
    tasks = _tasks(workspace)
    place = workspace.home / EVALUATION
    evaluation = reading.read_own(place) if place.exists() and workspace.evaluation else None
    invite = Invite(
        made_with=VERSION,
        client=client,
        agreement_sha256=workspace.agreement_sha256,
        extras=extras_of(agreement, client),
        models=_models(workspace, client, report),
        roster=fingerprint(read_federation(workspace.federation)[1]) if workspace.federation.exists() else None,
        parties=list(_parties(workspace)),
        tasks=sorted(tasks),
    )
    members = members_of(invite, workspace.agreement_bytes, evaluation, tasks)
    content = bundle_bytes(agreement.federation.name, members)
    if len(content) > LARGEST_INVITE_BYTES:
        message = f"the invitation would have {len(content)} bytes, at most {LARGEST_INVITE_BYTES} are taken"
        raise UsageProblem(message, where=workspace.tasks, mend="leave data out of tasks/")
    path = output or folder / f"{agreement.federation.name}-invite-{names.of(client)}.fedcollm"
    write_bundle(path, content, overwrite, report)
    listed = [
        Member(name=name, size_bytes=len(members[name]), sha256=reading.sha256(members[name]))
        for name in sorted(members)
    ]
    return Packed(path, len(content), reading.sha256(content), listed, fingerprint(content))


def _tasks(workspace: Workspace) -> dict[str, bytes]:
    """What lies in tasks/, all of it data, with every task that the agreement names."""
    tasks = workspace.tasks
    reading.check_plain(tasks)
    task_files.check_are_data(tasks, workspace.home)
    if missing := shipped_tasks.missing(tasks, [*workspace.agreement.data.tasks, *workspace.scored_tasks]):
        message = f"no task named {missing[0]!r}, here or in lm-eval"
        raise UsageProblem(message, where=tasks, mend=f"put {missing[0]}.yaml into tasks/, or leave that task out")
    found = task_files.own_files(tasks)
    if len(found) > MOST_TASKS:
        message = f"tasks/ holds {len(found)} files, at most {MOST_TASKS} travel in an invitation"
        raise UsageProblem(message, where=tasks, mend="remove those that are not used")
    for name, path in found:
        if not path.is_relative_to(tasks):
            mend = "copy it into tasks/, and have the task file include it from there"
            raise Refused(f"a task file includes {name} from outside of tasks/", where=path, mend=mend)
        if not task_name_fits(name):
            message = f"tasks/{name} does not travel in an invitation"
            mend = f"remove it, or name it in plain letters with one of these ends: {', '.join(TASK_ENDS)}"
            raise Refused(message, where=path, mend=mend)
        if path.stat().st_size > LARGEST_TASK_BYTES:
            message = f"tasks/{name} has more than {LARGEST_TASK_BYTES} bytes"
            raise Refused(message, where=path, mend="keep data elsewhere, and name it in data_files")
    return {name: reading.read_own(path) for name, path in found}


def _models(workspace: Workspace, client: int | None, report: Report) -> list[NamedModel]:
    """The models that a party needs, with the digests of their files where they lie here."""
    seen = workspace if client is None else workspace.of_client(client)
    one_slm = workspace.agreement.is_of_one_slm
    roles: list[Role] = ["slm"] if client is not None else ["slm", "llm"] if one_slm else ["llm"]
    found = []
    for role in roles:
        model = seen.agreement.model_of(role)
        lies = base_folders.whole_folder(seen, role)
        if lies is None:
            report(Event("note", f"the {role.upper()} is not here: the invitation names it without its digests"))
        files = base_files.digests(lies) if lies else {}
        found.append(NamedModel(role=role, name=model.model, revision=model.revision, files=files))
    return found


def _parties(workspace: Workspace) -> list[Participant]:
    """Whose keys are here: the clients' as they sent them, the server's by the roster."""
    keys: dict[str, str] = {}
    if workspace.federation.exists():
        keys[names.SERVER] = read_federation(workspace.federation)[0].server.ed25519
    for place in listing.public_keys(workspace):
        found = read_keys(place)[0]
        keys[names.client(found.client)] = found.ed25519
    return [Participant(party=party, key=fingerprint(bytes.fromhex(key))) for party, key in keys.items()]
