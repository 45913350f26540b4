"""The names of files that the product reads and writes, each spelled here alone."""

from __future__ import annotations

import re
from pathlib import Path

from stages.files import seclusion

AGREEMENT, EXCHANGE, PRIVATE = seclusion.AGREEMENT, seclusion.EXCHANGE, seclusion.PRIVATE
MACHINE = "machine.toml"
EVALUATION = "evaluation.toml"
"""In the place of [evaluation] of the agreement, where a party scores otherwise."""
INVITE = "invite.json"
"""What an invitation says, in its bundle."""
MANIFEST = "manifest.json"
SIGNATURE = f"{MANIFEST}.sig"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
RESIDUAL = "residual.safetensors"
"""What is added to the frozen weights beneath an adapter, in its folder: only with combine = "residual"."""
THETA_FILES = (*ADAPTER_FILES, RESIDUAL)
MASKED_UPDATE = "masked.safetensors"
SPARSE_UPDATE = "sparse.safetensors"
UNSENT = "unsent.safetensors"
SEALED_SHARES = "shares.safetensors"
SEALED_REVEAL = "reveal.bin"
ENCRYPTED = "encrypted.safetensors"
"""An update of encrypted mode, or the sum of them."""
OPENED = "opened.safetensors"
"""The mean that was in a sum."""
SERVER_STATE = "server_state.safetensors"
"""What the server's optimiser remembers, in the aggregate's folder."""
CAPTURE = "capture.safetensors"
KNOWLEDGE = "knowledge.safetensors"
VOCABULARY = "vocabulary.safetensors"
CUTS = "cuts.safetensors"
ALIGNMENT_REPORT = "report.json"
SECRETS_MARKER = ".fedcollm-secrets"
"""Lies in every folder of keys; whatever carries files away stops where it meets one."""
MODEL_CARD = "README.md"
EXPORT = "export.json"
SHEARING = "shearing.json"
ZERO_SHOT = "zero-shot"
CLIENT = r"client-([1-9][0-9]{0,8})"
"""A client's name, whose number is its group."""
SEALED_INBOX = rf"{CLIENT}\.safetensors"


def round_name(round: int) -> str:
    """How a round is called: round-0005."""
    return f"round-{round:04d}"


def round_of(name: str) -> int | None:
    """The round that is called so, if any is."""
    found = re.fullmatch(r"round-([0-9]+)", name)
    return int(found[1]) if found else None


def signature_beside(path: Path) -> Path:
    """The signature of a file."""
    return path.with_name(f"{path.name}.sig")
