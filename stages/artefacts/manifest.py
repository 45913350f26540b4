"""The manifest of an adapter folder: what an auditor asks, and the chain from each file to those it was made from.

A manifest holds nothing that changes from one run to the next on one machine (times go to the private log), so that a
stage repeated gives the same bytes, and nothing that names a person, a host or a path. Once a federation has a roster,
its maker signs its exact bytes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from stages.artefacts import tensor_files
from stages.files import writing
from stages.parties import roster, signatures, vault
from stages.parties.roster import Roster
from stages.parties.vault import Vault
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.secagg.shamir import SHARE_BYTES
from stages.workspace import edits
from stages.workspace.agreement import ROLES, Lora, Quantization, Role
from stages.workspace.paths import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CAPTURE,
    MANIFEST,
    MASKED_UPDATE,
    SEALED_INBOX,
    SEALED_REVEAL,
    SEALED_SHARES,
    SECRETS_MARKER,
    SIGNATURE,
    Workspace,
)

FORMAT: Literal["fedcollm/1"] = "fedcollm/1"
LIBRARIES = ("fedcollm", "torch", "transformers", "peft", "safetensors", "numpy")

SEAL_BYTES = 64
"""More than the salt and the tag of a sealed row have."""

LEVELS = 3
"""exchange/round-0005/client-2/ and a file: none of the last three parts may be a symbolic link."""

EDITED = "undo the edit of fedcollm.toml, which is the same for all; only where all agreed on it, --overwrite"

KEPT_OLD = "kept_old"
"""The metric of an aggregate that is the broadcast's adapter, since the round was given up."""

Stage = Literal["broadcast", "client-train", "aggregate", "capture", "co-distill", "close", "reveal"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[int, Field(ge=1, le=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Part):
    """One file beside the manifest."""

    sha256: Sha256
    size_bytes: Count


class BaseIdentity(_Part):
    """Which base model and tokenizer an adapter belongs to, by content: of the weights as published.

    settings_sha256: of the configuration, how it generates and the special tokens; earlier versions wrote none.
    quantization: how the weights are held while an adapter is trained on them; another way is another base. Where there
    is none it is not written either.
    """

    architecture: str
    weights_sha256: Sha256
    tokenizer_sha256: Sha256
    settings_sha256: Sha256 | None = None
    quantization: Quantization | None = None

    def differs(self, other: BaseIdentity) -> str | None:
        """The first field that another base differs in, None if it is this one; settings count where both tell them."""
        for name in type(self).model_fields:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs and not (name == "settings_sha256" and None in (ours, theirs)):
                return name
        return None

    def is_of(self, other: BaseIdentity) -> bool:
        """Whether both are of one base."""
        return self.differs(other) is None

    @model_serializer(mode="wrap")
    def _without_what_is_not(self, whole: SerializerFunctionWrapHandler) -> dict[str, str]:
        return {name: value for name, value in whole(self).items() if value is not None}


class Opening(_Part):
    """What a broadcast says in secure mode: with which keys, in this order, by these clients, a round is masked."""

    slot: Count
    clients: list[Number]
    prekeys: list[Sha256]
    threshold: Annotated[int, Field(ge=3)]
    previous_sha256: Sha256


class Masking(_Part):
    """What a masked update says of itself: the digest of its vector, and commitments to every secret behind it."""

    y_sha256: Sha256
    commit_self: Sha256
    commit_pairs: dict[str, Sha256]


class Unmasking(_Part):
    """How a sum was opened: whose updates are in it, and who revealed."""

    survivors: list[int]
    revealed: list[int]
    count: Count


class PrivacyClaim(_Part):
    """What differential privacy promises: epsilon and delta of all rounds so far, where one unit is changed.

    unit: an example is one row of one client's training data.
    reset: whether the client has ever counted from zero again; epsilon is then of the rounds since alone.
    ledger_sha256: the last line of the client's ledger when this was made: one without that line is not the whole.
    """

    unit: Literal["example"]
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    reset: bool = False
    ledger_sha256: Sha256 | None = None


class Manifest(_Part):
    """Everything that is said of one adapter folder."""

    format: Literal["fedcollm/1"] = FORMAT
    federation: str
    agreement_sha256: Sha256
    federation_sha256: Sha256 | None = None
    stage: Stage
    role: Role = "slm"
    round: Number
    attempt: Count = 0
    client: Number | None = None
    parents: dict[str, Sha256]
    files: dict[str, FileEntry]
    base: BaseIdentity
    lora: Lora
    parameters: Count
    seed: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    steps: Count = 0
    examples: Count = 0
    tokens: Count = 0
    metrics: dict[str, Finite] = {}
    transcript: Sha256 | None = None
    opening: Opening | None = None
    masking: Masking | None = None
    closing: dict[str, Sha256] | None = None
    unmasking: Unmasking | None = None
    privacy: PrivacyClaim | None = None
    versions: dict[str, str]

    @property
    def party(self) -> str:
        """Who made it, and signs it."""
        return vault.client(self.client) if self.client is not None else vault.SERVER


@dataclass(frozen=True)
class Artefact:
    """A folder as read: its manifest, the manifest's own bytes and their digest, and the bytes of its files."""

    path: Path
    manifest: Manifest
    signed: bytes
    sha256: str
    contents: dict[str, bytes]


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of every library that has a part in the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a folder and the sha256 of its bytes; the other files are not read."""
    manifest, content = _read_manifest(folder)
    return manifest, writing.sha256(content)


def _read_manifest(folder: Path, levels: int = LEVELS) -> tuple[Manifest, bytes]:
    path = folder / MANIFEST
    if folder.is_symlink():
        message = f"{folder.name} is a symbolic link; exchanged folders are never followed"
        raise Damaged(message, where=folder, mend="put the folder itself there, or make it again with --overwrite")
    if folder.exists() and not folder.is_dir():
        raise Damaged(f"{folder.name} is not a folder", where=folder, mend=writing.COPY_AGAIN)
    if folder.is_dir() and not path.exists() and not path.is_symlink():
        mend = "wait until the whole folder is copied; or make it again with --overwrite"
        raise NotReady(f"{folder.name} has no {MANIFEST} yet", where=folder, mend=mend)
    value, content = writing.read_json(path, levels=levels)
    try:
        return Manifest.model_validate(value), content
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = f"not a {FORMAT} manifest: {key}: {first['msg']}"
        raise Damaged(message, where=path, mend=writing.COPY_AGAIN) from error


def read_artefact(
    folder: Path,
    *,
    only: Iterable[str] | None = None,
    limit_bytes: int = writing.LARGEST_ADAPTER_BYTES,
    before: Callable[[Artefact], None] | None = None,
) -> Artefact:
    """A folder with every byte checked against its manifest.

    only: the files to read; those left out need not be there. limit_bytes: of each; a larger one is not read at all.
    before: raises for a manifest, signature included, whose files are not worth reading; it gets none of them.
    Raises NotReady if it, or a part of it, has not arrived; Damaged if a file is superfluous or changed.
    """
    manifest, signed = _read_manifest(folder)
    wanted = manifest.files if only is None else {name: manifest.files[name] for name in only if name in manifest.files}
    check_names(folder, manifest, wanted)
    if before:
        before(Artefact(folder, manifest, signed, writing.sha256(signed), {}))
    contents = {}
    mend = writing.FOLDER_AGAIN
    for name, entry in wanted.items():
        path = folder / name
        look = tensor_files.check_head if path.suffix == ".safetensors" else None
        content = writing.read(path, limit_bytes=limit_bytes, levels=LEVELS, named_bytes=entry.size_bytes, look=look)
        if len(content) < entry.size_bytes:
            message = f"{name} has {len(content)} bytes of {entry.size_bytes}: still arriving, or cut short"
            raise NotReady(message, where=path, mend=f"wait, or {mend}")
        found = writing.sha256(content)
        if found != entry.sha256:
            message = (
                f"{name} is not the file its manifest names: sha256 {found[:16]}..., expected {entry.sha256[:16]}..."
            )
            raise Damaged(message, where=path, mend=mend)
        contents[name] = content
    return Artefact(folder, manifest, signed, writing.sha256(signed), contents)


def received(
    folder: Path,
    workspace: Workspace,
    *,
    reader: str | None,
    stage: Stage,
    round: int,
    client: int | None = None,
    only: Iterable[str] | None = None,
    limit_bytes: int = writing.LARGEST_ADAPTER_BYTES,
) -> Artefact:
    """A folder as read_artefact has it, of which nothing but the manifest is read unless check_belongs lets it pass."""
    belongs = functools.partial(
        check_belongs, workspace=workspace, reader=reader, stage=stage, round=round, client=client
    )
    return read_artefact(folder, only=only, limit_bytes=limit_bytes, before=belongs)


def read_sound(folder: Path, workspace: Workspace, *, only: Iterable[str] | None = None) -> Artefact:
    """A folder of this machine's own federation, whatever it is and where: its signature and its sizes come first.

    Raises Refused for one of another roster.
    """

    def check(found: Artefact) -> None:
        members = roster.anyones(workspace)
        if members and found.manifest.federation_sha256 != members.sha256:
            message = f"{workspace.shown(folder)} is of another roster than this federation's"
            raise Refused(message, where=found.path / MANIFEST, mend="make it again with --overwrite")
        if members:
            check_signed(found, members, found.manifest.party)
        check_sizes(found, workspace)

    return read_artefact(folder, only=only, before=check)


def expected_names(manifest: Manifest) -> set[str] | None:
    """The files that such a folder has beside its manifest; None where that depends on who takes part: close."""
    if manifest.stage == "close":
        return None
    if manifest.stage == "reveal":
        return {SEALED_REVEAL}
    if manifest.stage == "capture":
        return {CAPTURE}
    return {MASKED_UPDATE, SEALED_SHARES} if manifest.masking else {ADAPTER_CONFIG, ADAPTER_WEIGHTS}


def inbox(client: int) -> str:
    """The file of close/ that only this client can open: the shares that others sealed to it."""
    return f"client-{client}.safetensors"


def check_names(folder: Path, manifest: Manifest, wanted: Iterable[str] | None = None) -> None:
    """Raise unless the folder holds the wanted files (default: all), and none that the manifest does not name.

    Hidden files are passed over: rsync has such while it copies.
    """
    expected = expected_names(manifest)
    listed = set(manifest.files)
    if listed != (expected if expected is not None else {name for name in listed if _is_inbox(name)}):
        message = f"the manifest lists {sorted(listed)}, {_kind(manifest)} has {sorted(expected or {inbox(1)})}"
        raise Damaged(message, where=folder / MANIFEST, mend=writing.COPY_AGAIN)
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    superfluous, missing = found - listed - {MANIFEST, SIGNATURE}, set(listed if wanted is None else wanted) - found
    if superfluous:
        mend = "remove it: such a folder holds what its manifest names, nothing else is ever opened"
        raise Damaged(f"{sorted(superfluous)[0]} does not belong in {_kind(manifest)}", where=folder, mend=mend)
    if missing:
        mend = "wait until the whole folder is copied, or copy it again"
        raise NotReady(f"{sorted(missing)[0]} is missing", where=folder, mend=mend)


def _kind(manifest: Manifest) -> str:
    kinds = {"close": "a round's close", "reveal": "a reveal", "capture": "a capture"}
    return "a masked update" if manifest.masking else kinds.get(manifest.stage, "an adapter folder")


def _is_inbox(name: str) -> bool:
    return re.fullmatch(SEALED_INBOX, name) is not None


def check_belongs(
    artefact: Artefact,
    workspace: Workspace,
    *,
    reader: str | None,
    stage: Stage,
    round: int,
    client: int | None = None,
) -> None:
    """Raise unless the artefact is what its place says, made under this workspace's agreement, by whom the roster says.

    Looks at its manifest and signature alone, and so can be asked before anything else is read.

    reader: the party that is about to use it, whose roster counts: "client-2", "server"; None for those who only look.
    """
    manifest = artefact.manifest
    members = roster.pinned(workspace, reader) if reader else roster.anyones(workspace)
    if members:
        check_signed(artefact, members, vault.client(client) if client is not None else vault.SERVER)
    claims = [
        ("federation", manifest.federation, workspace.agreement.federation.name),
        ("stage", manifest.stage, stage),
        ("round", manifest.round, round),
        ("client", manifest.client, client),
        ("LoRA shape", manifest.lora, workspace.agreement.model_of(manifest.role).lora),
        ("agreement (sha256 of fedcollm.toml)", manifest.agreement_sha256, workspace.agreement_sha256),
        ("roster (sha256 of federation.json)", manifest.federation_sha256, members.sha256 if members else None),
    ]
    for name, found, expected in claims:
        if found != expected:
            masked = f" (transcript {manifest.transcript[:16]}...)" if manifest.transcript else ""
            shown = workspace.shown(artefact.path)
            message = f"{shown} is of another {name}: {_short(found)}{masked}, here it is {_short(expected)}"
            mend = "take it out, and copy what belongs there"
            edited = edits.since(workspace, manifest.agreement_sha256)
            if edited and name.startswith(("federation", "agreement", "LoRA")):
                message, mend = f"{message}; edited since in fedcollm.toml: {edited}", EDITED
            elif name.startswith(("agreement", "LoRA")):
                mend = EDITED
            elif name.startswith("roster"):
                mend = "it was made before this federation enrolled, or for another: make it again with --overwrite"
            raise Refused(message, where=artefact.path / MANIFEST, mend=mend)
    check_sizes(artefact, workspace)


def check_sizes(artefact: Artefact, workspace: Workspace) -> None:
    """Raise Damaged for a manifest that names a larger file than its folder can have.

    By the numbers of the adapter, the clients of the agreement, and where the base model is here, by that.
    """
    manifest = artefact.manifest
    for name, entry in manifest.files.items():
        most = _most_bytes(manifest, name, workspace, entry.size_bytes)
        if entry.size_bytes > most:
            message = f"its manifest says that {name} has {entry.size_bytes} bytes, here it can have {most} at most"
            raise Damaged(message, where=artefact.path / MANIFEST, mend=writing.COPY_AGAIN)


def _most_bytes(manifest: Manifest, name: str, workspace: Workspace, size_bytes: int) -> int:
    if name == CAPTURE:
        return writing.LARGEST_ADAPTER_BYTES
    if name == SEALED_SHARES or _is_inbox(name):
        clients = len(workspace.clients)
        return tensor_files.largest_bytes(clients * (SEAL_BYTES + SHARE_BYTES * clients))
    if name not in (ADAPTER_WEIGHTS, MASKED_UPDATE):
        return writing.LARGEST_JSON_BYTES
    most = min(tensor_files.largest_bytes(manifest.parameters + 3), writing.LARGEST_ADAPTER_BYTES)
    if size_bytes > writing.READ_AT_ONCE_BYTES and (known := tensor_files.most_numbers(workspace, manifest.role)):
        return min(most, tensor_files.largest_bytes(known))
    return most


def place_of(manifest: Manifest) -> str:
    """Where a folder says it belongs, as the last two names of its path: round-0005/client-2."""
    names = {"client-train": f"client-{manifest.client}", "reveal": f"reveal-{manifest.client}"}
    names["capture"] = f"captured-{manifest.role}"
    name = manifest.role if manifest.stage == "co-distill" else names.get(manifest.stage, manifest.stage)
    return f"round-{manifest.round:04d}/{name}"


def round_of_parent(manifest: Manifest, name: str) -> int:
    """The round that a folder's parent of this name was made in: its own, or the one before."""
    is_start = manifest.stage == "broadcast" or (manifest.stage == "client-train" and name != "broadcast")
    return manifest.round - (is_start or (manifest.stage in ("co-distill", "capture") and name == "llm"))


def parent_place(workspace: Workspace, manifest: Manifest, name: str) -> Path:
    """Where a folder's parent of this name lies."""
    round = round_of_parent(manifest, name)
    if found := re.fullmatch(r"client-([1-9][0-9]{0,8})", name):
        return workspace.client_update(round, int(found[1]))
    for role in ROLES:
        if name == f"captured-{role}":
            return workspace.captured(round, role)
    places = {"aggregate": workspace.aggregate, "slm": workspace.slm, "llm": workspace.llm, "close": workspace.close}
    return places.get(name.removesuffix("-after"), workspace.broadcast)(round)


def check_signed(artefact: Artefact, members: Roster, party: str) -> None:
    """Raise unless this party signed the manifest as the kind of folder that it says it is."""
    where = artefact.path / MANIFEST
    signatures.check(artefact.signed, artefact.manifest.stage, members.key_of(party), where, party, levels=LEVELS)


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:16]}..." if len(text) == 64 else text


def publish(
    folder: Path,
    contents: Mapping[str, bytes],
    workspace: Workspace,
    *,
    stage: Stage,
    round: int,
    parents: dict[str, str],
    base: BaseIdentity,
    parameters: int,
    role: Role = "slm",
    attempt: int = 0,
    client: int | None = None,
    seed: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    steps: int = 0,
    examples: int = 0,
    tokens: int = 0,
    metrics: Mapping[str, float] | None = None,
    transcript: str | None = None,
    opening: Opening | None = None,
    masking: Masking | None = None,
    closing: Mapping[str, str] | None = None,
    unmasking: Unmasking | None = None,
    over: writing.Place | None = None,
    privacy: PrivacyClaim | None = None,
) -> Manifest:
    """Publish files with the manifest that names them, which is written last, signed where there is a roster.

    over: as for files.publishing. Returns the manifest.
    """
    party = vault.client(client) if client is not None else vault.SERVER
    members = roster.pinned(workspace, party)
    manifest = Manifest(
        federation=workspace.agreement.federation.name,
        agreement_sha256=workspace.agreement_sha256,
        federation_sha256=members.sha256 if members else None,
        stage=stage,
        role=role,
        round=round,
        attempt=attempt,
        client=client,
        parents=parents,
        files={name: FileEntry(sha256=writing.sha256(data), size_bytes=len(data)) for name, data in contents.items()},
        base=base,
        lora=workspace.agreement.model_of(role).lora,
        parameters=parameters,
        seed=seed,
        dtype=dtype,
        steps=steps,
        examples=examples,
        tokens=tokens,
        metrics=dict(metrics or {}),
        transcript=transcript,
        opening=opening,
        masking=masking,
        closing=None if closing is None else dict(closing),
        unmasking=unmasking,
        privacy=privacy,
        versions=dict(versions()),
    )
    content = writing.json_bytes(manifest.model_dump())
    edits.keep(workspace)
    signature = {}
    if members:
        signature = {SIGNATURE: signatures.sign(content, stage, Vault.need(workspace, party).identity)}
    whole = {**contents, MANIFEST: content, **signature}
    writing.publish(folder, whole, over=over, levels=LEVELS - 1, spares=spare_strangers)
    return manifest


def spare_strangers(folder: Path) -> None:
    """Raise Damaged if a folder that is about to be replaced holds anything that no adapter folder has.

    Hidden files are no reason: rsync leaves such.
    """
    ours = {MANIFEST, SIGNATURE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, MASKED_UPDATE, SEALED_SHARES, SEALED_REVEAL, CAPTURE}
    for path in sorted(folder.iterdir()):
        is_ours = path.name in ours or _is_inbox(path.name)
        is_ours |= path.name.startswith(".") and path.name != SECRETS_MARKER
        if not is_ours or (path.is_dir() and not path.is_symlink()):
            message = f"{path.name} does not belong in {folder.name}, which is not replaced as long as it is there"
            raise Damaged(message, where=path, mend="move it out, and give the same command again")


def already_made(
    folder: Path,
    workspace: Workspace,
    parents: dict[str, str],
    *,
    overwrite: bool,
    log: Path | None = None,
    data: str = "",
    opening: Opening | None = None,
) -> Manifest | None:
    """The manifest of a folder that was made from exactly these parents under this agreement, or None: make it.

    data: the sha256 of the training data, compared with that in the log; exchanged files do not tell it.
    opening: what a broadcast must say of clients and keys.
    Raises Refused if the folder was made from something else, Damaged if it is broken; overwrite makes either None.
    """
    if overwrite or not os.path.lexists(folder):
        return None
    manifest, _ = read_manifest(folder)
    members = roster.pinned(workspace, manifest.party)
    changed = sorted(
        name for name in manifest.parents.keys() | parents.keys() if manifest.parents.get(name) != parents.get(name)
    )
    if manifest.agreement_sha256 != workspace.agreement_sha256:
        changed.append("fedcollm.toml")
    if members and manifest.federation_sha256 != members.sha256:
        changed.append("the roster")
    if opening and manifest.opening != opening:
        changed.append("the clients, or the keys, that the round is opened for")
    if log is not None:
        logged = writing.logged_inputs(log).get("data")
        if logged is None:
            return None  # stopped between publishing and logging: what it was trained on is not known
        if logged != data:
            changed.append("the training data")
    if changed:
        message = f"{workspace.shown(folder)} was made from other inputs; changed since: {', '.join(changed)}"
        mend = "give the command again with --overwrite to replace it"
        if manifest.agreement_sha256 != workspace.agreement_sha256:
            edited = edits.since(workspace, manifest.agreement_sha256)
            message, mend = message + (f": {edited}" if edited else ""), EDITED
        raise Refused(message, where=folder, mend=mend)

    def check(found: Artefact) -> None:
        if members:
            check_signed(found, members, found.manifest.party)
        check_sizes(found, workspace)

    return read_artefact(folder, before=check).manifest
