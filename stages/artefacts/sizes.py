"""How large a file of an artefact can be, by the agreement and the base model, before it is read."""

from __future__ import annotations

from stages.artefacts import tensor_files
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import Artefact, carries_residual, is_inbox
from stages.artefacts.residual_sizes import is_agreed, most_rank
from stages.files import reading
from stages.parties.encryption_keys import DEGREE, PRIME_BITS, SLOTS
from stages.runtime.errors import Damaged
from stages.workspace.names import (
    ADAPTER_WEIGHTS,
    CAPTURE,
    CUTS,
    ENCRYPTED,
    KNOWLEDGE,
    MANIFEST,
    MASKED_UPDATE,
    OPENED,
    RESIDUAL,
    SEALED_SHARES,
    SERVER_STATE,
    SPARSE_UPDATE,
    VOCABULARY,
)
from stages.workspace.paths import Workspace

SHARE_BYTES = 33
"""What a Shamir share has: a number below 2^257 and a little."""

MOMENTS = 2
"""Numbers that the server's optimiser remembers for each of the adapter's, at most."""

MOST_TOKENS, MOST_TOKENS_BYTES = 1 << 19, 1 << 26
"""Of a vocabulary: `align` compares each token with each. The 262,144 tokens of Gemma 3 have 2 MB together."""
LARGEST_VOCABULARY_BYTES = 4096 + 5 * MOST_TOKENS + MOST_TOKENS_BYTES

SEAL_BYTES = 64
"""More than the salt and the tag of a sealed row have."""

CIPHERTEXT_BYTES = 2 * 8 * DEGREE * (len(PRIME_BITS) - 1) + 1024
"""The most that a ciphertext has, whose words SEAL writes packed: two polynomials modulo each prime, and a head."""


def ciphertexts_of(numbers: int) -> int:
    """How many ciphertexts hold so many numbers and a weight; the first place of each is taken by a count."""
    return -(-(numbers + 1) // (SLOTS - 1))


def encrypted_bytes(numbers: int) -> int:
    """The most that these ciphertexts have, with their lengths; what is sent has 0.3 % less."""
    return ciphertexts_of(numbers) * (CIPHERTEXT_BYTES + 4)


def check_sizes(artefact: Artefact, workspace: Workspace) -> None:
    """Raise Damaged for a manifest that names a larger file than its folder can have, or no residual if one is agreed.

    By the numbers of the adapter, the clients of the agreement, and where the base model is here, by that.
    """
    manifest = artefact.manifest
    needs_residual = carries_residual(manifest) and is_agreed(workspace.agreement)
    if (RESIDUAL in manifest.files) != needs_residual:
        message = f"its manifest names {'no' if needs_residual else 'a'} {RESIDUAL}, which is not as agreed"
        raise Damaged(message, where=artefact.path / MANIFEST, mend=reading.COPY_AGAIN)
    for name, entry in manifest.files.items():
        most = _most_bytes(manifest, name, workspace, entry.size_bytes)
        if entry.size_bytes > most:
            message = f"its manifest says that {name} has {entry.size_bytes} bytes, here it can have {most} at most"
            raise Damaged(message, where=artefact.path / MANIFEST, mend=reading.COPY_AGAIN)


def _most_bytes(manifest: Manifest, name: str, workspace: Workspace, size_bytes: int) -> int:
    if name in (CAPTURE, KNOWLEDGE, CUTS):
        return reading.LARGEST_ADAPTER_BYTES
    if name == VOCABULARY:
        return LARGEST_VOCABULARY_BYTES
    if name == SEALED_SHARES or is_inbox(name):
        clients = len(workspace.clients)
        return tensor_files.largest_bytes(clients * (SEAL_BYTES + SHARE_BYTES * clients))
    if name == SPARSE_UPDATE:
        return min(tensor_files.largest_bytes(2 * manifest.parameters), reading.LARGEST_ADAPTER_BYTES)
    if name not in (ADAPTER_WEIGHTS, MASKED_UPDATE, SERVER_STATE, RESIDUAL, ENCRYPTED, OPENED):
        return reading.LARGEST_JSON_BYTES
    numbers = manifest.parameters
    if size_bytes > reading.READ_AT_ONCE_BYTES and (known := tensor_files.most_numbers(workspace, manifest.role)):
        numbers = min(numbers, known)
    each = MOMENTS if name == SERVER_STATE else 1
    if name == RESIDUAL:  # as an adapter of another rank
        each = -(-most_rank(manifest, workspace.agreement) // workspace.agreement.slm.lora.r)
    words = encrypted_bytes(numbers) // 4 if name == ENCRYPTED else each * numbers + 3
    return min(tensor_files.largest_bytes(words), reading.LARGEST_ADAPTER_BYTES)
