"""A party's secrets: its identity key, its one-time keys, the roster it has pinned, and what it did in each round.

They lie outside the workspace, so that copying a workspace cannot carry them: in machine.toml's `secrets`, by default
fedcollm/ in the user's data folder, one folder for each workspace and party. Refused where others could read them. Each
is compared with the digest that was written with it: a damaged one is named and never used.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from stages.files import locks, reading, writing
from stages.parties import one_time_keys
from stages.parties.names import keys_made_by
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.runtime.events import Report, ignore
from stages.workspace.names import SECRETS_MARKER
from stages.workspace.paths import Workspace

LARGEST_JUMP = 8
"""How many one-time keys may be passed over at once, so that a server cannot burn them."""

LOCK, PINNED = "lock", "federation.json"
DIGEST = "record_sha256"
MADE, JOINED = "made", "joined"
"""Records: the sha256 of the two keys, which a vault of an earlier version lacks; that of the roster."""
NOT_ENROLLED = "is not the one that it enrolled with: damaged, or of another party"


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
        vault = Vault(workspace.secrets / _named_by(pointer, party) / party, party)
        vault._check(workspace)
        return vault

    @staticmethod
    def make(workspace: Workspace, party: str) -> Vault:
        """A new vault with an identity key, a box key and the first of the one-time keys."""
        name = f"{workspace.agreement.federation.name}-{secrets.token_hex(8)}"
        vault = Vault(workspace.secrets / name / party, party)
        vault._check_outside(workspace)
        pointer, unfinished = workspace.secrets_pointer(party), workspace.secrets_unfinished(party)
        Vault.erase_unfinished(workspace, party)
        writing.write(unfinished, reading.json_bytes({"folder": name}))
        for folder in (vault.root.parent.parent, vault.root.parent, vault.root):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        vault._keep(SECRETS_MARKER, b"Secret keys of fedcollm. Never copy this folder.\n")
        vault._keep(LOCK, b"")
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        made = {
            f"{key}.pem": kind.generate().private_bytes(pem, pkcs8, serialization.NoEncryption())
            for key, kind in (("identity", Ed25519PrivateKey), ("box", X25519PrivateKey))
        }
        for file, content in made.items():
            vault._keep(file, content)
        vault.keep(MADE, {file: reading.sha256(content) for file, content in made.items()})
        vault.keep("ratchet", {"slot": 0, "seed": secrets.token_hex(32)})
        writing.write(pointer, reading.json_bytes({"folder": name}))
        unfinished.unlink()
        return vault

    @staticmethod
    def erase_unfinished(workspace: Workspace, party: str) -> None:
        """Erase the secrets of a vault whose making was killed: no pointer names it, so that it is never used."""
        pointer, unfinished = workspace.secrets_pointer(party), workspace.secrets_unfinished(party)
        if not unfinished.exists():
            return
        name = _named_by(unfinished, party)
        if not pointer.exists() or _named_by(pointer, party) != name:
            shutil.rmtree(workspace.secrets / name, ignore_errors=True)
        unfinished.unlink()

    @property
    def identity(self) -> Ed25519PrivateKey:
        """What the party signs with."""
        key = self._key("identity")
        if not isinstance(key, Ed25519PrivateKey):
            raise self.damaged("identity.pem")
        return key

    @property
    def box(self) -> X25519PrivateKey:
        """What opens the reveals that are sealed to the server."""
        key = self._key("box")
        if not isinstance(key, X25519PrivateKey):
            raise self.damaged("box.pem")
        return key

    @contextlib.contextmanager
    def alone(self, report: Report = ignore) -> Iterator[None]:
        """Keep a second process away from what the party remembers, or wait for it.

        Raises StorageProblem where the file system has no locks: what is done once must not be done twice.
        """
        lock = self.root / LOCK
        lock.touch(mode=0o600)  # which vaults of an earlier version lack
        without = "set secrets in machine.toml to a folder on a file system with locks, and move the keys there"
        with locks.held(lock, without=without, report=report):
            self._erase_drafts()
            yield

    def _erase_drafts(self) -> None:
        """Erase what a process that was killed left of keys, seeds and shares; nobody else writes these meanwhile."""
        for draft in self.root.glob(".*.partial"):
            draft.unlink(missing_ok=True)

    def prekeys(self, slots: int) -> list[str]:
        """The public one-time keys of the first so many slots, from the first secret on."""
        first, seed = self._ratchet()
        assert first == 0
        found = []
        for _ in range(slots):
            found.append(one_time_keys.prekey(seed).public_key().public_bytes_raw().hex())
            seed = one_time_keys.next_seed(seed)
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
            seed = one_time_keys.next_seed(seed)
        if slot > now:
            self.keep("ratchet", {"slot": slot, "seed": seed.hex()})
        return one_time_keys.prekey(seed)

    def check_own(self, slot: int, public: str) -> None:
        """Raise Damaged unless the one-time key of a slot, where it is not gone yet, is the one that was published."""
        now, seed = self._ratchet()
        for _ in range(slot - now):
            seed = one_time_keys.next_seed(seed)
        if slot >= now and one_time_keys.prekey(seed).public_key().public_bytes_raw().hex() != public:
            raise self.damaged("ratchet.json", NOT_ENROLLED)

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """Remember a JSON value, with the digest of it, on disk when this returns."""
        self._keep(f"{name}.json", reading.json_bytes(value | {DIGEST: reading.sha256(reading.json_bytes(value))}))

    def kept(self, name: str) -> dict[str, Any] | None:
        """A value that was kept, or None. Raises Damaged if it is not as it was written."""
        path = self.root / f"{name}.json"
        if not path.exists():
            return None
        try:
            value, _ = reading.read_json(path)
        except Damaged as problem:
            raise self.damaged(path.name) from problem
        named = value.pop(DIGEST, None)
        is_of_earlier_version = named is None and not (self.root / f"{MADE}.json").exists()
        if not is_of_earlier_version and named != reading.sha256(reading.json_bytes(value)):
            raise self.damaged(path.name)
        return value

    def pin(self, roster: bytes) -> None:
        """Trust this roster, and no other, from now on."""
        self.keep(JOINED, {"roster_sha256": reading.sha256(roster)})
        self._keep(PINNED, roster)

    @property
    def pinned(self) -> bytes | None:
        """The roster that this party trusts, byte for byte. Raises Damaged if it is not the one that was pinned."""
        path = self.root / PINNED
        if not path.exists():
            return None
        content, joined = reading.read(path, limit_bytes=reading.LARGEST_JSON_BYTES), self.kept(JOINED)
        if joined is not None and joined.get("roster_sha256") != reading.sha256(content):
            raise self.damaged(PINNED)
        return content

    def faults(self) -> Iterator[Damaged]:
        """Each secret that is not as it was written, or is gone."""
        names = {path.stem for path in self.root.glob("[!.]*.json") if path.name != PINNED}
        looks: list[Callable[[], object]] = [
            lambda: self.identity,
            lambda: self.box,
            self._ratchet,
            lambda: self.pinned,
        ]
        looks += [functools.partial(self.kept, name) for name in sorted(names - {"ratchet", MADE})]
        for look in looks:
            try:
                look()
            except Damaged as problem:
                yield problem

    def damaged(self, name: str, how: str = "is damaged") -> Damaged:
        """One of the party's secrets cannot be read, or is another."""
        mend = f"put it back from a copy; or, for a new federation: {keys_made_by(self.party, renew=True)}"
        return Damaged(f"the secret {name} of {self.party} {how}", where=self.root / name, mend=mend)

    def _ratchet(self) -> tuple[int, bytes]:
        """The slot of the next one-time key, and the seed that it comes from."""
        try:
            value = self.kept("ratchet") or {}
            return int(value["slot"]), bytes.fromhex(value["seed"])
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged("ratchet.json") from error

    def _keep(self, name: str, content: bytes) -> None:
        writing.write(self.root / name, content, mode=0o600)

    def _key(self, name: str) -> object:
        path = self.root / f"{name}.pem"
        made = self.kept(MADE)
        try:
            content = reading.read(path, limit_bytes=reading.LARGEST_JSON_BYTES)
            if made and made.get(path.name) != reading.sha256(content):
                raise self.damaged(path.name, NOT_ENROLLED)
            return serialization.load_pem_private_key(content, password=None)
        except (NotReady, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise self.damaged(path.name) from error

    def _check(self, workspace: Workspace) -> None:
        if not self.root.is_dir():
            mend = f"put that folder back; or {keys_made_by(self.party, renew=True)}, for a new federation"
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


def _named_by(pointer: Path, party: str) -> str:
    """The name of the folder of keys that a pointer holds."""
    name = str(reading.read_json(pointer)[0].get("folder"))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}-[0-9a-f]{16}", name):
        mend = f"{keys_made_by(party, renew=True)} makes new keys, for a new federation"
        raise Damaged(f"{pointer.name} names no folder of keys", where=pointer, mend=mend)
    return name
