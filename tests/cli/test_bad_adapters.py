"""An adapter that is broken, forged or in the wrong place: every command that would read it says so and stops."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from builders import Outcome, adapters, drafts, edit, sign

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
Harm = Callable[[Path], object]
Tensors = dict[str, np.ndarray]


def keep(count: int, name: str = WEIGHTS) -> Harm:
    """Cut a file down to its first bytes."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count])


def flip(position: int, name: str = WEIGHTS) -> Harm:
    """Turn one bit of a file, counted from its start or, below zero, from its end."""

    def harm(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)

    return harm


def link(name: str = ".") -> Harm:
    """Put a symbolic link to the real thing in the place of a file, or of the folder."""

    def harm(folder: Path) -> None:
        path, elsewhere = folder / name, folder.with_name(".elsewhere")
        path.rename(elsewhere)
        path.symlink_to(elsewhere)

    return harm


def tensors(change: Callable[[Tensors], Tensors], **metadata: str) -> Harm:
    """Write other tensors, soundly."""

    def harm(folder: Path) -> None:
        found = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
        content = safetensors.numpy.save(change(found), metadata={"format": "pt"} | metadata)
        (folder / WEIGHTS).write_bytes(content)

    return harm


def of_rank(rank: int) -> Callable[[Tensors], Tensors]:
    return lambda found: {name: t[:rank] if "lora_A" in name else t[:, :rank].copy() for name, t in found.items()}


def with_last(value: float) -> Callable[[Tensors], Tensors]:
    """One value of the last tensor replaced, in the middle of all the others."""

    def change(found: Tensors) -> Tensors:
        name = sorted(found)[-1]
        tensor = found[name].copy()
        tensor.flat[tensor.size // 2] = value
        return found | {name: tensor}

    return change


def header(change: Callable[[str], str]) -> Harm:
    """Write another header over the same tensors."""

    def harm(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = change(content[8 : 8 + length].decode()).encode()
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return harm


def setting(key: str, value: object) -> Harm:
    def harm(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {key: value}))

    return harm


def pickled(name: str) -> Harm:
    return lambda folder: torch.save({"weight": torch.zeros(2)}, folder / name)


STILL_ARRIVING = {"weights missing", "config missing", "manifest missing", "weights truncated"}
AS_IT_ARRIVED: dict[str, tuple[Harm, list[str]]] = {
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), [f"{WEIGHTS} is missing"]),
    "config missing": (lambda folder: (folder / CONFIG).unlink(), [f"{CONFIG} is missing"]),
    "manifest missing": (lambda folder: (folder / MANIFEST).unlink(), ["client-2 has no manifest.json"]),
    "weights truncated": (keep(1000), [f"{WEIGHTS} has 1000 bytes of "]),
    "manifest truncated": (keep(100, MANIFEST), ["manifest.json is not valid JSON"]),
    "bit flipped in the weights": (flip(-1), [f"{WEIGHTS} is not the file its manifest names", "expected"]),
    "bit flipped in the config": (flip(-2, CONFIG), [f"{CONFIG} is not the file its manifest names", "expected"]),
    "weights symlinked": (link(WEIGHTS), [f"{WEIGHTS} is a symbolic link"]),
    "manifest symlinked": (link(MANIFEST), ["manifest.json is a symbolic link"]),
    "folder symlinked": (link(), ["client-2 is a symbolic link"]),
    "pickle beside": (pickled("adapter_model.bin"), ["adapter_model.bin does not belong in an adapter folder"]),
    "superfluous file": (lambda folder: (folder / "notes.txt").touch(), ["notes.txt does not belong"]),
    "manifest of another format": (lambda f: edit(f / MANIFEST, "fedcollm/1", "other/2"), ["not a fedcollm/1 mani"]),
    "manifest with an unknown key": (lambda f: sign(f, author="me"), ["not a fedcollm/1 manifest", "author"]),
}

FORGED: dict[str, tuple[Harm, list[str]]] = {
    "truncated in the header": (keep(100), [f"{WEIGHTS} is not a safetensors file, or is cut short"]),
    "larger than its tensors": (
        lambda folder: (folder / WEIGHTS).write_bytes(bytes(2 << 20)),
        [f"its manifest says that {WEIGHTS} has 2097152 bytes, here it can have ", " at most"],
    ),
    "truncated by a byte": (keep(-1), ["not a sound safetensors file"]),
    "empty": (keep(0), [f"{WEIGHTS} is not a safetensors file, or is cut short"]),
    "bit flipped in the header": (flip(20), []),
    "wrong rank": (tensors(of_rank(2)), ["the adapter has rank 2, the agreement says 4", "client 2's machine"]),
    "wrong dtype": (tensors(lambda found: {n: t.astype("f2") for n, t in found.items()}), ["as F16", "F32 (float32)"]),
    "extra key": (tensors(lambda found: found | {"more": np.zeros(3, "f4")}), ["the adapter has more, which the base"]),
    "missing key": (tensors(lambda found: dict(list(found.items())[1:])), ["the adapter lacks ", "1 tensors missing"]),
    "pickle": (pickled(WEIGHTS), [f"{WEIGHTS} is a pickle, which is never opened"]),
    "unknown metadata": (tensors(lambda found: found, note="x"), [f"{WEIGHTS} carries unknown metadata"]),
    "duplicate key": (
        header(lambda text: text.replace("{", '{"__metadata__":{},', 1)),
        ["the key '__metadata__' appears twice"],
    ),
    "config of another rank": (setting("r", 8), [f"{CONFIG} says r = 8, the agreement says 4"]),
    "config of another method": (setting("peft_type", "VERA"), [f"{CONFIG} says peft_type = 'VERA'", "'LORA'"]),
    "config that is no JSON": (keep(9, CONFIG), [f"{CONFIG} is not valid JSON"]),
}


@pytest.mark.parametrize("kind", AS_IT_ARRIVED)
def test_a_broken_adapter_is_refused_by_its_manifest(kind: str, answered: Path, refused: Callable[..., str]) -> None:
    harm, expected = AS_IT_ARRIVED[kind]
    harm(answered / "exchange" / "round-0001" / "client-2")
    said = refused(answered, 3 if kind in STILL_ARRIVING else 4, "aggregate", "--round", 1)
    assert "exchange/round-0001/client-2" in said
    assert all(words in said for words in expected), said


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_adapter_is_refused_though_its_manifest_agrees(
    kind: str, answered: Path, refused: Callable[..., str]
) -> None:
    harm, expected = FORGED[kind]
    adapter = answered / "exchange" / "round-0001" / "client-2"
    harm(adapter)
    sign(adapter)
    said = refused(answered, 4, "aggregate", "--round", 1)
    assert "exchange/round-0001/client-2/" in said
    assert all(words in said for words in expected), said


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_single_value_that_is_no_number_is_refused(value: float, answered: Path, refused: Callable[..., str]) -> None:
    adapter = answered / "exchange" / "round-0001" / "client-2"
    tensors(with_last(value))(adapter)
    sign(adapter)
    said = refused(answered, 6, "aggregate", "--round", 1)
    assert "holds NaN or infinity" in said
    assert str(adapter / WEIGHTS) in said


OTHER = "0" * 64
WRONG_PLACE: dict[str, tuple[dict[str, object], list[str]]] = {
    "another round": ({"round": 2}, ["of another round: 2, here it is 1"]),
    "another client": ({"client": 3}, ["of another client: 3, here it is 2"]),
    "another stage": ({"stage": "aggregate"}, ["of another stage: aggregate, here it is client-train"]),
    "another federation": ({"federation": "other"}, ["of another federation: other, here it is tiny"]),
    "another agreement": ({"agreement_sha256": OTHER}, ["of another agreement (sha256 of fedcollm.toml): 0000000000"]),
    "another broadcast": ({"parents": {"broadcast": OTHER}}, ["was trained from another broadcast than the one here"]),
    "more tokens than there are": (
        {"tokens": 2**53},
        ["says it saw more than 1099511627776"],
    ),
    "no broadcast": ({"parents": {}}, ["was trained from another broadcast than the one here"]),
    "another base": (
        {"base": {"architecture": "gpt2", "weights_sha256": OTHER, "tokenizer_sha256": OTHER}},
        ["client 2's update of round 1 was trained on another base model"],
    ),
    "another LoRA shape": (
        {"lora": {"r": 4, "alpha": 99, "dropout": 0.0, "target_modules": []}},
        ["of another LoRA shape", "alpha=99", "alpha=8"],
    ),
}


@pytest.mark.parametrize("kind", WRONG_PLACE)
def test_a_sound_adapter_from_elsewhere_is_refused_by_name(
    kind: str, answered: Path, refused: Callable[..., str]
) -> None:
    claims, expected = WRONG_PLACE[kind]
    sign(answered / "exchange" / "round-0001" / "client-2", **claims)
    said = refused(answered, 5, "aggregate", "--round", 1)
    assert all(words in said for words in expected), said
    assert "exchange/round-0001/client-2" in said


def test_an_update_copied_from_an_earlier_round_is_refused(finished: Path, refused: Callable[..., str]) -> None:
    exchange = finished / "exchange"
    shutil.rmtree(exchange / "round-0002" / "client-3")
    shutil.copytree(exchange / "round-0001" / "client-3", exchange / "round-0002" / "client-3")
    said = refused(finished, 5, "aggregate", "--round", 2, "--overwrite")
    assert "exchange/round-0002/client-3 is of another round: 1, here it is 2" in said


SERVER, EXCHANGE = "private/server/round-000", "exchange/round-000"
READERS = [
    (f"{EXCHANGE}1/broadcast", "client-train --client 1 --round 1 --overwrite"),
    (f"{EXCHANGE}1/broadcast", "aggregate --round 1 --overwrite"),
    (f"{SERVER}1/aggregate", "co-distill --round 1 --overwrite"),
    (f"{SERVER}1/llm", "co-distill --round 2 --overwrite"),
    (f"{SERVER}1/slm", "broadcast --round 2 --overwrite"),
    (f"{SERVER}2/slm", "evaluate --round 2 --model slm"),
    (f"{SERVER}2/llm", "evaluate --round 2 --model llm"),
    (f"{EXCHANGE}2/client-1", "evaluate --round 2 --client 1"),
    (f"{SERVER}2/slm", "export --round 2 --model slm"),
    (f"{SERVER}2/llm", "export --round 2 --model llm --merged"),
    (f"{EXCHANGE}2/client-1", "export --round 2 --client 1"),
]


@pytest.mark.parametrize(("adapter", "command"), READERS)
def test_every_command_checks_what_it_reads(
    adapter: str, command: str, finished: Path, refused: Callable[..., str]
) -> None:
    flip(-1)(finished / adapter)
    assert str(finished / adapter / WEIGHTS) in refused(finished, 4, *command.split())


@pytest.mark.parametrize(("adapter", "command"), [reader for reader in READERS if "broadcast --" not in reader[1]])
def test_every_command_that_computes_refuses_nan_that_its_manifest_vouches_for(
    adapter: str, command: str, finished: Path, refused: Callable[..., str]
) -> None:
    tensors(with_last(np.nan))(finished / adapter)
    sign(finished / adapter)
    said = refused(finished, 6, *command.split())
    assert "holds NaN or infinity" in said
    assert str(finished / adapter / WEIGHTS) in said


PRODUCTS = [
    (f"{EXCHANGE}1/broadcast", "broadcast --round 1"),
    (f"{EXCHANGE}2/broadcast", "broadcast --round 2"),
    (f"{EXCHANGE}1/client-2", "client-train --client 2 --round 1"),
    (f"{SERVER}1/aggregate", "aggregate --round 1"),
    (f"{SERVER}1/llm", "co-distill --round 1"),
    (f"{SERVER}1/slm", "co-distill --round 1"),
]


@pytest.mark.parametrize("harm", [flip(-1), link(), AS_IT_ARRIVED["manifest missing"][0]], ids=["flip", "link", "bare"])
@pytest.mark.parametrize(("adapter", "command"), PRODUCTS)
def test_a_damaged_result_is_never_called_done_and_overwrite_makes_it_again(
    adapter: str,
    command: str,
    harm: Harm,
    finished: Path,
    refused: Callable[..., str],
    fedcollm: Callable[..., Outcome],
) -> None:
    whole = adapters(finished)
    harm(finished / adapter)
    code = 4 if (finished / adapter / MANIFEST).exists() else 3
    assert "--overwrite" in refused(finished, code, *command.split())
    assert fedcollm(*command.split(), "--overwrite", "-w", finished).code == 0
    assert not os.path.islink(finished / adapter)  # noqa: PTH114
    assert drafts(finished) == []
    assert adapters(finished) == whole
