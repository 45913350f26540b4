"""pack: what a party sends, as one file to mail or to carry.

Reads from exchange/ what this party has made: a client's update and reveal, the server's broadcast and close; with
FedMKT a party's vocabulary and what it knows, and a client's adapter that is averaged; a client's public keys, or the
roster with everybody's. Writes one file, outside the exchange; the same files give the same bytes.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.exchange.bundles import Member, bundle_bytes
from stages.files import reading, writing
from stages.parties.names import keys_made_by, of, said
from stages.runtime.errors import Refused, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.names import round_name
from stages.workspace.paths import Workspace, require

if TYPE_CHECKING:
    from stages.exchange.parcel_kinds import Parcel

SECOND_LEGS = {"close": "-close", "reveal": "-reveal", "adapter-client": "-adapter"}
"""What goes along later in a round once there is one: in secure mode, and with FedMKT that averages. How its bundle is
named."""
FIRST_LEG = "-vocabulary"
"""What the bundle of a round of FedMKT is named by in which the party does not say yet what it knows."""


@dataclass(frozen=True)
class Packed:
    """A bundle: its place, its size and digest, and the files in it, sorted; of an invitation, what is read out."""

    path: Path
    size_bytes: int
    sha256: str
    members: list[Member]
    fingerprint: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        said = asdict(self) | {"path": str(self.path), "members": [one.model_dump() for one in self.members]}
        return {key: value for key, value in said.items() if value is not None}


def pack(
    workspace: Workspace,
    *,
    folder: Path,
    round: int | None = None,
    client: int | None = None,
    to: int | None = None,
    keys: bool = False,
    roster: bool = False,
    output: Path | None = None,
    overwrite: bool = False,
    report: Report = ignore,
) -> Packed:
    """Write a bundle. Checked before it is written, as `unpack` checks it.

    With round: what the client sends in it, or, without one, the server; to: for this client, without what the close
    holds for others. keys: instead, the client's public keys. roster: instead, the roster and every client's keys.
    folder: where a bundle goes that has no output.
    Raises Refused rather than pack a secret key, or replace another file.
    """
    _check_words(round, client, to, keys, roster)
    for number in filter(None, (client, to)):
        workspace.check_client(number)
    from stages.exchange import parcel_checks, parcel_kinds, parcels

    members: dict[str, bytes] = {}
    last = ""
    wanted = _wanted(workspace, round, client, keys)
    for number, parcel in enumerate(wanted, 1):
        holder = workspace.agreement.aggregation.key_holder
        if parcel.kind == "close" and to is not None and not parcel_kinds.is_for(to, parcel.folder(workspace), holder):
            report(Event("note", f"the close of round {round} is not for client {to}: it is not packed"))
            continue
        contents = parcels.collected(parcel, workspace, to=to)
        last = parcel.kind
        parcel_checks.check(parcel, contents, workspace, parcel.folder(workspace))
        members |= {parcel.name(workspace, file): content for file, content in contents.items()}
        report(Event("step", parcel.name(workspace, ""), number, len(wanted)))
    content = bundle_bytes(workspace.agreement.federation.name, members)
    path = output or folder / _name(workspace, round, client, to=to, keys=keys, last=last)
    write_bundle(path, content, overwrite, report)
    listed = [
        Member(name=name, size_bytes=len(members[name]), sha256=reading.sha256(members[name]))
        for name in sorted(members)
    ]
    return Packed(path, len(content), reading.sha256(content), listed)


def _check_words(round: int | None, client: int | None, to: int | None, keys: bool, roster: bool) -> None:
    """Raise UsageProblem unless exactly one thing is asked for."""
    what = [round is not None, keys, roster]
    if sum(what) != 1 or (keys and client is None) or (roster and client is not None):
        mend = f"{Command('pack', client=2, round=5)}, or --server --round 5, --keys --client 2, --roster"
        raise UsageProblem(
            "pack needs one thing to pack: a round of a client or of the server, keys, roster", mend=mend
        )
    if to is not None and (round is None or client is not None):
        example = Command("pack", server=True, round=5, to=2)
        raise UsageProblem("--to is for what the server sends in a round", mend=example)


def _wanted(workspace: Workspace, round: int | None, client: int | None, keys: bool) -> list[Parcel]:
    """What is to be packed, all of it there. A close or a reveal goes along once there is one."""
    from stages.exchange.parcel_kinds import Parcel

    if round is None:
        return _public(workspace, client, keys)
    workspace.check_round(round)
    if workspace.agreement.federation.server_tells:
        return _told(workspace, round, client)
    first = Parcel("broadcast", round) if client is None else Parcel("client", round, client)
    then = Parcel("close", round) if client is None else Parcel("reveal", round, client)
    name = f"the broadcast of round {round}" if client is None else f"client {client}'s update of round {round}"
    made_by = Command("broadcast" if client is None else "client-train", client=client, round=round)
    require(first.folder(workspace), f"{name} is not there", made_by)
    return [first, *([then] if os.path.lexists(then.folder(workspace)) else [])]


def _told(workspace: Workspace, round: int, client: int | None) -> list[Parcel]:
    """What a party of FedMKT sends: what it knows of the public rows; in round 1 also how it reads, and a broadcast.

    Round 1 can be packed before the party knows anything: vocabularies are of use at once. Where adapters are averaged
    each round has a broadcast, which can be packed alone, and a client's adapter goes along once it is there.
    """
    from stages.exchange.parcel_kinds import Parcel

    federation, party = workspace.agreement.federation, said(of(client))
    averages = workspace.agreement.averages
    knows = Parcel("server", round) if client is None else Parcel("client", round, client)
    tells = federation.clients_tell or (client is None and round == 1)
    if round > 1 and not tells:
        mend = f"pack round 1: there {'the LLM tells once for all' if client is None else 'it tells how it reads'}"
        raise UsageProblem(f"method {federation.method} has {party} send nothing after round 1", mend=mend)
    first = []
    if round == 1:
        first = [Parcel("vocabulary-server", 1), Parcel("broadcast", 1)]
        first = first if client is None else [Parcel("vocabulary-client", 1, client)]
        made_by = Command("align", server=client is None, client=client)
        require(first[0].folder(workspace), f"{party} has not told its vocabulary", made_by)
    elif averages and client is None:
        first = [Parcel("broadcast", round)]
        require(
            first[0].folder(workspace),
            f"the broadcast of round {round} is not there",
            Command("broadcast", round=round),
        )
    else:
        made_by = Command("share-knowledge", server=client is None, client=client, round=round)
        require(knows.folder(workspace), f"what {party} knows in round {round} is not there", made_by)
    first += [knows] if tells else []
    first += [Parcel("adapter-client", round, client)] if averages and client is not None else []
    return [one for one in first if os.path.lexists(one.folder(workspace))]


def _public(workspace: Workspace, client: int | None, keys: bool) -> list[Parcel]:
    """A client's public keys, or the roster and all keys that the server has."""
    from stages.exchange.parcel_kinds import Parcel

    if keys:
        assert client is not None
        wanted = [Parcel("keys", client=client)]
    else:
        here = [k for k in workspace.clients if workspace.public_keys(k).exists()]
        wanted = [Parcel("federation"), *(Parcel("keys", client=k) for k in here)]
    for parcel in wanted:
        made_by = keys_made_by(of(parcel.client or None))
        for file in parcel.public_files(workspace):
            require(parcel.folder(workspace) / file, f"{file} is not there", made_by)
    return wanted


def _name(workspace: Workspace, round: int | None, client: int | None, *, to: int | None, keys: bool, last: str) -> str:
    """What a bundle is called. last: of what it carries, which tells the two legs of a secure round apart."""
    federation = workspace.agreement.federation.name
    if round is None:
        return f"{federation}-keys-client-{client}.fedcollm" if keys else f"{federation}-roster.fedcollm"
    sender = "server" if client is None else f"client-{client}"
    leg = SECOND_LEGS.get(last, "")
    if workspace.agreement.federation.server_tells and last.startswith(("vocabulary", "broadcast")):
        leg = FIRST_LEG if round == 1 else "-broadcast"
    return f"{federation}-{round_name(round)}-{sender}{leg}{f'-to-{to}' if to else ''}.fedcollm"


def write_bundle(path: Path, content: bytes, overwrite: bool, report: Report) -> None:
    """Put a bundle in its place. Raises Refused rather than replace another file, unless overwrite."""
    if os.path.lexists(path) and not overwrite:
        if path.is_file() and path.read_bytes() == content:
            report(Event("note", "already done"))
            return
        mend = "name another place with --output, or give the command again with --overwrite"
        raise Refused(f"{path.name} is there already, with other bytes", where=path, mend=mend)
    writing.write(path, content)
