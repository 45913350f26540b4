"""The manifest of an adapter folder: what an auditor asks, and the chain from each file to those it was made from.

A manifest holds nothing that changes from one run to the next on one machine (times go to the private log), so that a
stage repeated gives the same bytes, and nothing that names a person, a host or a path.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.parts import files
from stages.parts.config import Lora, Role
from stages.parts.errors import Damaged, Refused
from stages.parts.workspace import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, Workspace

FORMAT: Literal["fedcollm/1"] = "fedcollm/1"
LIBRARIES = ("fedcollm", "torch", "transformers", "peft", "safetensors", "numpy")

Stage = Literal["broadcast", "client-train", "aggregate", "co-distill"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Part):
    """One file beside the manifest."""

    sha256: Sha256
    size_bytes: Count


class BaseIdentity(_Part):
    """Which base model and tokenizer an adapter belongs to, by content."""

    architecture: str
    weights_sha256: Sha256
    tokenizer_sha256: Sha256


class Manifest(_Part):
    """Everything that is said of one adapter folder."""

    format: Literal["fedcollm/1"] = FORMAT
    federation: str
    agreement_sha256: Sha256
    stage: Stage
    role: Role = "slm"
    round: Annotated[int, Field(ge=1)]
    client: Annotated[int, Field(ge=1)] | None = None
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
    metrics: dict[str, float] = {}
    versions: dict[str, str]


@dataclass(frozen=True)
class Artefact:
    """An adapter folder as read: its manifest, the digest of the manifest's bytes, and the bytes of its files."""

    path: Path
    manifest: Manifest
    sha256: str
    contents: dict[str, bytes]


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of every library that has a part in the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a folder and the sha256 of its bytes; the other files are not read."""
    path = folder / MANIFEST
    if folder.is_symlink():
        message = f"{folder.name} is a symbolic link; exchanged folders are never followed"
        raise Damaged(message, where=folder, mend="put the folder itself there, or make it again with --overwrite")
    if folder.exists() and not folder.is_dir():
        raise Damaged(f"{folder.name} is not a folder", where=folder, mend=files.COPY_AGAIN)
    if folder.is_dir() and not path.exists() and not path.is_symlink():
        mend = "copy the whole folder again, or make it again with --overwrite"
        raise Damaged(f"{folder.name} has no {MANIFEST}", where=folder, mend=mend)
    value, digest = files.read_json(path)
    try:
        return Manifest.model_validate(value), digest
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = f"not a {FORMAT} manifest: {key}: {first['msg']}"
        raise Damaged(message, where=path, mend=files.COPY_AGAIN) from error


def read_artefact(folder: Path) -> Artefact:
    """An adapter folder with every byte checked against its manifest.

    Raises NotReady if it is absent; Damaged if a file is missing, superfluous, cut short or changed.
    """
    manifest, digest = read_manifest(folder)
    check_names(folder, manifest)
    contents = {}
    mend = "copy the folder again from its origin, or make it there again with --overwrite"
    for name, entry in manifest.files.items():
        path = folder / name
        content = files.read(path, limit_bytes=files.LARGEST_ADAPTER_BYTES)
        if len(content) != entry.size_bytes:
            message = f"{name} has {len(content)} bytes, its manifest says {entry.size_bytes}"
            raise Damaged(message, where=path, mend=mend)
        found = files.sha256(content)
        if found != entry.sha256:
            message = (
                f"{name} is not the file its manifest names: sha256 {found[:16]}..., expected {entry.sha256[:16]}..."
            )
            raise Damaged(message, where=path, mend=mend)
        contents[name] = content
    return Artefact(folder, manifest, digest, contents)


def check_names(folder: Path, manifest: Manifest) -> None:
    """Raise Damaged unless the folder holds exactly an adapter's three files."""
    expected = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    if set(manifest.files) != expected:
        message = f"the manifest lists {sorted(manifest.files)}, an adapter has {sorted(expected)}"
        raise Damaged(message, where=folder / MANIFEST, mend=files.COPY_AGAIN)
    found = {path.name for path in folder.iterdir()}
    superfluous, missing = found - expected - {MANIFEST}, expected - found
    if superfluous:
        mend = "remove it: an adapter folder holds safetensors and JSON, nothing else is ever opened"
        raise Damaged(f"{sorted(superfluous)[0]} does not belong in an adapter folder", where=folder, mend=mend)
    if missing:
        raise Damaged(f"{sorted(missing)[0]} is missing", where=folder, mend="copy the whole folder again")


def check_belongs(
    artefact: Artefact, workspace: Workspace, *, stage: str, round: int, client: int | None = None
) -> None:
    """Raise Refused unless the artefact is what its place says, made under this workspace's agreement."""
    manifest = artefact.manifest
    claims = [
        ("federation", manifest.federation, workspace.agreement.federation.name),
        ("stage", manifest.stage, stage),
        ("round", manifest.round, round),
        ("client", manifest.client, client),
        ("LoRA shape", manifest.lora, workspace.agreement.model_of(manifest.role).lora),
        ("agreement (sha256 of fedcollm.toml)", manifest.agreement_sha256, workspace.agreement_sha256),
    ]
    for name, found, expected in claims:
        if found != expected:
            message = (
                f"{workspace.shown(artefact.path)} is of another {name}: {_short(found)}, here it is {_short(expected)}"
            )
            mend = (
                "undo the edit of fedcollm.toml, which is the same for all parties; or make this again, --overwrite"
                if name.startswith(("agreement", "LoRA"))
                else "take it out, and copy what belongs there"
            )
            raise Refused(message, where=artefact.path / MANIFEST, mend=mend)


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
    client: int | None = None,
    seed: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    steps: int = 0,
    examples: int = 0,
    tokens: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """Publish an adapter's files with the manifest that names them, which is written last. Returns the manifest."""
    manifest = Manifest(
        federation=workspace.agreement.federation.name,
        agreement_sha256=workspace.agreement_sha256,
        stage=stage,
        role=role,
        round=round,
        client=client,
        parents=parents,
        files={name: FileEntry(sha256=files.sha256(data), size_bytes=len(data)) for name, data in contents.items()},
        base=base,
        lora=workspace.agreement.model_of(role).lora,
        parameters=parameters,
        seed=seed,
        dtype=dtype,
        steps=steps,
        examples=examples,
        tokens=tokens,
        metrics=dict(metrics or {}),
        versions=dict(versions()),
    )
    files.publish(folder, {**contents, MANIFEST: files.json_bytes(manifest.model_dump())})
    return manifest


def already_made(
    folder: Path,
    workspace: Workspace,
    parents: dict[str, str],
    *,
    overwrite: bool,
    log: Path | None = None,
    data: str = "",
) -> Manifest | None:
    """The manifest of a folder that was made from exactly these parents under this agreement, or None: make it.

    data: the sha256 of the training data, compared with that in the log; exchanged files do not tell it.
    Raises Refused if the folder was made from something else, Damaged if it is broken; overwrite makes either None.
    """
    if overwrite or not os.path.lexists(folder):
        return None
    artefact = read_artefact(folder)
    manifest = artefact.manifest
    changed = sorted(
        name for name in manifest.parents.keys() | parents.keys() if manifest.parents.get(name) != parents.get(name)
    )
    if manifest.agreement_sha256 != workspace.agreement_sha256:
        changed.append("fedcollm.toml")
    if log is not None:
        logged = files.logged_inputs(log).get("data")
        if logged is None:
            return None  # stopped between publishing and logging: what it was trained on is not known
        if logged != data:
            changed.append("the training data")
    if changed:
        message = f"{workspace.shown(folder)} was made from other inputs; changed since: {', '.join(changed)}"
        raise Refused(message, where=folder, mend="give the command again with --overwrite to replace it")
    return manifest
