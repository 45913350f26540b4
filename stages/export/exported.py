"""A tuned model as others load it, and the proof that what they load is what was tuned.

Everything is computed in float32 on one device, so that a difference of logits comes from what was written and not
from the arithmetic of reading it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from stages.models import adapters, quantization, residual
from stages.models.base_loading import PROBE, load_model, load_tokenizer
from stages.models.identity import PROBE_TEXTS, tokenizer_sha256
from stages.models.tuned import Tuned
from stages.runtime import quiet
from stages.runtime.errors import BadNumbers, StorageProblem
from stages.workspace.agreement import Model

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far logits may be off, as a share of the largest one. Merging in float32 rounds, about 1e-6 of it; in 16 bits
every merged weight is stored with an error of up to 2^-11 (float16) or 2^-8 (bfloat16) of itself, layer after layer."""

MUCH_LOST = 0.2
"""The share of what tuning changed in the logits above which an export's error is told; above a half it is refused."""

TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*"),
)
ABOUT_A_MACHINE = ("name_or_path", "is_local", "local_files_only")
"""What transformers may have left in tokenizer_config.json of where and how a tokenizer was loaded."""


@dataclass(frozen=True)
class Reference:
    """What a tuned model and its base say to the probe texts: token ids, and logits [length, vocabulary] of each."""

    texts: list[list[int]]
    tuned: list[torch.Tensor]
    base: list[torch.Tensor]


def reference(tuned: Tuned) -> Reference:
    """The logits that an export must have, and those it must not have. Raises BadNumbers if they are the same."""
    with quiet.libraries():  # which warn of texts longer than the context; they are cut
        texts = [tuned.tokenizer.encode(text)[: tuned.context] for text in PROBE_TEXTS]
    adapters.check_acts(tuned.model, texts[0])
    with_adapter = [adapters.logits(tuned.model, text) for text in texts]
    with tuned.model.disable_adapter():
        return Reference(texts, with_adapter, [adapters.logits(tuned.model, text) for text in texts])


def in_full(tuned: Tuned, settings: Model) -> Tuned:
    """A model on a base in 4 or 8 bits, on what those bits say as float32; tuned cannot be used afterwards.

    That is what it was tuned on, and what can be merged: added to 4 bits, an adapter would be rounded away.
    """
    if tuned.identity.quantization is None:
        return tuned
    tensors, beneath = adapters.take(tuned.model), residual.take(tuned.model)
    base: Any = tuned.model.unload()
    model = adapters.attach(base.dequantize(torch.float32), settings)
    adapters.put(model, tensors)
    residual.put(model, beneath)
    return replace(tuned, model=model)


def stored_dtype(base: Path) -> torch.dtype:
    """The precision a base is stored in, by its configuration; where that does not say, float32: it loses nothing."""
    dtype: torch.dtype | None = AutoConfig.from_pretrained(base).dtype
    return dtype if dtype in TOLERANCE else torch.float32


def write_merged(draft: Path, tuned: Tuned, base: Path) -> None:
    """Write W + (alpha / r) B A for every W with an adapter; tuned cannot be used afterwards.

    Added in float32, then stored in the base's own precision. Configuration and generation settings are the base's.
    """
    model: Any = tuned.model.merge_and_unload()
    write_whole(draft, model, AutoConfig.from_pretrained(base), stored_dtype(base))


def write_whole(draft: Path, model: Any, config: Any, dtype: torch.dtype) -> None:
    """Write a model's weights in this precision, in which it is afterwards, with a configuration as it was published.

    That of the model in memory was changed for training.
    """
    model.config = config
    with quiet.libraries(), _naming_storage_faults(draft):
        model.to(dtype).save_pretrained(draft)
    for path in draft.glob("*.safetensors"):
        path.chmod((draft / "config.json").stat().st_mode)  # safetensors lets none but the owner read what it writes


def copy_tokenizer(draft: Path, base: Path, tokenizer: Any) -> None:
    """The base's own files: one that transformers writes anew cannot be read by its earlier versions.

    An end token that they add to every text is taken out, as it was for training and scoring: after it a model does not
    go on with its prompt. tokenizer: as it was tuned with.
    """
    copy_files(draft, base, TOKENIZER_FILES)
    settings = draft / "tokenizer_config.json"
    if settings.exists():
        found = json.loads(settings.read_bytes())
        kept = {key: value for key, value in found.items() if key not in ABOUT_A_MACHINE}
        if kept.get("add_eos_token"):
            kept["add_eos_token"] = False
        settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    words = draft / "tokenizer.json"
    if words.exists() and encoded_by(draft) != tokenizer.encode(PROBE):
        whole = json.loads(words.read_bytes())
        whole["post_processor"] = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"]
        words.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def copy_files(draft: Path, base: Path, patterns: Iterable[str]) -> None:
    """A base's files of these names, byte for byte."""
    for path in (path for pattern in patterns for path in base.glob(pattern)):
        if path.is_file():
            shutil.copyfile(path, draft / path.name)


def encoded_by(folder: Path) -> list[int]:
    """The probe's tokens as any user of transformers gets them from a folder's tokenizer, an end token included."""
    with quiet.libraries():
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    tokens: list[int] = tokenizer.encode(PROBE)
    return tokens


@contextlib.contextmanager
def _naming_storage_faults(draft: Path) -> Iterator[None]:
    """Safetensors writes by itself, and its error of a full disk is not an OSError."""
    try:
        yield
    except SafetensorError as error:
        mend = "free some space and give the same command again"
        raise StorageProblem(f"the weights cannot be written: {error}", where=draft, mend=mend) from error


def load_adapter(draft: Path, base: Path, device: torch.device, quantized: Mapping[str, Any]) -> PeftModel:
    """Base and adapter folder as any user of PEFT loads them; quantized: how, if in 4 or 8 bits."""
    with quiet.libraries():
        model = load_model(base, "the base", dtype=torch.float32, **quantized)
        quantization.never_repack(model)  # in bfloat16 it could not be compared
        return PeftModel.from_pretrained(model if quantized else model.to(device), draft)


def load_merged(draft: Path, device: torch.device) -> PreTrainedModel:
    """A merged folder as any user of transformers loads it."""
    loaded: PreTrainedModel = load_model(draft, "the export", dtype=torch.float32).to(device)
    return loaded


class Proof(TypedDict):
    """How far an export's logits are from the tuned model's, at the largest; how far tuning moved them; the largest."""

    error: float
    change: float
    scale: float
    stored_dtype: str


def check_logits(found: PeftModel | PreTrainedModel, expected: Reference, dtype: torch.dtype) -> Proof:
    """Prove that an export, loaded back, says what the tuned model says and not what the base says.

    dtype: what the export is stored in. The error has to be a small share of the
    scale, and less than half of the change, so that the export is nearer to the tuned model than to the base.
    """
    logits = [adapters.logits(found, text) for text in expected.texts]
    error = largest_difference(logits, expected.tuned)
    change = largest_difference(expected.base, expected.tuned)
    scale = max(float(one.abs().max()) for one in expected.tuned)
    stored = str(dtype).removeprefix("torch.")
    if not error <= TOLERANCE[dtype] * scale:
        message = f"the export's logits are not those of base and adapter: off by {error:.3g}, largest {scale:.3g}"
        mend = "check the versions of peft and transformers; export the adapter, without --merged"
        raise BadNumbers(message, mend=mend)
    if not error < change / 2:
        message = f"{stored} does not keep what was tuned: logits off by {error:.3g}, moved by {change:.3g}"
        raise BadNumbers(message, mend="export the adapter, without --merged: it stays float32")
    return {"error": error, "change": change, "scale": scale, "stored_dtype": stored}


def loss(proof: Proof) -> str:
    """What to say of an export that keeps a good part of what was tuned, but not all; empty if it keeps it."""
    share = proof["error"] / proof["change"]
    if share <= MUCH_LOST:
        return ""
    return (
        f"stored in {proof['stored_dtype']}, its logits are off by up to {share:.0%} of what tuning changed in them: "
        "answers that were close can turn out otherwise than in this federation's scores. Score this folder before you "
        "hand it on, or export the adapter, without --merged: that keeps all of it"
    )


def largest_difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Between any two elements of tensors of the same shapes."""
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def check_tokenizer(draft: Path, expected_sha256: str) -> None:
    """Raise BadNumbers unless the tokenizer, loaded back, is the base's by content, and ends no text by itself."""
    tokenizer = load_tokenizer(draft, "the export")
    if tokenizer_sha256(tokenizer) != expected_sha256 or encoded_by(draft) != tokenizer.encode(PROBE):
        mend = "check the version of transformers; export the adapter, without --merged"
        raise BadNumbers("the export's tokenizer is not the base's", where=draft, mend=mend)
