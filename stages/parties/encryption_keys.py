"""The key pair of encrypted aggregation, CKKS by TenSEAL: anybody encrypts and adds, one client's secret half opens.

The public half stands in that client's public keys, which the roster names; the secret half lies in its vault. Both
are TenSEAL's contexts, in hexadecimal. TenSEAL is loaded where one is used, and not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.files import reading
from stages.parties.one_time_keys import derive
from stages.parties.roster_files import PublicKeys
from stages.parties.vault import Vault
from stages.runtime.errors import Damaged, UsageProblem
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.parties.roster import Roster

DEGREE = 8192
PRIME_BITS = (60, 60, 60)
"""The ring's degree, and the primes of its modulus; the last one serves in encrypting alone, ciphertexts have the rest.

180 bits in all; 128 bits of security allow 218 at this degree (homomorphicencryption.org's standard, table 1), and SEAL
refuses more.
"""
SLOTS = DEGREE // 2
"""Numbers in a ciphertext."""
MODULUS_BITS = sum(PRIME_BITS[:-1])
SECRET = "ckks"
"""What the secret half is called in a vault."""
INSTALL = "pip install 'fedcollm[he]'"


def tenseal() -> Any:
    """The library. Raises UsageProblem where it is not installed."""
    try:
        import tenseal as library
    except ImportError as error:
        message = 'aggregation.mode = "encrypted" needs TenSEAL, which is not installed'
        raise UsageProblem(message, mend=INSTALL) from error
    return library


def make(vault: Vault) -> str:
    """A new key pair: the secret half is kept in the vault, the public one returned."""
    context = _new()
    vault.keep(SECRET, {"context": _written(context, secret=True)})
    context.make_context_public()
    return _written(context, secret=False)


def public_key(workspace: Workspace, members: Roster) -> Any:
    """What updates are encrypted with and added by, as the roster's keys have it. Raises Damaged for any other."""
    opener = workspace.agreement.aggregation.key_holder
    assert opener is not None, "there is a key where updates are encrypted"
    return _read_public(members.keys_of(workspace, opener).ckks, workspace.public_keys(opener))


def secret_key(vault: Vault) -> Any:
    """What opens a sum. Raises Damaged if the vault's is not as it was written, or there is none."""
    kept = vault.kept(SECRET) or {}
    context = _read(str(kept.get("context", "")))
    if context is None or not context.is_private():
        raise vault.damaged(f"{SECRET}.json")
    return context


def seed_of(vault: Vault, sum_sha256: str) -> bytes:
    """What the noise over one sum comes from: 32 bytes that nobody else knows, the same whenever it is opened."""
    secret = str((vault.kept(SECRET) or {}).get("context", "")).encode()
    return derive(secret, salt=bytes.fromhex(sum_sha256), info=b"fedcollm/encryption/1/told\0")


def check(workspace: Workspace, keys: PublicKeys, path: Path) -> None:
    """Raise Damaged unless the client that opens sums gives a key to encrypt with, and no other client does."""
    if keys.client == workspace.agreement.aggregation.key_holder:
        _read_public(keys.ckks, path)
    elif keys.ckks is not None:
        message = f"client {keys.client} gives a key to encrypt updates with, which is not its to give"
        raise Damaged(message, where=path, mend=reading.COPY_AGAIN)


def _read_public(written: str | None, path: Path) -> Any:
    context = _read(written or "")
    if context is None or not context.has_public_key() or context.has_secret_key():
        found = "holds a secret key" if context and context.has_secret_key() else "has no key of this program's"
        mend = "ask its client for the file that it published; keys --renew there makes other keys"
        raise Damaged(f"{path.name} {found} to encrypt updates with", where=path, mend=mend)
    return context


def _new() -> Any:
    library = tenseal()
    return library.context(
        library.SCHEME_TYPE.CKKS, poly_modulus_degree=DEGREE, coeff_mod_bit_sizes=list(PRIME_BITS), n_threads=1
    )


def _written(context: Any, *, secret: bool) -> str:
    content: bytes = context.serialize(
        save_public_key=True, save_secret_key=secret, save_galois_keys=False, save_relin_keys=False
    )
    return content.hex()


def _read(written: str) -> Any:
    """A context of exactly our parameters; None for anything else. SEAL checks what it loads against its parameters."""
    try:
        context = tenseal().context_from(bytes.fromhex(written), n_threads=1)
        ours = _new()
        same = context.seal_context().data.key_parms_id() == ours.seal_context().data.key_parms_id()
    except (ValueError, RuntimeError, TypeError):
        return None
    return context if same else None
