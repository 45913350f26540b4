"""What an audit looks at: adapter folders, wherever they lie, and the workspaces around them.

A folder is read once and strictly; what cannot be read is kept as the reason why. Nothing here raises for a file that
is damaged, and nothing but plain files is ever opened.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from stages.artefacts import tensor_files
from stages.artefacts.lineage import check_signed, place_of
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Artefact, manifest_as_read
from stages.artefacts.sizes import check_sizes
from stages.files import reading
from stages.parties.party import Onlooker
from stages.parties.roster import Roster
from stages.runtime.errors import Damaged, Problem, UsageProblem
from stages.workspace.agreement import Agreement
from stages.workspace.commands import Command
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MANIFEST, SEALED_REVEAL
from stages.workspace.paths import Workspace

ROUND = re.compile(r"round-[0-9]{4}")
PARTY = re.compile(
    r"(client|reveal|vocabulary-client|adapter-client)-[1-9][0-9]{0,8}|(vocabulary-)?server"
    r"|broadcast|close|aggregate|captured-(slm|llm)|slm|llm|trained"
)
BY_CLIENT = re.compile(r"(?:client|reveal|vocabulary-client|adapter-client)-([1-9][0-9]{0,8})(?:\.json|\.json\.sig)?")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
BUNDLE = ".fedcollm"
FOLDER = "a folder"
READ = (".json", ".safetensors", ".sig", SEALED_REVEAL)


@dataclass(frozen=True)
class Scope:
    """One path that the audit was given, or the workspace: what lies there, and how it is called."""

    path: Path
    shown_from: Path
    workspace: Workspace | None

    def shown(self, path: Path) -> str:
        """A path as people see it: from the workspace down, or from where the audit was called."""
        return reading.below(path, self.shown_from) or str(path)

    @property
    def is_workspace(self) -> bool:
        """Whether the whole workspace is looked at."""
        return self.workspace is not None and self.path == self.workspace.root

    @functools.cached_property
    def agreement(self) -> Agreement | None:
        """The workspace's; None where there is none, or it cannot be read."""
        try:
            return self.workspace.agreement if self.workspace else None
        except (Problem, OSError):
            return None

    @functools.cached_property
    def members(self) -> Roster | None:
        """The roster in the exchange, signed by the server it names; None where there is none, or no sound one."""
        try:
            return Onlooker(self.workspace).members if self.workspace else None
        except (Problem, OSError):
            return None

    @property
    def sends_no_adapter(self) -> bool:
        """Whether what travels are vocabularies and knowledge of public rows, and no client's adapter."""
        agreement = self.agreement
        return agreement is not None and agreement.federation.learns_in_public and not agreement.averages

    @property
    def exchanged(self) -> Path:
        """What travels, or is meant to: everything that the audit was pointed at; of a workspace, exchange/."""
        return self.workspace.exchange if self.workspace and self.is_workspace else self.path

    def concerns(self, path: Path, client: int | None) -> bool:
        """Whether this client made the file or folder, or is to read it. Without a client everything does."""
        if client is None:
            return True
        here = path.relative_to(self.path)
        by = [found for part in (self.path.name, *here.parts) if (found := BY_CLIENT.fullmatch(part))]
        servers = self.workspace.auxiliary_data.parent if self.workspace else None
        is_the_servers = servers is not None and path.is_relative_to(servers)
        return int(by[-1][1]) == client if by else not is_the_servers


@dataclass(frozen=True)
class Folder:
    """One adapter folder as it lies there.

    contents: the bytes of its plain files that are read at all; unreadable: why the others are not.
    manifest: None where there is none, or it is not ours; problem says why.
    """

    path: Path
    scope: Scope
    names: list[str] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None
    sha256: str = ""
    problem: str = ""
    weights_sha256: str = ""

    @property
    def said(self) -> Manifest:
        """The manifest, of a folder that is known to have one."""
        assert self.manifest is not None
        return self.manifest

    @functools.cached_property
    def shown(self) -> str:
        """Its path as people see it."""
        return self.scope.shown(self.path)

    def file(self, name: str) -> str:
        """One of its files, as people see it."""
        return f"{self.shown}/{name}"

    @property
    def is_ours(self) -> bool:
        """Whether it has, or should have, a manifest: anything in a round of a workspace does."""
        return MANIFEST in self.names or self.place is not None

    @functools.cached_property
    def place(self) -> str | None:
        """Such as round-0005/client-2, if it lies in a round."""
        here = self.path.parent.name
        return f"{here}/{self.path.name}" if ROUND.fullmatch(here) and PARTY.fullmatch(self.path.name) else None

    @functools.cached_property
    def claims_to_be(self) -> str:
        """Where its manifest says that it belongs."""
        return place_of(self.said, self.scope.workspace if self.scope.agreement else None)

    @property
    def owner(self) -> int | None:
        """The client whose own model it is of; None: of one that all have.

        Outside of a workspace, what a client tells is taken to be of its own, unless the adapter is to be averaged.
        """
        number, agreement = self.said.client, self.scope.agreement
        if agreement is None:
            is_own = self.said.stage in ("align", "share-knowledge", "client-distill")
            return number if is_own and "broadcast" not in self.said.parents else None
        own = agreement.clients.get(str(number))
        return number if own and (own.slm or own.rank) else None

    @property
    def is_adapter(self) -> bool:
        """Whether it is one that can be read, and not masked values or a closing list."""
        return ADAPTER_WEIGHTS in self.names or ADAPTER_CONFIG in self.names

    def closed(self) -> Folder:
        """Without the bytes, but for the manifest's."""
        return replace(self, contents={name: self.contents[name] for name in self.contents if name == MANIFEST})


def scope_of(path: Path) -> Scope:
    """What a path means. Raises UsageProblem for one that is not there, and for a file."""
    if not path.exists():
        raise UsageProblem("there is no such folder", where=path, mend="name a folder, or a whole workspace")
    if path.suffix == BUNDLE and path.is_file():
        raise UsageProblem(f"{path.name} is a bundle", where=path, mend=f"unpack it first: {Command('unpack', path)}")
    if not path.is_dir():
        raise UsageProblem(f"{path.name} is not a folder", where=path, mend=Command("audit", path.parent))
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  # not resolved: a link that people name may be followed
    try:
        workspace = Workspace.find(absolute)
    except UsageProblem:
        return Scope(absolute, Path.cwd(), None)
    return Scope(absolute, workspace.root, workspace)


def folders_in(scope: Scope) -> list[Path]:
    """Every adapter folder, in the order of the rounds; of a workspace those of exchange/ and private/."""
    tops = [scope.path]
    if scope.is_workspace and scope.workspace:
        tops = [scope.workspace.exchange, scope.workspace.private]
    found = {folder for top in tops for folder in _adapter_folders(top)}
    return sorted(found, key=lambda path: (_round(path), path.name != "broadcast", _counted(str(path))))


def _adapter_folders(top: Path) -> Iterator[Path]:
    for folder, names, inside in os.walk(top):
        here = Path(folder)
        marks = {MANIFEST, ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin"}
        linked = [name for name in names if os.path.islink(f"{folder}/{name}")]  # noqa: PTH114  # quick
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in linked)
        if marks & set(inside) or (ROUND.fullmatch(here.parent.name) and PARTY.fullmatch(here.name)):
            names.clear()
            yield here


def open_folder(path: Path, scope: Scope) -> Folder:
    """Read a folder once: JSON, safetensors and signatures; anything else is listed and never opened.

    The manifest and the signature come first: a large file that they do not vouch for is not read.
    """
    folder = Folder(path, scope)
    try:
        folder.names.extend(sorted(os.listdir(path)))  # noqa: PTH208  # names alone
    except OSError as problem:
        folder.unreadable["."] = said_by(problem)
    try:
        manifest, folder.contents[MANIFEST] = manifest_as_read(path)
        folder = replace(folder, manifest=manifest, sha256=reading.sha256(folder.contents[MANIFEST]))
    except (Problem, OSError) as problem:
        folder = replace(folder, problem=said_by(problem))
    for name in sorted(folder.names, key=lambda name: not _is_small(name)):
        if name.endswith(READ) and name not in folder.contents:
            try:
                folder.contents[name] = _read(folder, name)
            except (Problem, OSError) as problem:
                folder.unreadable[name] = said_by(problem)
    weights = folder.contents.get(ADAPTER_WEIGHTS)
    digest = reading.sha256(weights) if weights is not None else ""
    return replace(folder, contents=dict(sorted(folder.contents.items())), weights_sha256=digest)


def _is_small(name: str) -> bool:
    return name.endswith((".json", ".sig"))


def _read(folder: Folder, name: str) -> bytes:
    """One file, as large as it may be. Raises Damaged for a large one that is unsigned, or larger than it can be."""
    path = folder.path / name
    if _is_small(name):
        return reading.read(path, limit_bytes=reading.LARGEST_JSON_BYTES)
    if not path.is_symlink() and path.stat().st_size > reading.READ_AT_ONCE_BYTES:
        _check_vouched_for(folder, name)
    return reading.read(path, limit_bytes=reading.LARGEST_ADAPTER_BYTES, look=tensor_files.check_head)


def _check_vouched_for(folder: Folder, name: str) -> None:
    """Raise unless a folder's manifest names a file, is signed where there is a roster, and names no impossible size.

    A folder without a manifest is not ours; its files are judged by their heads.
    """
    manifest, content, workspace = folder.manifest, folder.contents.get(MANIFEST), folder.scope.workspace
    if not folder.is_ours or (manifest is None and workspace is None):
        return
    size_bytes, unread = (folder.path / name).stat().st_size, "and is not read"
    if manifest is None or content is None or name not in manifest.files:
        raise Damaged(f"has {size_bytes} bytes that no manifest names, {unread}")
    if size_bytes != manifest.files[name].size_bytes:
        raise Damaged(f"has {size_bytes} bytes, its manifest says {manifest.files[name].size_bytes}; {unread}")
    found = Artefact(folder.path, manifest, content, folder.sha256, {})
    if folder.scope.members:
        try:
            check_signed(found, folder.scope.members, manifest.party)
        except Problem as problem:
            raise Damaged(f"has {size_bytes} bytes, {unread}: {problem.message}") from problem
    if workspace and folder.scope.agreement:
        check_sizes(found, workspace.of_client(manifest.client) if manifest.client else workspace)


def said_by(problem: Problem | OSError) -> str:
    """What went wrong, without where: a finding says that itself."""
    return problem.message if isinstance(problem, Problem) else str(problem.strerror)


def every_file(top: Path) -> Iterator[str]:
    """All that lies under a folder and is no folder, links and pipes too; no link is followed. Text, which is quick."""
    left = [str(top)]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                found = sorted((entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError:  # A2 says so of an adapter's folder
            continue
        yield from (path for path, is_folder in found if not is_folder)
        left += [path for path, is_folder in reversed(found) if is_folder]


def kind_of(status: os.stat_result) -> str:
    """What it is, if it is no plain file; empty for one."""
    kinds = {FOLDER: stat.S_ISDIR, "a symbolic link": stat.S_ISLNK, "a named pipe": stat.S_ISFIFO}
    named = [name for name, is_kind in kinds.items() if is_kind(status.st_mode)]
    return "" if stat.S_ISREG(status.st_mode) else (named or ["a device or a socket"])[0]


def _round(path: Path) -> str:
    return next((part for part in reversed(path.parts) if ROUND.fullmatch(part)), "")


def _counted(name: str) -> list[str | int]:
    """A key that puts client-2 before client-10."""
    return [int(word) if word.isdecimal() else word for word in re.split(r"([0-9]{1,9})", name)]
