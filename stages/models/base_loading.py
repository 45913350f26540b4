"""Base models and tokenizers by transformers, loaded as their files say or refused: never filled up, never guessed."""

from __future__ import annotations

import errno
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from stages.bases import base_files
from stages.bases.base_files import FETCH_AGAIN
from stages.runtime import quiet
from stages.runtime.errors import Damaged, Problem, UsageProblem
from stages.workspace.settings import Quantization, Role

HERE = ("eager", "sdpa")
"""The ways to compute attention that are in torch itself."""

OUT_OF_MEMORY_PHRASES = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch says so on a CPU and on a GPU."""

PROBE = "Question: Which of these is a mammal?\nAnswer: a whale"


def load_model(folder: Path, whose: str, **settings: Any) -> Any:
    """The model in a folder, every weight of it from there. whose: "the SLM".

    Raises Damaged for weights that are missing, unexpected, of another shape, not finite or not to be read, and
    UsageProblem for what transformers cannot load here.
    """
    config = read_configuration(folder, whose)
    try:
        with quiet.libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are told of; they are refused below
                trust_remote_code=False,
                **settings,
            )
    except Exception as error:  # transformers and the classes of each architecture raise what they like
        if is_out_of_memory(error):
            raise
        is_cut = isinstance(error, SafetensorError | EOFError) or "PytorchStreamReader" in str(error)
        is_cut |= isinstance(error, OSError) and error.errno == errno.EINVAL  # a seek before the start of what is left
        if is_cut or type(error).__name__ == "UnpicklingError":
            raise _unreadable(whose, folder, error) from error
        raise cannot_load(whose, folder, error) from error
    model, info = loaded
    _refuse_unless_whole(info, whose, folder)
    refuse_unless_finite(model, whose, folder)
    return model


def read_configuration(folder: Path, whose: str) -> Any:
    """A folder's configuration, with a way to compute attention that is here. Raises UsageProblem."""
    try:
        with quiet.libraries():
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the classes of each architecture raise what they like
        raise cannot_load(whose, folder, error) from error
    if config._attn_implementation not in HERE:  # another one gives the same numbers, if it is here at all
        config._attn_implementation = None
    return config


def read_generation(folder: Path, whose: str) -> Any:
    """How the model in a folder generates, as transformers takes it from there. Raises UsageProblem."""
    if not (folder / "generation_config.json").exists():
        return GenerationConfig.from_model_config(read_configuration(folder, whose))
    try:
        with quiet.libraries():
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # it checks each value, and raises what it likes
        raise cannot_load(whose, folder / "generation_config.json", error) from error


def empty_model(config: Any, dtype: torch.dtype, whose: str, where: Path | None) -> Any:
    """A model of this configuration without weights, on the meta device. Raises UsageProblem if there can be none."""
    try:
        with torch.device("meta"), quiet.libraries():
            return AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except Exception as error:  # the classes of each architecture raise what they like
        raise cannot_load(whose, where, error) from error


def check_unread(folder: Path, role: Role, quantization: Quantization | None) -> PreTrainedTokenizerBase | None:
    """Raise what loading a base would, as far as that is known without reading its weights: all but their values.

    Of a folder without weights, or without a tokenizer too, what is there is checked. Returns the tokenizer, if any.
    """
    whose = f"the {role.upper()}"
    base_files.check(folder, role, quantization, weights=False)
    config = read_configuration(folder, whose)
    is_whole = base_files.is_whole(folder)
    if not (is_whole or base_files.tokenizer_files(folder)):
        return None
    tokenizer = load_tokenizer(folder, whose)
    check_fits(tokenizer, int(config.get_text_config().vocab_size), whose)
    if is_whole and getattr(config, "quantization_config", None) is None:  # few bits are packed on a device alone
        load_model(folder, whose, device_map="meta")
    return tokenizer


def cannot_load(whose: str, where: Path | None, error: Exception) -> UsageProblem:
    """What is said of a model that transformers cannot make here."""
    mend = f"check {_role(whose)}.model in fedcollm.toml, and the version of transformers"
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        message = f"{whose} cannot be loaded: it needs code of its own, which is never run"
        return UsageProblem(message, where=where, mend="take a model that transformers knows by itself")
    return UsageProblem(f"{whose} cannot be loaded: {_said(error)}", where=where, mend=mend)


def _refuse_unless_whole(info: dict[str, Any], whose: str, folder: Path) -> None:
    mend = "take the folder that the model was published in, whole; config.json must be that of the weights"
    shapes = [f"{name} is {list(found)}, expected {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    for what, names in (
        ("of another shape than config.json says", shapes),
        ("missing", info["missing_keys"]),
        ("unexpected", info["unexpected_keys"]),
        ("unreadable", info.get("error_msgs") or ()),
    ):
        if names:
            raise Damaged(f"{whose}'s weights are {what}: {_few(names)}", where=folder, mend=mend)


def refuse_unless_finite(model: Any, whose: str, folder: Path) -> None:
    """Raise Damaged if a weight is NaN or infinite: no setting of a training mends that."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise not_finite(whose, name, folder)


def not_finite(whose: str, name: str, where: Path) -> Damaged:
    """What is said of a weight that is NaN or infinite."""
    message = f"{whose}'s weights hold NaN or infinity before any training: {name}"
    return Damaged(message, where=where, mend="download the base again, or take another: no setting mends it")


def load_tokenizer(folder: Path, whose: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, made to end no text by itself. Raises Damaged, or UsageProblem if it cannot serve."""
    base_files.check_tokenizer_files(folder, whose)
    config = read_configuration(folder, whose) if (folder / "config.json").is_file() else None
    try:
        with quiet.libraries():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, config=config, trust_remote_code=False, local_files_only=True
            )
            _refuse_own_code(folder, whose)
            _end_no_text(tokenizer)
            added, plain = tokenizer.encode(PROBE), tokenizer.encode(PROBE, add_special_tokens=False)
            own = _as_its_file_says(folder / "tokenizer.json")
    except Problem:
        raise
    except Exception as error:  # tokenizers raises Exception itself, transformers whatever it stumbles over
        message = f"{whose}'s tokenizer cannot be loaded: {_said(error)}"
        mend = "put its tokenizer.json there, whole; if it is of a newer library, upgrade transformers and tokenizers"
        raise UsageProblem(message, where=folder, mend=mend) from error
    if own is not None and own != plain:
        message = f"{whose}'s tokenizer is loaded as a {type(tokenizer).__name__}, which reads {PROBE!r} in another way"
        mend = "name the right tokenizer_class in tokenizer_config.json, or try another version of transformers"
        raise UsageProblem(f"{message} than its tokenizer.json says", where=folder / "tokenizer.json", mend=mend)
    _refuse_tokens_that_are_not_there(tokenizer, folder, whose)
    if not plain or set(plain) <= {tokenizer.unk_token_id}:
        message = f"{whose}'s tokenizer knows none of the words of {PROBE!r}"
        raise UsageProblem(message, where=folder, mend="put the model's own tokenizer files there")
    if added[len(added) - len(plain) :] != plain:
        message = f"{whose}'s tokenizer adds an end token to every text by itself, and cannot be kept from it"
        raise UsageProblem(message, where=folder, mend="set add_eos_token to false in tokenizer_config.json")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        message = f"{whose}'s tokenizer has neither a first nor an end token, without which nothing can be scored"
        mend = "name eos_token in tokenizer_config.json, or take the model's own"
        raise UsageProblem(message, where=folder, mend=mend)
    found: PreTrainedTokenizerBase = tokenizer
    return found


def _as_its_file_says(path: Path) -> list[int] | None:
    """The probe's tokens by tokenizer.json alone: some classes of transformers take from it no more than its words."""
    if not path.is_file():
        return None
    own = Tokenizer.from_file(str(path))
    own.no_truncation()
    own.no_padding()
    tokens: list[int] = own.encode(PROBE, add_special_tokens=False).ids
    return tokens


def _refuse_own_code(folder: Path, whose: str) -> None:
    """Refuse a tokenizer whose class is a program beside it, for which transformers would take another class."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    classes, name = settings.get("auto_map"), settings.get("tokenizer_class")
    if not classes or (isinstance(classes, dict) and "AutoTokenizer" not in classes):
        return
    if not isinstance(name, str) or tokenizer_class_from_name(name) is None:
        message = f"{whose}'s tokenizer needs code of its own (auto_map in tokenizer_config.json), which is never run"
        mend = "where its tokenizer.json does the same by itself, take auto_map out; else take another model"
        raise UsageProblem(message, where=path, mend=mend)


def _refuse_tokens_that_are_not_there(tokenizer: Any, folder: Path, whose: str) -> None:
    """Refuse a first or end token that no file holds: transformers adds it, with a row of no meaning or with none."""
    held = base_files.tokens_of(folder)
    for what, key in (("first", "bos_token"), ("end", "eos_token")):
        token = getattr(tokenizer, key)
        if token is not None and str(token) not in held:
            message = f"{whose}'s tokenizer has {str(token)!r} as its {what} token, which none of its files holds"
            mend = f"name the right {key} in tokenizer_config.json, or put the model's own tokenizer files there"
            raise UsageProblem(message, where=folder, mend=mend)


def _end_no_text(tokenizer: Any) -> None:
    """Take away the end token that a tokenizer adds by itself; what it puts first stays.

    A prompt that ends so would swallow its answer's first token, and answers would be scored by their end alone.
    """
    added, plain = tokenizer.encode(PROBE), tokenizer.encode(PROBE, add_special_tokens=False)
    last = added[-1:]
    if not plain or last == plain[-1:] or not tokenizer.is_fast:
        return
    before = next((k for k in range(len(added)) if added[k : k + len(plain)] == plain), None)
    if before is None:
        return
    first = [(tokenizer.convert_ids_to_tokens(token), token) for token in added[:before]]
    single = [*(name for name, _ in first), "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=first
    )


def check_fits(tokenizer: PreTrainedTokenizerBase, rows: int, whose: str) -> None:
    """Raise UsageProblem if a tokenizer has tokens beyond the rows of the base's embedding."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if beyond:
        named = _few([f"{token!r} is {index}" for index, token in beyond])
        message = f"{whose}'s tokenizer has tokens beyond the {rows} rows of the base's embedding: {named}"
        mend = "take the base's own tokenizer; or resize its embedding to the tokenizer, and give all parties that base"
        raise UsageProblem(message, where=tokenizer.name_or_path, mend=mend)


def _unreadable(whose: str, folder: Path, error: Exception) -> Problem:
    message = f"{whose}'s weights cannot be read, cut short or damaged: {_said(error)}"
    return Damaged(message, where=folder, mend=FETCH_AGAIN)


def _said(error: Exception) -> str:
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def _role(whose: str) -> str:
    return whose.removeprefix("the ").lower()


def _few(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is what went wrong; torch's own kind is a RuntimeError."""
    says_so = any(phrase in str(error) for phrase in OUT_OF_MEMORY_PHRASES)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and says_so)
