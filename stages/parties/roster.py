"""Who takes part: the clients' public keys, and the roster that every party pins after reading its fingerprint aloud.

A roster is bound to one agreement. Whoever has pinned one takes nothing that is not signed by the key it names.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from stages.files import reading
from stages.parties.names import SERVER, client, keys_made_by
from stages.parties.roster_files import Federation, PublicKeys, read_keys
from stages.runtime.errors import Damaged, Refused
from stages.workspace.paths import Workspace

FINGERPRINT_LETTERS = 40
"""200 bits in base32, so that nobody finds two rosters of one fingerprint in fewer than some 2^100 trials."""


@dataclass(frozen=True)
class Roster:
    """A roster that a party has pinned, and the digest of its bytes."""

    federation: Federation
    sha256: str

    def key_of(self, party: str) -> bytes:
        """The public key that a party signs with. Raises Refused for one that the roster does not have."""
        if party == SERVER:
            return bytes.fromhex(self.federation.server.ed25519)
        for member in self.federation.clients:
            if client(member.client) == party:
                return bytes.fromhex(member.ed25519)
        raise Refused(f"{party} is not in this federation's roster", mend="the server's `enroll` makes a roster")

    @property
    def server_box(self) -> bytes:
        """The public key that reveals are sealed to."""
        return bytes.fromhex(self.federation.server.x25519)

    @property
    def clients(self) -> list[int]:
        """Every client, ascending."""
        return [member.client for member in self.federation.clients]

    def prekeys(self, workspace: Workspace, number: int) -> list[str]:
        """A client's one-time public keys. Raises as keys_of does."""
        return self.keys_of(workspace, number).prekeys

    def keys_of(self, workspace: Workspace, number: int) -> PublicKeys:
        """A client's public keys, from the very file that the roster names. Raises Damaged for another."""
        path = workspace.public_keys(number)
        found, content = read_keys(path)
        expected = next(member.keys_sha256 for member in self.federation.clients if member.client == number)
        if reading.sha256(content) != expected:
            message = f"{path.name} is not the file that the roster names, whose sha256 is {expected[:16]}..."
            raise Damaged(message, where=path, mend="copy exchange/keys again from the server")
        return found


def fingerprint(roster: bytes) -> str:
    """The first 200 bits of the roster's sha256 in base32, in groups of four, to be read over the phone."""
    return spoken(reading.sha256(roster), FINGERPRINT_LETTERS)


def spoken(digest: str, letters: int) -> str:
    """The first letters of a hexadecimal digest in base32, in groups of four."""
    text = base64.b32encode(bytes.fromhex(digest)).decode()[:letters]
    return "-".join(text[start : start + 4] for start in range(0, letters, 4))


def is_fingerprint(typed: str, roster: bytes) -> bool:
    """Whether what a person typed is the roster's fingerprint: case, dashes and blanks do not matter."""
    return is_spoken(typed, fingerprint(roster))


def is_spoken(typed: str, fingerprint: str) -> bool:
    """The same of any fingerprint that was read out."""
    return re.sub(r"[\s-]", "", typed).upper() == fingerprint.replace("-", "")


def slots(workspace: Workspace) -> int:
    """How many times rounds can be opened with a client's keys: each round twice, and a few more."""
    return 2 * workspace.agreement.federation.rounds + 8


def check_prekeys(workspace: Workspace, keys: PublicKeys, path: Path) -> None:
    """Raise Damaged unless a client gave one key for each slot, no two alike, and a secret can be agreed on with each.

    With one of low order (RFC 7748, 6.1) nobody could mask: this client would stop every round.
    """
    mend = f"there: {keys_made_by(client(keys.client), renew=True)}; then carry exchange/keys here"
    if not len(keys.prekeys) == len(set(keys.prekeys)) == slots(workspace):
        message = f"client {keys.client} gives {len(set(keys.prekeys))} one-time keys, not {slots(workspace)}"
        raise Damaged(message, where=path, mend=mend)
    throwaway = X25519PrivateKey.generate()
    for slot, key in enumerate(keys.prekeys):
        try:
            throwaway.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(key)))
        except ValueError as error:
            message = f"the one-time key {slot} of client {keys.client} is no X25519 key to agree on a secret with"
            raise Damaged(message, where=path, mend=mend) from error


def public_of(secret: X25519PrivateKey) -> str:
    """A public key as it stands in our files."""
    return secret.public_key().public_bytes_raw().hex()
