"""What is carried from party to party: the folders and files of exchange/, known by round and client, and checked.

A name from outside is looked at, never used: it is taken apart into a round and a client, and the path is built from
these as every other path here. A folder is checked in memory, before it is sent and before it is put in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from stages.artefacts.adapter_files import read_adapter
from stages.artefacts.manifest import Artefact, Manifest, check_sizes, expected_names, inbox, read_manifest
from stages.files import writing
from stages.parties import roster, signatures
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.workspace import edits
from stages.workspace.paths import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    MASKED_UPDATE,
    SEALED_INBOX,
    SEALED_REVEAL,
    SEALED_SHARES,
    SECRETS_MARKER,
    SIGNATURE,
    Workspace,
)

Kind = Literal["broadcast", "close", "client", "reveal", "keys", "federation"]
ADAPTER = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
CONTENTS = {"broadcast": ADAPTER, "client": ADAPTER | {MASKED_UPDATE, SEALED_SHARES}, "reveal": {SEALED_REVEAL}}
"""What can be in a folder; in a close, the inboxes of those who take part."""
STAGES = {"broadcast": "broadcast", "client": "client-train", "close": "close", "reveal": "reveal"}
PRIVATE_KEY = b"PRIVATE KEY-----"
"""Stands in the first line of every secret key in PEM."""

NAME = re.compile(r"round-(\d{4,6})/(broadcast|close|client|reveal)(?:-(\d{1,9}))?/([a-z_.0-9-]+)", re.ASCII)
KEYS = re.compile(r"keys/client-(\d{1,9})\.json(?:\.sig)?", re.ASCII)


@dataclass(frozen=True, order=True)
class Parcel:
    """A folder of a round, which travels whole; or a party's public file, with its signature beside it."""

    kind: Kind
    round: int = 0
    client: int = 0

    def folder(self, workspace: Workspace) -> Path:
        """Where its files lie."""
        match self.kind:
            case "broadcast":
                return workspace.broadcast(self.round)
            case "close":
                return workspace.close(self.round)
            case "client":
                return workspace.client_update(self.round, self.client)
            case "reveal":
                return workspace.reveal(self.round, self.client)
            case "keys":
                return workspace.public_keys(self.client).parent
            case "federation":
                return workspace.federation.parent

    def name(self, workspace: Workspace, file: str) -> str:
        """How one of its files is called in a bundle: from exchange/ down."""
        return (self.folder(workspace) / file).relative_to(workspace.exchange).as_posix()

    @property
    def levels(self) -> int:
        """How many of the last parts of its files' paths may be no symbolic links."""
        return 2 if self.kind == "federation" else 3

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of a round."""
        return self.kind not in ("keys", "federation")

    def public_files(self, workspace: Workspace) -> list[str]:
        """The two files of what is no folder: the signature first, since what it signs counts from its arrival on."""
        path = workspace.public_keys(self.client) if self.kind == "keys" else workspace.federation
        return [f"{path.name}.sig", path.name]

    def takes(self, file: str, workspace: Workspace) -> bool:
        """Whether a file of this name can be in it."""
        if not self.is_folder:
            return file in self.public_files(workspace)
        known = {MANIFEST, SIGNATURE} | CONTENTS.get(self.kind, set())
        return file in known or (self.kind == "close" and is_sealed(file))


def is_sealed(file: str) -> bool:
    """Whether a file of this name in a close is sealed to one client."""
    return re.fullmatch(SEALED_INBOX, file) is not None


def is_for(client: int, close: Path) -> bool:
    """Whether a close, by its manifest, has a file for this client. One without a manifest is for others to judge."""
    try:
        return inbox(client) in read_manifest(close)[0].files
    except (Damaged, NotReady):
        return True


T = TypeVar("T")


def sorted_out(members: Mapping[str, T], workspace: Workspace, where: Path) -> dict[Parcel, dict[str, T]]:
    """The files of a bundle, or their sizes, by what they belong to.

    Raises Refused for a name that is not exchanged here.
    """
    parcels: dict[Parcel, dict[str, T]] = {}
    for name, content in members.items():
        parcel, file = _parse(name, workspace)
        if parcel is None:
            rounds, clients = workspace.agreement.federation.rounds, len(workspace.clients)
            message = (
                f"{name} is nothing that this federation exchanges: it has {rounds} rounds, clients 1 to {clients}"
            )
            raise Refused(message, where=where, mend="unpack it in the workspace that it was made for")
        parcels.setdefault(parcel, {})[file] = content
    return dict(sorted(parcels.items()))


def _parse(name: str, workspace: Workspace) -> tuple[Parcel | None, str]:
    """What a name from outside stands for; None unless it is exactly how we would spell that ourselves."""
    file = name.rpartition("/")[2]
    parcel = Parcel("federation")
    if found := NAME.fullmatch(name):
        parcel = Parcel(found[2], int(found[1]), int(found[3] or 0))  # type: ignore[arg-type]
    elif found := KEYS.fullmatch(name):
        parcel = Parcel("keys", client=int(found[1]))
    has_round = parcel.round in range(1, workspace.agreement.federation.rounds + 1) or not parcel.is_folder
    has_client = parcel.client in workspace.clients or parcel.kind in ("broadcast", "close", "federation")
    if has_round and has_client and parcel.takes(file, workspace) and parcel.name(workspace, file) == name:
        return parcel, file
    return None, file


def collected(parcel: Parcel, workspace: Workspace, *, to: int | None = None) -> dict[str, bytes]:
    """What lies in a folder that is to be sent, or the public files. Hidden files of rsync and the like stay behind.

    to: of a close, only what is for this client. Raises Refused where a secret lies, Damaged for a file
    that has no place.
    """
    folder = parcel.folder(workspace)
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged(f"{folder.name} is no folder, or a link to one", where=folder, mend="put the folder itself there")
    names = sorted(path.name for path in folder.iterdir()) if parcel.is_folder else parcel.public_files(workspace)
    wanted = []
    for name in names:
        path = folder / name
        if parcel.is_folder and not parcel.takes(name, workspace):
            _refuse_stranger(path)
            continue
        sealed = re.fullmatch(SEALED_INBOX, name) if parcel.kind == "close" else None
        if sealed and to not in (None, int(sealed[1])):
            continue
        wanted.append(name)

    def read(name: str) -> bytes:
        return writing.read(folder / name, limit_bytes=writing.LARGEST_ADAPTER_BYTES, levels=parcel.levels)

    check_first(parcel, {name: (folder / name).lstat().st_size for name in wanted}, read, workspace, folder)
    contents = {name: read(name) for name in wanted}
    for name, content in contents.items():
        if PRIVATE_KEY in content:
            raise _secret(folder / name)
    return contents


def _refuse_stranger(path: Path) -> None:
    if path.name == SECRETS_MARKER or path.suffix in (".pem", ".key"):
        raise _secret(path)
    if not path.name.startswith("."):
        raise Damaged(f"{path.name} does not belong in {path.parent.name}", where=path, mend="take it out, then pack")


def _secret(path: Path) -> Refused:
    mend = "move it out of the workspace, and make new keys: whoever has the folder may have read it"
    return Refused(f"{path.name} is or holds a secret key, which is never sent", where=path, mend=mend)


def check_first(
    parcel: Parcel, sizes: Mapping[str, int], read: Callable[[str], bytes], workspace: Workspace, where: Path
) -> None:
    """Raise unless a manifest and its signature let the rest of a folder pass, before that is read.

    sizes: of the files that are there, in bytes. read: gives a small one. where: what to call the folder.
    """
    for name, size_bytes in sizes.items():
        if name.endswith((".json", ".sig")) and size_bytes > writing.LARGEST_JSON_BYTES:
            message = f"{name} has {size_bytes} bytes, at most {writing.LARGEST_JSON_BYTES} are expected"
            raise Damaged(message, where=where / name, mend=writing.COPY_AGAIN)
    if not parcel.is_folder or MANIFEST not in sizes:
        return
    content = read(MANIFEST)
    manifest = _manifest(content, where)
    _check_claims(parcel, manifest, workspace, where)
    _check_names(parcel, manifest, sizes.keys(), where)
    for name, entry in manifest.files.items():
        if sizes.get(name, 0) > max(entry.size_bytes, writing.READ_AT_ONCE_BYTES):
            message = f"{name} has {sizes[name]} bytes, its manifest says {entry.size_bytes}"
            raise Damaged(message, where=where / name, mend=writing.COPY_AGAIN)
    if members := roster.anyones(workspace):
        if manifest.federation_sha256 != members.sha256:
            message = f"{where.name} is of another roster than the one in exchange/"
            raise Refused(message, where=where / MANIFEST, mend="unpack the newest roster first, and join it")
        if SIGNATURE not in sizes:
            message = f"{where.name} is not signed, which every folder of this federation is"
            raise Damaged(message, where=where, mend=writing.COPY_AGAIN)
        signature = _json(SIGNATURE, read(SIGNATURE), where)
        key = members.key_of(manifest.party)
        signatures.check_value(signature, content, manifest.stage, key, where / MANIFEST, manifest.party)
    check_sizes(Artefact(where, manifest, content, writing.sha256(content), {}), workspace)


def check(parcel: Parcel, contents: Mapping[str, bytes], workspace: Workspace, where: Path) -> None:
    """Raise unless these files are a whole folder of that place, of this federation, under this agreement.

    where: what to call the folder. Public files are only looked at as JSON; `enroll` and `join` judge them.
    """
    for name, content in contents.items():
        if name.endswith((".json", ".sig")):
            _json(name, content, where)
    if not parcel.is_folder:
        if missing := [name for name in parcel.public_files(workspace) if name not in contents]:
            raise Damaged(f"{missing[0]} is missing", where=where, mend=writing.COPY_AGAIN)
        return
    if MANIFEST not in contents:
        raise Damaged(f"{where.name} has no {MANIFEST}", where=where, mend=writing.COPY_AGAIN)
    manifest = _manifest(contents[MANIFEST], where)
    _check_claims(parcel, manifest, workspace, where)
    _check_names(parcel, manifest, contents.keys(), where)
    _check_files(manifest, contents, where)
    if ADAPTER_WEIGHTS in contents:
        artefact = Artefact(
            path=where,
            manifest=manifest,
            signed=contents[MANIFEST],
            sha256=writing.sha256(contents[MANIFEST]),
            contents={name: contents[name] for name in manifest.files},
        )
        read_adapter(artefact, None, workspace.agreement.slm.lora)


def _manifest(content: bytes, where: Path) -> Manifest:
    try:
        return Manifest.model_validate(_json(MANIFEST, content, where))
    except ValidationError as error:
        first = error.errors()[0]
        message = f"not a manifest: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise Damaged(message, where=where / MANIFEST, mend=writing.COPY_AGAIN) from None


def _json(name: str, content: bytes, where: Path) -> dict[str, object]:
    try:
        return writing.parse_json(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not valid JSON: {error}", where=where / name, mend=writing.COPY_AGAIN) from None


def _check_names(parcel: Parcel, manifest: Manifest, names: Set[str], where: Path) -> None:
    """Raise Damaged unless the files are those that the manifest lists, and it lists what such a folder has."""
    listed, found, expected = set(manifest.files), names - {MANIFEST, SIGNATURE}, expected_names(manifest)
    inboxes = set(filter(is_sealed, listed))
    if listed != (inboxes if expected is None else expected):
        message = f"the manifest lists {sorted(listed)}, which is not what {where.name} has"
        raise Damaged(message, where=where / MANIFEST, mend=writing.COPY_AGAIN)
    missing = listed - found - (inboxes if parcel.kind == "close" and found else set())
    if missing or found - listed:
        message = (
            f"{sorted(missing)[0]} is missing" if missing else f"{sorted(found - listed)[0]} is not in the manifest"
        )
        raise Damaged(message, where=where, mend=writing.COPY_AGAIN)


def _check_files(manifest: Manifest, contents: Mapping[str, bytes], where: Path) -> None:
    """Raise Damaged unless every file has the size and the digest that the manifest names."""
    for name in sorted(contents.keys() - {MANIFEST, SIGNATURE}):
        entry = manifest.files[name]
        if (len(contents[name]), writing.sha256(contents[name])) != (entry.size_bytes, entry.sha256):
            message = f"{name} is not the file its manifest names: {len(contents[name])} bytes, sha256 "
            message += f"{writing.sha256(contents[name])[:16]}..., expected {entry.size_bytes}, {entry.sha256[:16]}..."
            raise Damaged(message, where=where / name, mend=writing.COPY_AGAIN)


def _check_claims(parcel: Parcel, manifest: Manifest, workspace: Workspace, where: Path) -> None:
    claims = [
        ("federation", manifest.federation, workspace.agreement.federation.name),
        ("stage", manifest.stage, STAGES[parcel.kind]),
        ("round", manifest.round, parcel.round),
        ("client", manifest.client, parcel.client or None),
        ("agreement", manifest.agreement_sha256, workspace.agreement_sha256),
        ("LoRA shape", manifest.lora, workspace.agreement.slm.lora),
    ]
    for name, found, expected in claims:
        if found != expected:
            message = f"{where.name} is of another {name}: {str(found)[:40]}, here it is {str(expected)[:40]}"
            edited = edits.since(workspace, manifest.agreement_sha256)
            if edited and name in ("federation", "agreement"):
                message += f"; edited since in fedcollm.toml: {edited}"
            mend = "give it to the workspace it was made for; or, if fedcollm.toml was edited here or there, undo that"
            raise Refused(message, where=where / MANIFEST, mend=mend)
