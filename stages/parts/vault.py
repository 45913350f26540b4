"""A party's secrets: its identity key, its one-time keys, the roster it has pinned, and what it did in each round.

They lie outside the workspace, so that copying a workspace cannot carry them: in machine.toml's `secrets`, by default
fedcollm/ in the user's data folder, one folder for each workspace and party. Refused where others could read them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from stages.parts import files, one_time
from stages.parts.errors import Damaged, NotReady, Refused
from stages.parts.events import Report, ignore
from stages.parts.workspace import SECRETS_MARKER, Workspace

LARGEST_JUMP = 8
"""How many one-time keys may be passed over at once, so that a server cannot burn them."""

LOCK = "lock"
NOT_ENROLLED = "is not the one that it enrolled with: damaged, or of another party"

SERVER: Literal["server"] = "server"


def client(number: int) -> str:
    """How a client is called as a party."""
    return f"client-{number}"


@dataclass(frozen=True)
class Vault:
    """The secrets of one party of one workspace."""

    root: Path
    party: str

    @staticmethod
    def find(workspace: Workspace, party: str) -> Vault | None:
        """The party's vault, if it has one on this machine. Raises Refused if others than the user can read it."""
        pointer = workspace.secrets_pointer(party)
        if not pointer.exists():
            return None
        name = str(files.read_json(pointer)[0].get("folder"))
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}-[0-9a-f]{16}", name):
            mend = f"fedcollm {_maker(party)} --renew makes new keys, for a new federation"
            raise Damaged(f"{pointer.name} names no folder of keys", where=pointer, mend=mend)
        vault = Vault(workspace.secrets / name / party, party)
        vault._check(workspace)
        return vault

    @staticmethod
    def need(workspace: Workspace, party: str) -> Vault:
        """The party's vault. Raises NotReady if there is none on this machine."""
        vault = Vault.find(workspace, party)
        if vault is None:
            mend = f"fedcollm {_maker(party)}"
            raise NotReady(f"{party} has no keys on this machine", where=workspace.secrets_pointer(party), mend=mend)
        return vault

    @staticmethod
    def make(workspace: Workspace, party: str) -> Vault:
        """A new vault with an identity key, a box key and the first of the one-time keys."""
        name = f"{workspace.agreement.federation.name}-{secrets.token_hex(8)}"
        vault = Vault(workspace.secrets / name / party, party)
        vault._check_outside(workspace)
        for folder in (vault.root.parent.parent, vault.root.parent, vault.root):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        vault._keep(SECRETS_MARKER, b"Secret keys of fedcollm. Never copy this folder.\n")
        vault._keep(LOCK, b"")
        for key, kind in (("identity", Ed25519PrivateKey), ("box", X25519PrivateKey)):
            made = kind.generate()
            pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
            vault._keep(f"{key}.pem", made.private_bytes(pem, pkcs8, serialization.NoEncryption()))
        vault.keep("ratchet", {"slot": 0, "seed": secrets.token_hex(32)})
        files.write(workspace.secrets_pointer(party), files.json_bytes({"folder": name}))
        return vault

    @property
    def identity(self) -> Ed25519PrivateKey:
        """What the party signs with."""
        key = self._key("identity")
        assert isinstance(key, Ed25519PrivateKey)
        return key

    @property
    def box(self) -> X25519PrivateKey:
        """What opens the reveals that are sealed to the server."""
        key = self._key("box")
        assert isinstance(key, X25519PrivateKey)
        return key

    @contextlib.contextmanager
    def alone(self, report: Report = ignore) -> Iterator[None]:
        """Keep a second process away from what the party remembers, or wait for it.

        Raises StorageProblem where the file system has no locks: what is done once must not be done twice.
        """
        lock = self.root / LOCK
        lock.touch(mode=0o600)  # which vaults of an earlier version lack
        without = "set secrets in machine.toml to a folder on a file system with locks, and move the keys there"
        with files.held(lock, without=without, report=report):
            self._erase_drafts()
            yield

    def _erase_drafts(self) -> None:
        """Erase what a process that was killed left of seeds and shares; nobody else writes these meanwhile."""
        for draft in self.root.glob(".*.partial"):
            if draft.name.startswith((".ratchet.json.", ".round-")):
                draft.unlink(missing_ok=True)

    def prekeys(self, slots: int) -> list[str]:
        """The public one-time keys of the first so many slots, from the first secret on."""
        first, seed = self._ratchet()
        assert first == 0
        found = []
        for _ in range(slots):
            found.append(one_time.prekey(seed).public_key().public_bytes_raw().hex())
            seed = one_time.next_seed(seed)
        return found

    def check_slot(self, slot: int, *, farthest: int | None = None) -> None:
        """Raise Refused for a one-time key that is gone, and for one so far ahead that it would burn many.

        farthest: the last slot that may be next, where that is later than LARGEST_JUMP from the one it is at.
        """
        now, _ = self._ratchet()
        if not now <= slot <= max(now + LARGEST_JUMP, farthest or 0):
            message = f"this round was opened with key {slot}; {self.party} is at key {now}"
            mend = "an earlier key is erased for good, a far later one would burn those between: ask the server"
            raise Refused(message, where=self.root, mend=mend)

    def advance(self, slot: int, *, farthest: int | None = None) -> X25519PrivateKey:
        """The secret one-time key of a slot; those before it are gone from now on. Raises as check_slot does."""
        self.check_slot(slot, farthest=farthest)
        now, seed = self._ratchet()
        for _ in range(slot - now):
            seed = one_time.next_seed(seed)
        if slot > now:
            self.keep("ratchet", {"slot": slot, "seed": seed.hex()})
        return one_time.prekey(seed)

    def check_own(self, slot: int, public: str) -> None:
        """Raise Damaged unless the one-time key of a slot, where it is not gone yet, is the one that was published."""
        now, seed = self._ratchet()
        for _ in range(slot - now):
            seed = one_time.next_seed(seed)
        if slot >= now and one_time.prekey(seed).public_key().public_bytes_raw().hex() != public:
            raise self.damaged("ratchet.json", NOT_ENROLLED)

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """Remember a JSON value, on disk when this returns."""
        self._keep(f"{name}.json", files.json_bytes(value))

    def kept(self, name: str) -> dict[str, Any] | None:
        """A value that was kept, or None."""
        path = self.root / f"{name}.json"
        try:
            return files.read_json(path)[0] if path.exists() else None
        except Damaged as problem:
            raise self.damaged(path.name) from problem

    def pin(self, roster: bytes) -> None:
        """Trust this roster, and no other, from now on."""
        self._keep("federation.json", roster)

    @property
    def pinned(self) -> bytes | None:
        """The roster that this party trusts, byte for byte."""
        path = self.root / "federation.json"
        return files.read(path, limit_bytes=files.LARGEST_JSON_BYTES) if path.exists() else None

    def damaged(self, name: str, how: str = "is damaged") -> Damaged:
        """One of the party's secrets cannot be read, or is another."""
        mend = f"put it back from a copy; or, for a new federation: fedcollm {_maker(self.party)} --renew"
        return Damaged(f"the secret {name} of {self.party} {how}", where=self.root / name, mend=mend)

    def _ratchet(self) -> tuple[int, bytes]:
        """The slot of the next one-time key, and the seed that it comes from."""
        try:
            value = self.kept("ratchet") or {}
            return int(value["slot"]), bytes.fromhex(value["seed"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged("ratchet.json") from error

    def _keep(self, name: str, content: bytes) -> None:
        files.write(self.root / name, content, mode=0o600)

    def _key(self, name: str) -> object:
        path = self.root / f"{name}.pem"
        try:
            content = files.read(path, limit_bytes=files.LARGEST_JSON_BYTES)
            return serialization.load_pem_private_key(content, password=None)
        except (NotReady, ValueError, TypeError) as error:
            raise self.damaged(path.name) from error

    def _check(self, workspace: Workspace) -> None:
        if not self.root.is_dir():
            mend = f"put that folder back; or fedcollm {_maker(self.party)} --renew, for a new federation"
            raise Refused(f"the keys of {self.party} are gone", where=self.root, mend=mend)
        self._check_outside(workspace)
        for path in (self.root, *self.root.iterdir()):
            if path.name.startswith(".") and path.name.endswith(".partial"):
                continue  # of another process, and gone in a moment
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if status.st_mode & 0o077:
                mend = f"chmod {'700' if path.is_dir() else '600'} {path}"
                message = f"others can read the secret {path.name} (mode {status.st_mode & 0o777:04o})"
                raise Refused(message, where=path, mend=mend)
            if status.st_uid != os.geteuid():
                mend = f"chown {os.geteuid()} {path}"
                raise Refused(f"the secret {path.name} belongs to another user", where=path, mend=mend)

    def _check_outside(self, workspace: Workspace) -> None:
        if any(self.root.resolve().is_relative_to(place.resolve()) for place in (workspace.root, workspace.home)):
            mend = "move it out, and set secrets in machine.toml to its new place"
            raise Refused("secret keys lie in the workspace, which travels", where=self.root, mend=mend)


def _maker(party: str) -> str:
    """The command that makes a party's keys."""
    return "enroll" if party == SERVER else f"keys --client {party.removeprefix('client-')}"
