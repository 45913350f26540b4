"""The names of files that the product reads and writes, each spelled here alone."""

from __future__ import annotations

AGREEMENT = "fedcollm.toml"
MACHINE = "machine.toml"
MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MASKED_UPDATE = "masked.safetensors"
SEALED_SHARES = "shares.safetensors"
SEALED_REVEAL = "reveal.bin"
CAPTURE = "capture.safetensors"
SEALED_INBOX = r"client-([1-9][0-9]{0,8})\.safetensors"
SECRETS_MARKER = ".fedcollm-secrets"
"""Lies in every folder of keys; whatever carries files away stops where it meets one."""
MODEL_CARD = "README.md"
EXPORT = "export.json"
