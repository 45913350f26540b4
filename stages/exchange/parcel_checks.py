"""What a parcel may hold: names, files and claims, before any of it is put in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path

from pydantic import ValidationError

from stages.artefacts import tensor_files
from stages.artefacts.adapter_files import layout_of, read_adapter
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Artefact, expected_names
from stages.artefacts.residual_files import read_residual
from stages.artefacts.sizes import check_sizes
from stages.artefacts.vocabulary_files import parse_vocabulary
from stages.exchange.parcel_kinds import Parcel, is_sealed
from stages.files import reading
from stages.parties import signatures
from stages.parties.party import Onlooker
from stages.runtime.errors import Damaged, Refused
from stages.workspace import edits
from stages.workspace.names import (
    ADAPTER_WEIGHTS,
    CUTS,
    ENCRYPTED,
    KNOWLEDGE,
    MANIFEST,
    OPENED,
    RESIDUAL,
    SIGNATURE,
    VOCABULARY,
)
from stages.workspace.paths import Workspace


def check_first(
    parcel: Parcel, sizes: Mapping[str, int], read: Callable[[str], bytes], workspace: Workspace, where: Path
) -> None:
    """Raise unless a manifest and its signature let the rest of a folder pass, before that is read.

    sizes: of the files that are there, in bytes. read: gives a small one. where: what to call the folder.
    """
    for name, size_bytes in sizes.items():
        if name.endswith((".json", ".sig")) and size_bytes > reading.LARGEST_JSON_BYTES:
            message = f"{name} has {size_bytes} bytes, at most {reading.LARGEST_JSON_BYTES} are expected"
            raise Damaged(message, where=where / name, mend=reading.COPY_AGAIN)
    if not parcel.is_folder or MANIFEST not in sizes:
        return
    content = read(MANIFEST)
    manifest = _manifest(content, where)
    _check_claims(parcel, manifest, workspace, where)
    _check_names(parcel, manifest, sizes.keys(), where)
    for name, entry in manifest.files.items():
        if sizes.get(name, 0) > max(entry.size_bytes, reading.READ_AT_ONCE_BYTES):
            message = f"{name} has {sizes[name]} bytes, its manifest says {entry.size_bytes}"
            raise Damaged(message, where=where / name, mend=reading.COPY_AGAIN)
    if members := Onlooker(workspace).members:
        if manifest.federation_sha256 != members.sha256:
            message = f"{where.name} is of another roster than the one in exchange/"
            raise Refused(message, where=where / MANIFEST, mend="unpack the newest roster first, and join it")
        if SIGNATURE not in sizes:
            message = f"{where.name} is not signed, which every folder of this federation is"
            raise Damaged(message, where=where, mend=reading.COPY_AGAIN)
        signature = _json(SIGNATURE, read(SIGNATURE), where)
        key = members.key_of(manifest.party)
        signatures.check_value(signature, content, manifest.stage, key, where=where / MANIFEST, whose=manifest.party)
    own = workspace.of_client(parcel.client) if parcel.client else workspace
    check_sizes(Artefact(where, manifest, content, reading.sha256(content), {}), own)


def check(parcel: Parcel, contents: Mapping[str, bytes], workspace: Workspace, where: Path) -> None:
    """Raise unless these files are a whole folder of that place, of this federation, under this agreement.

    where: what to call the folder. Public files are only looked at as JSON; `enroll` and `join` judge them.
    """
    for name, content in contents.items():
        if name.endswith((".json", ".sig")):
            _json(name, content, where)
    if not parcel.is_folder:
        if missing := [name for name in parcel.public_files(workspace) if name not in contents]:
            raise Damaged(f"{missing[0]} is missing", where=where, mend=reading.COPY_AGAIN)
        return
    if MANIFEST not in contents:
        raise Damaged(f"{where.name} has no {MANIFEST}", where=where, mend=reading.COPY_AGAIN)
    manifest = _manifest(contents[MANIFEST], where)
    _check_claims(parcel, manifest, workspace, where)
    _check_names(parcel, manifest, contents.keys(), where)
    _check_files(manifest, contents, where)
    if ADAPTER_WEIGHTS in contents:
        artefact = Artefact(
            path=where,
            manifest=manifest,
            signed=contents[MANIFEST],
            sha256=reading.sha256(contents[MANIFEST]),
            contents={name: contents[name] for name in manifest.files},
        )
        tensors = read_adapter(artefact, None, manifest.lora)
        if RESIDUAL in contents:
            read_residual(artefact, layout_of(tensors), workspace.agreement)
    public = {CUTS, KNOWLEDGE, ENCRYPTED, OPENED}  # what they say is for whoever can read it to judge
    for name in contents.keys() & public:
        tensor_files.read_header(contents[name], where / name)
    if VOCABULARY in contents:
        parse_vocabulary(contents[VOCABULARY], where / VOCABULARY)


def _manifest(content: bytes, where: Path) -> Manifest:
    try:
        return Manifest.model_validate(_json(MANIFEST, content, where))
    except ValidationError as error:
        first = error.errors()[0]
        message = f"not a manifest: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise Damaged(message, where=where / MANIFEST, mend=reading.COPY_AGAIN) from None


def _json(name: str, content: bytes, where: Path) -> dict[str, object]:
    try:
        return reading.parse_json(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not valid JSON: {error}", where=where / name, mend=reading.COPY_AGAIN) from None


def _check_names(parcel: Parcel, manifest: Manifest, names: Set[str], where: Path) -> None:
    """Raise Damaged unless the files are those that the manifest lists, and it lists what such a folder has."""
    listed, found, expected = set(manifest.files), names - {MANIFEST, SIGNATURE}, expected_names(manifest)
    inboxes = set(filter(is_sealed, listed))
    if listed != (inboxes if expected is None else expected):
        message = f"the manifest lists {sorted(listed)}, which is not what {where.name} has"
        raise Damaged(message, where=where / MANIFEST, mend=reading.COPY_AGAIN)
    missing = listed - found - (inboxes if parcel.kind == "close" and found else set())
    if missing or found - listed:
        message = (
            f"{sorted(missing)[0]} is missing" if missing else f"{sorted(found - listed)[0]} is not in the manifest"
        )
        raise Damaged(message, where=where, mend=reading.COPY_AGAIN)


def _check_files(manifest: Manifest, contents: Mapping[str, bytes], where: Path) -> None:
    """Raise Damaged unless every file has the size and the digest that the manifest names."""
    for name in sorted(contents.keys() - {MANIFEST, SIGNATURE}):
        entry = manifest.files[name]
        if (len(contents[name]), reading.sha256(contents[name])) != (entry.size_bytes, entry.sha256):
            message = f"{name} is not the file its manifest names: {len(contents[name])} bytes, sha256 "
            message += f"{reading.sha256(contents[name])[:16]}..., expected {entry.size_bytes}, {entry.sha256[:16]}..."
            raise Damaged(message, where=where / name, mend=reading.COPY_AGAIN)


def _check_claims(parcel: Parcel, manifest: Manifest, workspace: Workspace, where: Path) -> None:
    own = workspace.of_client(parcel.client) if parcel.client else workspace
    claims = [
        ("federation", manifest.federation, workspace.agreement.federation.name),
        ("stage", manifest.stage, parcel.stage(workspace)),
        ("round", manifest.round, parcel.round),
        ("client", manifest.client, parcel.client or None),
        ("agreement", manifest.agreement_sha256, workspace.agreed_in(parcel.round)),
        ("LoRA shape", manifest.lora, own.agreement.model_of(manifest.role).lora),
    ]
    for name, found, expected in claims:
        if found != expected:
            message = f"{where.name} is of another {name}: {str(found)[:40]}, here it is {str(expected)[:40]}"
            edited = edits.since(workspace, manifest.agreement_sha256)
            if edited and name in ("federation", "agreement"):
                message += f"; edited since in fedcollm.toml: {edited}"
            mend = "give it to the workspace it was made for; or, if fedcollm.toml was edited here or there, undo that"
            raise Refused(message, where=where / MANIFEST, mend=mend)
