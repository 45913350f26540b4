"""Publishing an artefact: a folder that is whole or absent, its manifest last."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from stages.artefacts.draft import Draft
from stages.artefacts.lineage import EDITED, check_signed
from stages.artefacts.manifest import (
    FileEntry,
    Manifest,
    Opening,
    versions,
)
from stages.artefacts.reading import LEVELS, Artefact, is_inbox, read_artefact, read_manifest
from stages.artefacts.sizes import check_sizes
from stages.files import reading, seen_places, writing
from stages.parties import signatures
from stages.parties.party import Party
from stages.runtime.errors import Damaged, Refused
from stages.workspace import edits
from stages.workspace.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AGREEMENT,
    CAPTURE,
    CUTS,
    ENCRYPTED,
    KNOWLEDGE,
    MANIFEST,
    MASKED_UPDATE,
    OPENED,
    RESIDUAL,
    SEALED_REVEAL,
    SEALED_SHARES,
    SECRETS_MARKER,
    SERVER_STATE,
    SIGNATURE,
    SPARSE_UPDATE,
    VOCABULARY,
)

KEPT_OLD = "kept_old"
"""The metric of an aggregate that is the broadcast's adapter, since the round was given up."""
GATE_KEPT = "gate_kept"
"""The metric of an aggregate that was put to a gate: 1 if it is the broadcast's adapter, since the gate kept that."""

PUBLIC = "the public rows"


def keeps_old(manifest: Manifest) -> bool:
    """Whether an aggregate is its broadcast's adapter: the gate kept that, or the round was given up."""
    return any(manifest.metrics.get(name) == 1 for name in (GATE_KEPT, KEPT_OLD))


def publish(
    folder: Path,
    contents: Mapping[str, bytes],
    draft: Draft,
    *,
    by: Party,
    over: seen_places.Place | None = None,
) -> Manifest:
    """Publish files with the manifest that names them, which is written last, signed where there is a roster.

    by: who makes it, and signs it. over: as for files.publishing. Returns the manifest.
    """
    workspace, members = by.workspace, by.members
    manifest = Manifest(
        federation=workspace.agreement.federation.name,
        agreement_sha256=workspace.agreement_sha256,
        federation_sha256=members.sha256 if members else None,
        client=None if by.is_server else by.number,
        files={name: FileEntry(sha256=reading.sha256(data), size_bytes=len(data)) for name, data in contents.items()},
        lora=workspace.agreement.model_of(draft.role).lora,
        versions=dict(versions()),
        **{each.name: getattr(draft, each.name) for each in dataclasses.fields(draft)},
    )
    content = reading.json_bytes(manifest.model_dump())
    edits.keep(workspace)
    signature = {}
    if members:
        signature = {SIGNATURE: signatures.sign(content, draft.stage, by.keys.identity)}
    whole = {**contents, MANIFEST: content, **signature}
    writing.publish(folder, whole, over=over, levels=LEVELS - 1, spares=spare_strangers)
    return manifest


def spare_strangers(folder: Path) -> None:
    """Raise Damaged if a folder that is about to be replaced holds anything that no adapter folder has.

    Hidden files are no reason: rsync leaves such.
    """
    ours = {MANIFEST, SIGNATURE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, MASKED_UPDATE, SEALED_SHARES, SEALED_REVEAL, CAPTURE}
    ours |= {KNOWLEDGE, VOCABULARY, CUTS, SERVER_STATE, SPARSE_UPDATE, ENCRYPTED, OPENED, RESIDUAL}
    for path in sorted(folder.iterdir()):
        is_ours = path.name in ours or is_inbox(path.name)
        is_ours |= path.name.startswith(".") and path.name != SECRETS_MARKER
        if not is_ours or (path.is_dir() and not path.is_symlink()):
            message = f"{path.name} does not belong in {folder.name}, which is not replaced as long as it is there"
            raise Damaged(message, where=path, mend="move it out, and give the same command again")


def is_earlier(folder: Path, attempt: int) -> bool:
    """Whether a folder was made for an earlier attempt at its round."""
    return folder.is_dir() and (folder / MANIFEST).exists() and read_manifest(folder)[0].attempt < attempt


def already_made(
    folder: Path,
    parents: dict[str, str],
    *,
    by: Party,
    overwrite: bool,
    log: Path | None = None,
    data: str = "",
    rows: str = "the training data",
    opening: Opening | None = None,
) -> Manifest | None:
    """The manifest of a folder that was made from exactly these parents under this agreement, or None: make it.

    by: who makes it.
    data: the sha256 of the rows, compared with that in the log; exchanged files do not tell it. rows: what they are.
    opening: what a broadcast must say of clients and keys.
    Raises Refused if the folder was made from something else, Damaged if it is broken; overwrite makes either None.
    """
    if overwrite or not os.path.lexists(folder):
        return None
    manifest, _ = read_manifest(folder)
    workspace, members = by.workspace, by.members
    changed = sorted(
        name for name in manifest.parents.keys() | parents.keys() if manifest.parents.get(name) != parents.get(name)
    )
    if manifest.agreement_sha256 != workspace.agreed_in(manifest.round):
        changed.append(AGREEMENT)
    if members and manifest.federation_sha256 != members.sha256:
        changed.append("the roster")
    if opening and manifest.opening != opening:
        changed.append("the clients, or the keys, that the round is opened for")
    if log is not None:
        logged = reading.logged_inputs(log).get("data")
        if logged is None:
            return None  # stopped between publishing and logging: what it was trained on is not known
        if logged != data:
            changed.append(rows)
    if changed:
        message = f"{workspace.shown(folder)} was made from other inputs; changed since: {', '.join(changed)}"
        mend = "give the command again with --overwrite to replace it"
        if manifest.agreement_sha256 != workspace.agreed_in(manifest.round):
            edited = edits.since(workspace, manifest.agreement_sha256)
            message, mend = message + (f": {edited}" if edited else ""), EDITED
        raise Refused(message, where=folder, mend=mend)

    def check(found: Artefact) -> None:
        if members:
            check_signed(found, members, by.name)
        check_sizes(found, workspace)

    return read_artefact(folder, before=check).manifest
