"""An invitation: what a party needs to take part, as one file from whoever organises the federation.

It is a bundle with the agreement, evaluation.toml, the task files, and invite.json, which says who is invited, who the
others are, what to install and which models to fetch. All of it is data: a task file that would run code is not packed,
and not taken. Names in it are held against a pattern, and what they lead to lies in tasks/.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.exchange.bundles import Listing, read_bundle
from stages.files import reading
from stages.parties.names import of, said
from stages.parties.roster import FINGERPRINT_LETTERS, is_spoken, spoken
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.runtime.version import VERSION
from stages.workspace.agreement import Agreement
from stages.workspace.commands import Command
from stages.workspace.names import AGREEMENT, EVALUATION, INVITE
from stages.workspace.paths import LARGEST_TOML_BYTES
from stages.workspace.rows_and_scores import Evaluation
from stages.workspace.settings import Role, parse

FORMAT = "fedcollm/invite/1"
LARGEST_INVITE_BYTES = 32 << 20
LARGEST_TASK_BYTES = 4 << 20
MOST_TASKS = 1000
TASK_ENDS = ("yaml", "yml", "json", "jsonl", "csv", "txt", "md", "jinja", "jinja2")
"""Files of tasks/ that are data. Others, such as programs, do not travel so."""
TASK_NAME = rf"^([A-Za-z0-9_][A-Za-z0-9_+-]*/){{0,4}}[A-Za-z0-9_][A-Za-z0-9_.+-]*\.({'|'.join(TASK_ENDS)})$"
"""Of a file below tasks/. No part of it begins with a dot, and no folder's name has one."""
LONGEST_TASK_NAME = 120
SHA256 = r"^[0-9a-f]{64}$"
SPOKEN = r"^[A-Z2-7]{4}(-[A-Z2-7]{4}){9}$"
ANOTHER = f"have the organiser make another: {Command('pack', invite=True, client=2)}"

Digest = Annotated[str, Field(pattern=SHA256)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Extra = Literal["dp", "he", "quant"]
"""What else of fedcollm an agreement needs."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class NamedModel(_Part):
    """A base model that the party needs: as the agreement names it, and its files where the organiser had them."""

    role: Role
    name: Name
    revision: Annotated[str, Field(max_length=200)] | None
    files: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}$")], Digest], Field(max_length=2000)
    ]


class Participant(_Part):
    """A party whose key the organiser has, and what that key's fingerprint is."""

    party: Annotated[str, Field(pattern=r"^(server|client-[1-9][0-9]{0,8})$")]
    key: Annotated[str, Field(pattern=SPOKEN)]


class Invite(_Part):
    """invite.json. client: who is invited; None: the server. tasks: what lies in tasks/, task-0001 first."""

    format: Literal["fedcollm/invite/1"] = "fedcollm/invite/1"
    made_with: Annotated[str, Field(pattern=r"^[0-9][0-9a-z.+]{0,31}$")]
    client: Annotated[int, Field(ge=1, lt=10**9)] | None
    agreement_sha256: Digest
    extras: Annotated[list[Extra], Field(max_length=3)]
    models: Annotated[list[NamedModel], Field(max_length=2)]
    roster: Annotated[str, Field(pattern=SPOKEN)] | None
    parties: Annotated[list[Participant], Field(max_length=10_000)]
    tasks: Annotated[
        list[Annotated[str, Field(pattern=TASK_NAME, max_length=LONGEST_TASK_NAME)]], Field(max_length=MOST_TASKS)
    ]


@dataclass(frozen=True)
class Opened:
    """An invitation as it was read and checked. tasks: each file's bytes, by its name below tasks/."""

    invite: Invite
    fingerprint: str
    agreement: bytes
    evaluation: bytes | None
    tasks: dict[str, bytes]


def members_of(
    invite: Invite, agreement: bytes, evaluation: bytes | None, tasks: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The files of the bundle."""
    found = {INVITE: reading.json_bytes(invite.model_dump()), AGREEMENT: agreement}
    found |= {} if evaluation is None else {EVALUATION: evaluation}
    return found | {_task_member(number): tasks[name] for number, name in enumerate(invite.tasks, 1)}


def extras_of(agreement: Agreement, client: int | None) -> list[Extra]:
    """What a party has to install besides fedcollm itself."""
    mine = agreement if client is None else agreement.of_client(client)
    roles = ("slm", "llm") if client is None else ("slm",)
    wanted: dict[Extra, bool] = {
        "dp": client is not None and agreement.privacy.is_on,
        "he": agreement.aggregation.mode == "encrypted",
        "quant": any(mine.model_of(role).quantization for role in roles),
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def read_invite(path: Path, *, party: str | None = None, fingerprint: str | None = None) -> Opened:
    """An invitation, held against everything that can be known of it before a folder is made.

    party: for whom it is to be, if that was said. fingerprint: what the organiser has read out.
    Raises NotReady for one that is not there or cut short, Damaged for anything but an invitation, Refused for another
    fingerprint, party or version, UsageProblem for an agreement that is none.
    """
    if not path.exists():
        mend = f"name the invitation that has arrived: {Command('init', 'FOLDER', invite='FILE')}"
        raise NotReady(f"{path.name} is not there", where=path, mend=mend)
    sizes: dict[str, int] = {}

    def check(listing: Listing, _: object) -> None:
        sizes.update({member.name: member.size_bytes for member in listing.members})
        _check_sizes(sizes, path)

    bundle = read_bundle(path, check, limit_bytes=LARGEST_INVITE_BYTES)
    found = spoken(bundle.sha256, FINGERPRINT_LETTERS)
    if fingerprint is not None and not is_spoken(fingerprint, found):
        message = f"the invitation's fingerprint is {found}, another than was given"
        mend = "compare it once more with the organiser; where it stays another one, this file is not what was sent"
        raise Refused(message, where=path, mend=mend)
    invite = _parsed(bundle.members[INVITE], path)
    tasks = _tasks(invite, bundle.members, path)
    agreement = bundle.members[AGREEMENT]
    if reading.sha256(agreement) != invite.agreement_sha256:
        raise _no_invite(f"holds another {AGREEMENT} than it says", path)
    agreed = parse(Agreement, agreement, path / AGREEMENT)
    if agreed.federation.name != bundle.federation:
        raise _no_invite(f"is called another federation's: {bundle.federation}", path)
    _check_party(invite, agreed, party, path)
    evaluation = bundle.members.get(EVALUATION)
    if evaluation is not None:
        parse(Evaluation, evaluation, path / EVALUATION, explained=AGREEMENT)
    return Opened(invite, found, agreement, evaluation, tasks)


def is_invite(names: Container[str]) -> bool:
    """Whether a bundle with members of these names is an invitation."""
    return INVITE in names


def open_with(path: Path) -> Command:
    """What opens an invitation."""
    return Command("init", "FOLDER", invite=path.name)


def task_name_fits(name: str) -> bool:
    """Whether a file of tasks/ may travel in an invitation."""
    return len(name) <= LONGEST_TASK_NAME and re.fullmatch(TASK_NAME, name, re.ASCII) is not None


def _task_member(number: int) -> str:
    return f"task-{number:04d}"


def _check_sizes(sizes: Mapping[str, int], path: Path) -> None:
    """Raise for a list that is not an invitation's, by names and sizes alone."""
    if not is_invite(sizes):
        message = f"{path.name} is no invitation: it is what `{Command('pack')}` makes of a round or of keys"
        raise Refused(message, where=path, mend=f"in the party's folder: {Command('unpack', path.name)}")
    largest = {INVITE: reading.LARGEST_JSON_BYTES, AGREEMENT: LARGEST_TOML_BYTES, EVALUATION: LARGEST_TOML_BYTES}
    for name, size in sizes.items():
        is_task = re.fullmatch(r"task-[0-9]{4}", name) is not None
        if not is_task and name not in largest:
            raise _no_invite(f"holds {name}, which has no place in an invitation", path)
        most = largest.get(name, LARGEST_TASK_BYTES)
        if size > most:
            raise _no_invite(f"holds {name} with {size} bytes, at most {most} are expected", path)
    if AGREEMENT not in sizes:
        raise _no_invite(f"holds no {AGREEMENT}", path)


def _parsed(content: bytes, path: Path) -> Invite:
    """invite.json. Raises Refused for one of another version of the program."""
    try:
        value: dict[str, Any] = reading.parse_json(content)
    except (ValueError, RecursionError) as error:
        raise _no_invite(f"holds {INVITE}, which is not strict JSON: {error}", path) from None
    if (found := value.get("format")) != FORMAT:
        message = f"{path.name} is an invitation of the format {str(found)[:60]}, this program knows {FORMAT}"
        mend = f"install the version of fedcollm that the organiser has; here is {VERSION}"
        raise Refused(message, where=path, mend=mend)
    try:
        return Invite.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])[:200]
        raise _no_invite(f"holds {INVITE} with a mistake: {key}: {first['msg'][:200]}", path) from None


def _tasks(invite: Invite, members: Mapping[str, bytes], path: Path) -> dict[str, bytes]:
    """The task files by name. Raises Damaged for names that would lie upon each other on some machine."""
    names = [name.lower() for name in invite.tasks]
    folders = {name[:end] for name in names for end, letter in enumerate(name) if letter == "/"}
    if len({*names}) != len(names) or folders & {*names}:
        raise _no_invite("names a task file twice", path)
    wanted = {_task_member(number): name for number, name in enumerate(invite.tasks, 1)}
    if {*wanted} != {*members} - {INVITE, AGREEMENT, EVALUATION}:
        raise _no_invite("holds other task files than it names", path)
    return {name: members[member] for member, name in wanted.items()}


def _check_party(invite: Invite, agreed: Agreement, party: str | None, path: Path) -> None:
    clients = agreed.federation.clients
    if invite.client is not None and invite.client > clients:
        message = f"is for client {invite.client}, and its agreement has clients 1 to {clients}"
        raise _no_invite(message, path)
    if party is not None and of(invite.client) != party:
        message = f"{path.name} invites {said(of(invite.client))}, not {said(party)}"
        raise Refused(message, where=path, mend="open the invitation that is for this party")


def _no_invite(found: str, path: Path) -> Damaged:
    return Damaged(f"{path.name} {found}", where=path, mend=ANOTHER)
