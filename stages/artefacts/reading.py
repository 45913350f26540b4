"""Reading a folder with a manifest: its names, its digests, its signature, before its bulk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from stages.artefacts import tensor_files
from stages.artefacts.manifest import FORMAT, Manifest
from stages.files import reading
from stages.runtime.errors import Damaged, NotReady, Problem
from stages.workspace.names import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    CAPTURE,
    CUTS,
    ENCRYPTED,
    KNOWLEDGE,
    MANIFEST,
    MASKED_UPDATE,
    OPENED,
    RESIDUAL,
    SEALED_INBOX,
    SEALED_REVEAL,
    SEALED_SHARES,
    SERVER_STATE,
    SIGNATURE,
    SPARSE_UPDATE,
    VOCABULARY,
)

LEVELS = 3
"""exchange/round-0005/client-2/ and a file: none of the last three parts may be a symbolic link."""


@dataclass(frozen=True)
class Artefact:
    """A folder as read: its manifest, the manifest's own bytes and their digest, and the bytes of its files."""

    path: Path
    manifest: Manifest
    signed: bytes
    sha256: str
    contents: dict[str, bytes]


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a folder and the sha256 of its bytes; the other files are not read."""
    manifest, content = manifest_as_read(folder)
    return manifest, reading.sha256(content)


def manifest_as_read(folder: Path) -> tuple[Manifest, bytes]:
    """The manifest of a folder and its bytes. Raises NotReady if it has not arrived, Damaged for anything else."""
    path = folder / MANIFEST
    try:
        value, content = reading.read_json(path, levels=LEVELS)
    except (Problem, OSError):
        _check_there(folder)
        raise
    try:
        return Manifest.model_validate(value), content
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = f"not a {FORMAT} manifest: {key}: {first['msg']}"
        raise Damaged(message, where=path, mend=reading.COPY_AGAIN) from error


def _check_there(folder: Path) -> None:
    """Raise what is wrong with a folder whose manifest cannot be read, if it is the folder itself."""
    path = folder / MANIFEST
    if folder.is_symlink():
        message = f"{folder.name} is a symbolic link; exchanged folders are never followed"
        raise Damaged(message, where=folder, mend="put the folder itself there, or make it again with --overwrite")
    if folder.exists() and not folder.is_dir():
        raise Damaged(f"{folder.name} is not a folder", where=folder, mend=reading.COPY_AGAIN)
    if folder.is_dir() and not path.exists() and not path.is_symlink():
        mend = "wait until the whole folder is copied; or make it again with --overwrite"
        raise NotReady(f"{folder.name} has no {MANIFEST} yet", where=folder, mend=mend)


class Manifests:
    """Manifests as read_manifest has them, each read once: for one command that looks and makes nothing."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[Manifest, str]] = {}

    def of(self, folder: Path) -> tuple[Manifest, str]:
        """That of a folder. Raises as read_manifest does, each time anew."""
        if folder not in self._read:
            self._read[folder] = read_manifest(folder)
        return self._read[folder]


def read_artefact(
    folder: Path,
    *,
    only: Iterable[str] | None = None,
    limit_bytes: int = reading.LARGEST_ADAPTER_BYTES,
    before: Callable[[Artefact], None] | None = None,
) -> Artefact:
    """A folder with every byte checked against its manifest.

    only: the files to read; those left out need not be there. limit_bytes: of each; a larger one is not read at all.
    before: raises for a manifest, signature included, whose files are not worth reading; it gets none of them.
    Raises NotReady if it, or a part of it, has not arrived; Damaged if a file is superfluous or changed.
    """
    manifest, signed = manifest_as_read(folder)
    wanted = manifest.files if only is None else {name: manifest.files[name] for name in only if name in manifest.files}
    check_names(folder, manifest, wanted)
    if before:
        before(Artefact(folder, manifest, signed, reading.sha256(signed), {}))
    contents = {name: read_file(folder, manifest, name, limit_bytes=limit_bytes) for name in wanted}
    return Artefact(folder, manifest, signed, reading.sha256(signed), contents)


def read_file(folder: Path, manifest: Manifest, name: str, *, limit_bytes: int) -> bytes:
    """One file of a folder, every byte of it checked against the manifest. Raises as read_artefact does."""
    path, entry, mend = folder / name, manifest.files[name], reading.FOLDER_AGAIN
    look = tensor_files.check_head if path.suffix == ".safetensors" else None
    content = reading.read(path, limit_bytes=limit_bytes, levels=LEVELS, named_bytes=entry.size_bytes, look=look)
    if len(content) < entry.size_bytes:
        message = f"{name} has {len(content)} bytes of {entry.size_bytes}: still arriving, or cut short"
        raise NotReady(message, where=path, mend=f"wait, or {mend}")
    found = reading.sha256(content)
    if found != entry.sha256:
        message = f"{name} is not the file its manifest names: sha256 {found[:16]}..., expected {entry.sha256[:16]}..."
        raise Damaged(message, where=path, mend=mend)
    return content


def expected_names(manifest: Manifest) -> set[str] | None:
    """The files that such a folder has beside its manifest; None where it has one for each who takes part."""
    if manifest.stage in ("client-train", "close") and ENCRYPTED in manifest.files:
        return {ENCRYPTED}
    if manifest.stage == "close":
        return None
    if manifest.stage == "reveal":
        return {OPENED} if OPENED in manifest.files else {SEALED_REVEAL}
    if manifest.stage == "capture":
        return {CAPTURE}
    if manifest.stage == "align":
        return {VOCABULARY, CUTS}
    if manifest.stage == "share-knowledge":
        return {KNOWLEDGE}
    if manifest.stage == "client-train" and manifest.masking:
        return {MASKED_UPDATE, SEALED_SHARES}
    if manifest.stage == "client-train" and SPARSE_UPDATE in manifest.files:
        return {ADAPTER_CONFIG, SPARSE_UPDATE}
    beside = {SERVER_STATE} if manifest.stage == "aggregate" else set()
    beside |= {RESIDUAL} if carries_residual(manifest) else set()
    return {*ADAPTER_FILES} | beside & manifest.files.keys()


def carries_residual(manifest: Manifest) -> bool:
    """Whether such a folder has, where one is agreed, the residual that its adapter stands on: a client's has not."""
    return manifest.stage in ("broadcast", "aggregate") or (manifest.stage, manifest.role) == ("co-distill", "slm")


def inbox(client: int) -> str:
    """The file of close/ that only this client can open: the shares that others sealed to it."""
    return f"client-{client}.safetensors"


def check_names(folder: Path, manifest: Manifest, wanted: Iterable[str] | None = None) -> None:
    """Raise unless the folder holds the wanted files (default: all), and none that the manifest does not name.

    Hidden files are passed over: rsync has such while it copies.
    """
    expected = expected_names(manifest)
    listed = set(manifest.files)
    if listed != (expected if expected is not None else {name for name in listed if is_inbox(name)}):
        message = f"the manifest lists {sorted(listed)}, {_kind(manifest)} has {sorted(expected or {inbox(1)})}"
        raise Damaged(message, where=folder / MANIFEST, mend=reading.COPY_AGAIN)
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
    kinds |= {"align": "a vocabulary", "share-knowledge": "knowledge of public rows"}
    return "a masked update" if manifest.masking else kinds.get(manifest.stage, "an adapter folder")


def is_inbox(name: str) -> bool:
    """Whether a file of close/ is one client's."""
    return re.fullmatch(SEALED_INBOX, name) is not None
