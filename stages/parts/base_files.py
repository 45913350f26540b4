"""A base model's folder: the files that are loaded, each of them itself, and nothing beside them that changes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.parts.config import Quantization, Role
from stages.parts.errors import Damaged, UsageProblem

WEIGHTS_BY_PREFERENCE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""As transformers looks for them: it loads the first that is there, whatever else a folder holds."""

TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json")
LFS_POINTER = b"version https://git-lfs.github.com/"
FETCH_AGAIN = "`git lfs pull` in that folder if it came by git; else copy or download it again"


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that are loaded from a folder; none, if it has none. Raises Damaged if parts are missing."""
    found = next((folder / name for name in WEIGHTS_BY_PREFERENCE if (folder / name).is_file()), None)
    if found is None or found.suffix != ".json":
        return [found] if found else []
    refuse_pointer(found)
    try:
        names = sorted(set(json.loads(found.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise Damaged(f"{found.name} is no index of weights: {error}", where=found, mend=FETCH_AGAIN) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise Damaged(f"{found.name} names {name}, which is not there", where=folder, mend=FETCH_AGAIN)
    return [folder / name for name in names]


def refuse_pointer(path: Path) -> None:
    """Raise Damaged if a file is what Git leaves in the place of a large one until that is fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            message = f"{path.name} is a Git LFS pointer, not the file itself"
            raise Damaged(message, where=path, mend=FETCH_AGAIN)


def check_tokenizer_files(folder: Path) -> None:
    """Raise Damaged if a file of the tokenizer is a pointer."""
    for path in (path for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern)):
        if path.is_file():
            refuse_pointer(path)


def configuration(folder: Path, role: Role) -> dict[str, Any]:
    """What config.json says. Raises UsageProblem or Damaged where there is no such thing."""
    path, mend = folder / "config.json", f"check {role}.model in fedcollm.toml"
    if not path.is_file():
        raise UsageProblem(f"the {role.upper()}'s folder has no config.json", where=folder, mend=mend)
    refuse_pointer(path)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        message = f"the {role.upper()} cannot be loaded: config.json is not JSON: {error}"
        raise UsageProblem(message, where=path, mend=f"download it again, or {mend}") from error
    if not isinstance(found, dict):
        raise UsageProblem(f"the {role.upper()}'s config.json is no table of settings", where=path, mend=mend)
    return found


def check(folder: Path, role: Role, quantization: Quantization | None) -> None:
    """Raise, naming the file, unless a folder holds a base model alone, whole, and held as the agreement says."""
    whose = f"the {role.upper()}"
    if (folder / "adapter_config.json").is_file():
        message = f"{whose}'s folder holds an adapter too, which would be loaded into the base: adapter_config.json"
        mend = f"move it and adapter_model.* away for {whose} alone; or merge them, and agree on the merged model"
        raise UsageProblem(message, where=folder / "adapter_config.json", mend=mend)
    found = configuration(folder, role)
    if found.get("transformers_weights"):
        message = f"{whose}'s config.json names weights of its own (transformers_weights)"
        raise UsageProblem(message, where=folder / "config.json", mend=f"name them {WEIGHTS_BY_PREFERENCE[0]}")
    _check_bits(found.get("quantization_config"), folder, role, quantization)
    check_tokenizer_files(folder)
    files = weight_files(folder)
    if not files:
        message = f"{whose} has no weights: no {WEIGHTS_BY_PREFERENCE[0]}, no {WEIGHTS_BY_PREFERENCE[2]}, no index"
        raise UsageProblem(message, where=folder, mend=f"put them there, or check {role}.model in fedcollm.toml")
    for path in files:
        refuse_pointer(path)


def _check_bits(stored: Any, folder: Path, role: Role, agreed: Quantization | None) -> None:
    """Refuse weights stored in few bits, unless they are by bitsandbytes in as many as the agreement says."""
    if not stored:
        return
    settings = stored if isinstance(stored, dict) else {}
    method = str(settings.get("quant_method", "bitsandbytes"))
    bits = "4bit" if settings.get("load_in_4bit") else "8bit" if settings.get("load_in_8bit") else "few bits"
    if method != "bitsandbytes" or bits != agreed:
        message = (
            f"the {role.upper()}'s weights are stored in {bits} ({method}); agreed is {agreed or 'full precision'}"
        )
        mend = f'take the model as published in full precision, with {role}.quantization = "4bit" if it must be small'
        raise UsageProblem(message, where=folder / "config.json", mend=mend)
