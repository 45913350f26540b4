"""A base model's folder: the files that are loaded, each of them itself, and nothing beside them that changes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.runtime.errors import Damaged, UsageProblem
from stages.workspace.names import ADAPTER_CONFIG
from stages.workspace.settings import Quantization, Role

WEIGHTS_BY_PREFERENCE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""As transformers looks for them: it loads the first that is there, whatever else a folder holds."""

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack")
WHOLE_DTYPES = ("F64", "F32", "F16", "BF16")

TOKENIZER_SETTINGS = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
TOKENIZER_PATTERNS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", *TOKENIZER_SETTINGS)
READABLE = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})
"""Each of these sets of files is a tokenizer by itself."""

LFS_POINTER = b"version https://git-lfs.github.com/"
AGAIN = "copy or download it again; or check the models in fedcollm.toml and machine.toml"
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


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of weights that is loaded, and of the tokenizer's and the model's settings, by name."""
    found = {}
    for path in sorted({*weight_files(folder), *tokenizer_files(folder), folder / "config.json"}):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def is_whole(folder: Path) -> bool:
    """Whether config.json and every weight file are there: all that an index names, if that is what is loaded."""
    try:
        return (folder / "config.json").is_file() and bool(weight_files(folder))
    except Damaged:
        return False


def refuse_pointer(path: Path) -> None:
    """Raise Damaged if a file is what Git leaves in the place of a large one until that is fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            message = f"{path.name} is a Git LFS pointer, not the file itself"
            raise Damaged(message, where=path, mend=FETCH_AGAIN)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer that a folder holds."""
    return [path for path in sorted({*_matching(folder, TOKENIZER_PATTERNS)}) if path.is_file()]


def _matching(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    return (path for pattern in patterns for path in folder.glob(pattern))


def check_tokenizer_files(folder: Path, whose: str) -> None:
    """Raise, naming the file, unless a folder's tokenizer is whole, and one that needs no conversion. whose: "the SLM".

    What a conversion makes of a sentencepiece or tiktoken model depends on the libraries of each machine, and is not
    always the same tokenizer: all parties must have one file.
    """
    found = tokenizer_files(folder)
    for path in found:
        refuse_pointer(path)
    for path in (path for path in found if path.name in TOKENIZER_SETTINGS):
        _table(path, whose)
    names = [path.name for path in found]
    if any(needed <= {*names} for needed in READABLE):
        return
    others = [name for name in names if name not in TOKENIZER_SETTINGS]
    mend = "put the tokenizer.json there that the model was published with"
    if any(name.endswith((".model", ".tiktoken", ".txt")) for name in others):
        mend += (
            "; or make one, once for all parties: with sentencepiece or tiktoken installed, "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), and compare what both make of some texts"
        )
    message = f"{whose} has no tokenizer.json{', only ' + ', '.join(others) if others else ''}"
    raise UsageProblem(message, where=folder / others[0] if others else folder, mend=mend)


def tokens_of(folder: Path) -> set[str]:
    """The tokens that a tokenizer's own files hold, without those that transformers adds for lack of them."""
    whole, settings, added = (table_of(folder / name) for name in TOKENIZER_SETTINGS[:3])
    model = whole.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    found: set[Any] = {*added}
    if isinstance(words, dict):
        found |= words.keys()
    elif isinstance(words, list):  # [token, score] each
        found |= {pair[0] for pair in words if isinstance(pair, list) and pair and isinstance(pair[0], str)}
    if not whole:
        found |= table_of(folder / "vocab.json").keys()
    more, decoder = whole.get("added_tokens"), settings.get("added_tokens_decoder")
    listed = [*(more if isinstance(more, list) else ()), *(decoder.values() if isinstance(decoder, dict) else ())]
    return found | {str(one.get("content")) for one in listed if isinstance(one, dict)}


def table_of(path: Path) -> dict[str, Any]:
    """A JSON file of names and values; empty where it is not there. Raises UsageProblem and Damaged."""
    return _table(path, "the model") if path.is_file() else {}


def _table(path: Path, whose: str) -> dict[str, Any]:
    """A JSON file of names and values. Raises UsageProblem for anything else."""
    refuse_pointer(path)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        message = f"{whose} cannot be loaded: {path.name} is not JSON: {error}"
        raise UsageProblem(message, where=path, mend=AGAIN) from error
    if not isinstance(found, dict):
        message = f"{whose} cannot be loaded: {path.name} is no table of settings but a {type(found).__name__}"
        raise UsageProblem(message, where=path, mend=AGAIN)
    return found


def configuration(folder: Path, role: Role) -> dict[str, Any]:
    """What config.json says. Raises UsageProblem or Damaged where there is no such thing."""
    path = folder / "config.json"
    if not path.is_file():
        mend = f"check {role}.model in fedcollm.toml"
        raise UsageProblem(f"the {role.upper()}'s folder has no config.json", where=folder, mend=mend)
    return _table(path, f"the {role.upper()}")


def check(folder: Path, role: Role, quantization: Quantization | None, *, weights: bool = True) -> None:
    """Raise, naming the file, unless a folder holds a base model alone, whole, and held as the agreement says.

    weights: whether they have to be there. No more of them is read than their names, types and shapes.
    """
    whose = f"the {role.upper()}"
    if (folder / ADAPTER_CONFIG).is_file():
        message = f"{whose}'s folder holds an adapter too, which would be loaded into the base: adapter_config.json"
        mend = f"move it and adapter_model.* away for {whose} alone; or merge them, and agree on the merged model"
        raise UsageProblem(message, where=folder / ADAPTER_CONFIG, mend=mend)
    found = configuration(folder, role)
    if found.get("transformers_weights"):
        message = f"{whose}'s config.json names weights of its own (transformers_weights)"
        raise UsageProblem(message, where=folder / "config.json", mend=f"name them {WEIGHTS_BY_PREFERENCE[0]}")
    _check_bits(found.get("quantization_config"), folder, role, quantization)
    files = weight_files(folder) if weights or is_whole(folder) else []
    if weights and not files:
        message = f"{whose} has no weights: no {WEIGHTS_BY_PREFERENCE[0]}, no {WEIGHTS_BY_PREFERENCE[2]}, no index"
        others = sorted(path.name for path in _matching(folder, OTHER_WEIGHTS))
        beside = f"; {', '.join(others[:3])} is not read" if others else ""
        mend = f"put them there, or check {role}.model in fedcollm.toml"
        raise UsageProblem(message + beside, where=folder, mend=mend)
    for path in files:
        refuse_pointer(path)
        if path.suffix == ".safetensors" and found.get("quantization_config") is None:
            _refuse_few_bits(path, role)


def _refuse_few_bits(path: Path, role: Role) -> None:
    """Refuse weights that are stored in less than 16 bits without a word of it in config.json."""
    for name, (dtype, _) in headers(path).items():
        if dtype not in WHOLE_DTYPES and name.endswith(".weight"):
            raise _in_few_bits(role, dtype, name, "full precision", path)


def headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    """The type and shape of each tensor of a safetensors file. Raises Damaged if it is no such file, or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}
    except SafetensorError as error:
        raise Damaged(f"{path.name} is cut short or damaged: {error}", where=path, mend=FETCH_AGAIN) from error


def _check_bits(stored: Any, folder: Path, role: Role, agreed: Quantization | None) -> None:
    """Refuse weights stored in few bits, unless they are by bitsandbytes in as many as the agreement says."""
    if stored is None:
        return
    settings = stored if isinstance(stored, dict) else {}
    method = str(settings.get("quant_method", "bitsandbytes"))
    bits = "4bit" if settings.get("load_in_4bit") else "8bit" if settings.get("load_in_8bit") else "few bits"
    if method != "bitsandbytes" or bits != agreed:
        raise _in_few_bits(role, bits, method, agreed or "full precision", folder / "config.json")


def _in_few_bits(role: Role, bits: str, how: str, agreed: str, where: Path) -> UsageProblem:
    message = f"the {role.upper()}'s weights are stored in {bits} ({how[:80]}); agreed is {agreed}"
    mend = f'take the model as published in full precision, with {role}.quantization = "4bit" if it must be small'
    return UsageProblem(message, where=where, mend=mend)
