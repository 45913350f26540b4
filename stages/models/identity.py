"""The fingerprint of a base model: its weights and its tokenizer, by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stages.artefacts.manifest import BaseIdentity
from stages.bases import base_files
from stages.bases.base_names import NO_SHAPE
from stages.models.base_loading import (
    PROBE,
    not_finite,
    read_configuration,
    read_generation,
)
from stages.runtime.errors import Damaged
from stages.workspace.settings import Quantization

PROBE_TEXTS = (
    PROBE,
    "  two  spaces,\ttab; 3.14159 and 2,718",
    "naïve café — “quotes”, 数学, Ελληνικά, 🙂",
)
"""What a tokenizer must encode alike to count as the same one: its vocabulary alone does not show its merges."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

VARYING = {
    *NO_SHAPE,
    "_attn_implementation",
    "_commit_hash",
    "_from_model_config",
    "attn_implementation",
    "cache_config",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
}
"""Settings that may differ between copies of one model: names, precisions, versions, ways to the same numbers."""


def identify(folder: Path, tokenizer: Any, quantization: Quantization | None = None) -> BaseIdentity:
    """A base model's identity by content: every tensor's name, type, shape and bytes, whatever files they lie in.

    quantization: how it is held once it is loaded.
    """
    architecture = str(json.loads((folder / "config.json").read_text()).get("model_type", "unknown"))
    return BaseIdentity(
        architecture=architecture,
        weights_sha256=_weights_sha256(folder, looks_for_nan=quantization is not None),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        settings_sha256=_settings_sha256(folder, tokenizer),
        quantization=quantization,
    )


def tokenizer_sha256(tokenizer: Any) -> str:
    """A tokenizer's identity by content: its vocabulary in order, and how it splits the probe texts."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    encodings = [tokenizer.encode(text) for text in PROBE_TEXTS]
    return hashlib.sha256(json.dumps([vocabulary, encodings]).encode()).hexdigest()


def _settings_sha256(folder: Path, tokenizer: Any) -> str:
    """Of what else decides a model's numbers and texts: its configuration, how it generates, its special tokens."""
    configuration, generation = read_configuration(folder, "the base"), read_generation(folder, "the base")
    special = {name: str(getattr(tokenizer, name)) for name in SPECIAL_TOKENS if getattr(tokenizer, name) is not None}
    told = [_told(one) for one in (configuration, generation)]
    return hashlib.sha256(json.dumps([*told, special], sort_keys=True, default=str).encode()).hexdigest()


def _told(settings: Any) -> dict[str, Any]:
    """What differs from the defaults of its class, to which later versions of transformers add."""
    try:
        plain: dict[str, Any] = type(settings)().to_dict()
    except Exception:  # the classes of each architecture raise what they like; some have no defaults
        plain = {}
    told: dict[str, Any] = settings.to_diff_dict()
    changed = {key: value for key, value in told.items() if key not in plain or plain[key] != value}
    return dict(_without_varying(changed))


def _without_varying(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {str(key): _without_varying(value) for key, value in settings.items() if key not in VARYING}
    return settings


def _weights_sha256(folder: Path, *, looks_for_nan: bool) -> str:
    """Of the files that are loaded, whatever else lies beside them. Raises Damaged if one cannot be read.

    looks_for_nan: raise it for NaN and infinity too, which few bits would hide.
    """
    lines = []
    for path in base_files.weight_files(folder):
        if path.suffix != ".safetensors":  # an old checkpoint: pickled weights of a base model, by file
            with path.open("rb") as binary:
                lines.append(f"{path.name} {hashlib.file_digest(binary, 'sha256').hexdigest()}\n")
            continue
        try:
            lines += _tensor_lines(path, looks_for_nan)
        except SafetensorError as error:
            message = f"{path.name} is cut short or damaged: {error}"
            raise Damaged(message, where=path, mend=base_files.FETCH_AGAIN) from error
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _tensor_lines(path: Path, looks_for_nan: bool) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name)
            if looks_for_nan and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise not_finite("the base", name, path)
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
            yield f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}\n"
