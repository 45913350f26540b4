"""audit: for each check a workspace that is damaged in that way, and a sound one in which nothing is found."""

from __future__ import annotations

import getpass
import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders import edit, published, scale, sign, write_rows
from damages import (
    CLIENT,
    CONFIG,
    MANIFEST,
    SERVER,
    WEIGHTS,
    Harm,
    at,
    config,
    flip,
    problems,
    put,
    tensors_of,
)
from stages.aggregation import means, updates
from stages.audit import check_numbers
from stages.audit.audit import CHECKS, audit


def change(folder: Path, which: str, how: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the tensors whose names hold this word."""
    put(folder, {name: how(t).astype(t.dtype) if which in name else t for name, t in tensors_of(folder).items()})


def rename(folder: Path, old: str, new: str) -> None:
    put(folder, {name.replace(old, new): tensor for name, tensor in tensors_of(folder).items()})


def with_nan(tensor: np.ndarray) -> np.ndarray:
    changed = tensor.copy()
    changed.flat[:2] = np.nan
    return changed


def pipe(folder: Path) -> None:
    (folder / CLIENT / WEIGHTS).unlink()
    os.mkfifo(folder / CLIENT / WEIGHTS)


def link(folder: Path) -> None:
    (folder / CLIENT / WEIGHTS).rename(folder / "elsewhere")
    (folder / CLIENT / WEIGHTS).symlink_to(folder / "elsewhere")


def copy_update(folder: Path) -> None:
    """Client 2 sends what client 1 sent, under its own name."""
    shutil.copy(folder / "exchange/round-0001/client-1" / WEIGHTS, folder / CLIENT / WEIGHTS)
    sign(folder / CLIENT)


def turn_back(folder: Path) -> None:
    """Round 2's average undoes round 1's, four times over."""
    rounds = [folder / "private/server" / f"round-000{number}" / "aggregate" for number in (1, 2)]
    starts = [tensors_of(folder / "exchange" / f"round-000{number}" / "broadcast") for number in (1, 2)]
    first = tensors_of(rounds[0])
    put(rounds[1], {name: starts[1][name] - 4 * (first[name] - starts[0][name]) for name in first})


def oppose(folder: Path) -> None:
    """Client 2 goes as far as the others together, the other way."""
    exchange = folder / "exchange/round-0001"
    start = tensors_of(exchange / "broadcast")
    others = [tensors_of(exchange / f"client-{k}") for k in (1, 3)]
    put(exchange / "client-2", {name: start[name] - sum(o[name] - start[name] for o in others) for name in start})


def send_back(folder: Path) -> None:
    put(folder / CLIENT, tensors_of(folder / "exchange/round-0001/broadcast"))


def strange_client(folder: Path) -> None:
    shutil.copytree(folder / CLIENT, folder / "exchange/round-0001/client-4")
    sign(folder / "exchange/round-0001/client-4", client=4)


def one_more(folder: Path) -> None:
    put(folder, tensors_of(folder) | {"base_model.model.transformer.h.0.attn.c_attn.bias": np.zeros(3, "f4")})


def lay(path: str, content: str = "") -> Harm:
    """A file that was not there."""
    return lambda root: write_rows(root / path, []).write_text(content)


def half(tensors: Path) -> None:
    put(tensors, {name: tensor.astype("f2") for name, tensor in tensors_of(tensors).items()})


def lone(folder: Path) -> None:
    put(folder, {name: tensor for name, tensor in tensors_of(folder).items() if "lora_A" in name})


def transposed(folder: Path) -> None:
    change(folder, "lora_B", lambda tensor: np.ascontiguousarray(tensor.T))


ZERO: Callable[[np.ndarray], np.ndarray] = lambda tensor: 0 * tensor  # noqa: E731

DAMAGE: dict[str, tuple[Harm, str]] = {
    # a damage, and a line that it gives
    "manifest unreadable": (lambda f: (f / CLIENT / MANIFEST).write_text("{"), f"A1 FAIL {CLIENT}: .*not valid JSON"),
    "manifest missing": (lambda f: (f / CLIENT / MANIFEST).unlink(), f"A1 FAIL {CLIENT}: client-2 has no manifest"),
    "another place": (at(CLIENT, sign, client=3), f"A1 FAIL {CLIENT}: it says it is round-0001/client-3; expected r"),
    "another broadcast": (
        at(CLIENT, sign, parents={"broadcast": "0" * 64}),
        f"A1 FAIL {CLIENT}: was made from another broadcast than lies in exchange/round-0001/broadcast: 0000",
    ),
    "another agreement": (
        at(CLIENT, sign, agreement_sha256="0" * 64),
        f"A1 FAIL {CLIENT}: is of another agreement, .*",
    ),
    "agreement edited": (lambda f: edit(f / "fedcollm.toml", "seed = 7", "seed = 8"), "A1 FAIL exchange/.* agreement"),
    "agreement unreadable": (lambda f: (f / "fedcollm.toml").write_text("]"), "A1 FAIL fedcollm.toml: cannot be read"),
    "another federation": (at(CLIENT, sign, federation="x"), f"A1 FAIL {CLIENT}: is of another federation: x"),
    "another base": (
        at(CLIENT, sign, base={"architecture": "gpt2", "weights_sha256": "0" * 64, "tokenizer_sha256": "0" * 64}),
        f"A1 FAIL {CLIENT}: has another base than exchange/round-0001/broadcast",
    ),
    "an unknown client": (
        strange_client,
        "A1 FAIL exchange/round-0001/client-4: is of client 4; expected client 1",
    ),
    "left out": (at(SERVER, sign, parents={}), "A1 WARN exchange/round-0001/client-1: is not in the average"),
    "bit flipped": (lambda f: flip(f / CLIENT / WEIGHTS), f"A2 FAIL {CLIENT}/{WEIGHTS}: sha256 .*; expected .*"),
    "cut short": (
        lambda f: os.truncate(f / CLIENT / WEIGHTS, 99),
        f"A2 FAIL {CLIENT}/{WEIGHTS}: 99 bytes; exp",
    ),
    "file missing": (lambda f: (f / CLIENT / CONFIG).unlink(), f"A2 FAIL {CLIENT}/{CONFIG}: is missing"),
    "symbolic link": (link, f"A2 FAIL {CLIENT}/{WEIGHTS}: .* is a symbolic link"),
    "named pipe": (pipe, f"A2 FAIL {CLIENT}/{WEIGHTS}: .* is not a plain file"),
    "pickle": (lay(f"{CLIENT}/adapter_model.bin"), f"A2 FAIL {CLIENT}/adapter_model.bin: may run code"),
    "pickle between": (lay("exchange/training_args.bin"), "A2 FAIL exchange/training_args.bin: may run code"),
    "link between": (lambda f: (f / "exchange/all").symlink_to("/"), "A2 FAIL exchange/all: is a symbolic link"),
    "superfluous": (lay(f"{CLIENT}/notes.txt"), f"A2 WARN {CLIENT}/notes.txt: no manifest names it, and it is neither"),
    "superfluous JSON": (lay(f"{CLIENT}/notes.json", "{}"), f"A2 WARN {CLIENT}/notes.json: no manifest names it"),
    "draft": (lay("exchange/round-0001/.client-2.7.partial/x.json", "{}"), "A2 WARN .*partial/x.json: a draft"),
    "header cut": (at(CLIENT, lambda f: (os.truncate(f / WEIGHTS, 60), sign(f))), f"A3 FAIL {CLIENT}: .* cut short"),
    "float16": (at(CLIENT, half), f"A3 FAIL {CLIENT}/{WEIGHTS}: holds F16; expected F32"),
    "metadata": (
        at(CLIENT, lambda f: put(f, tensors_of(f), by="me")),
        f"A3 FAIL {CLIENT}/{WEIGHTS}: carries metadata: by",
    ),
    "transposed": (at(CLIENT, transposed), f"A3 FAIL {CLIENT}/{WEIGHTS}: .*lora_A.weight has shape .*, its B"),
    "A without B": (at(CLIENT, lone), f"A3 FAIL {CLIENT}/{WEIGHTS}: .*lora_A.weight is there without its lora_B"),
    "other tensors": (at(CLIENT, rename, "h.0", "h.1"), f"A3 FAIL {CLIENT}: .* as in exchange/round-0001/broadcast"),
    "on tokens": (at(CLIENT, rename, "h.0.attn.c_attn", "wte"), f"A3 FAIL {CLIENT}/{WEIGHTS}: .*wte.* adapts tokens"),
    "no LoRA": (at(CLIENT, one_more), f"A3 FAIL {CLIENT}/{WEIGHTS}: .*c_attn.bias is no LoRA matrix"),
    "another alpha": (at(CLIENT, config, lora_alpha=99), f"A3 FAIL {CLIENT}/{CONFIG}: .* lora_alpha = 99, .* says 8"),
    "modules to save": (at(CLIENT, config, modules_to_save=["wte"]), f"A3 FAIL {CLIENT}/{CONFIG}: modules_to_save = "),
    "targets": (
        at(CLIENT, config, target_modules=["lm_head"]),
        f"A3 FAIL {CLIENT}/{CONFIG}: target_modules has lm_",
    ),
    "config unreadable": (lambda f: (f / CLIENT / CONFIG).write_text("["), f"A3 FAIL {CLIENT}: .* is not valid JSON"),
    "count": (
        at(CLIENT, sign, parameters=7),
        f"A3 FAIL {CLIENT}/{WEIGHTS}: holds 256 numbers; expected 7",
    ),
    "NaN": (at(CLIENT, change, "lora_B", with_nan), f"A4 FAIL {CLIENT}/{WEIGHTS}: .*lora_B.weight: 2 NaN of 192"),
    "untrained": (
        at(CLIENT, change, "lora_B", ZERO),
        f"A4 WARN {CLIENT}/{WEIGHTS}: every B is zero",
    ),
    "zero A": (
        at(CLIENT, change, "lora_A", ZERO),
        f"A4 WARN {CLIENT}/{WEIGHTS}: .*lora_A.weight: all 64 values",
    ),
    "turned back": (turn_back, "A5 WARN round 0002: cosine to the update before -1.00, norm ratio 4.00"),
    "copy": (copy_update, f"A6 WARN {CLIENT}: is client 1's update, byte for byte"),
    "opposed": (oppose, f"A6 WARN {CLIENT}: norm .*, to the mean of the rest -1.00; expected not against the rest"),
    "sent back": (send_back, f"A6 WARN {CLIENT}: is the broadcast, sent back"),
    "path": (at(CLIENT, config, base_model_name_or_path="/home/ann/gpt2"), f"A7 FAIL {CLIENT}/{CONFIG}: base_.* path"),
    "Windows path": (at(CLIENT, config, note="D:\\models"), f"A7 FAIL {CLIENT}/{CONFIG}: note tells an absolute path"),
    "path in a list": (
        at(CLIENT, config, target_modules=["~/x/y"]),
        f"A7 FAIL {CLIENT}/{CONFIG}: target_mod.* path",
    ),
    "path as a key": (at(CLIENT, config, **{"/root/x": 1}), f"A7 FAIL {CLIENT}/{CONFIG}: a key tells an absolute path"),
    "user": (at(CLIENT, config, by=getpass.getuser()), f"A7 FAIL {CLIENT}/{CONFIG}: by tells this user's name"),
    "host": (
        at(CLIENT, config, by=f"on {socket.gethostname()}"),
        f"A7 FAIL {CLIENT}/{CONFIG}: by tells this machine",
    ),
    "e-mail": (at(CLIENT, config, by="ann@example.org"), f"A7 FAIL {CLIENT}/{CONFIG}: by tells an e-mail address"),
    "IPv4": (at(CLIENT, config, by="from 192.0.2.7"), f"A7 WARN {CLIENT}/{CONFIG}: by holds what may be an IP address"),
    "IPv6": (at(CLIENT, config, by="2001:db8::7"), f"A7 WARN {CLIENT}/{CONFIG}: by holds what may be an IP address"),
    "UUID": (
        at(CLIENT, config, by="9f1b2c3d-0000-4000-8000-0123456789ab"),
        f"A7 WARN {CLIENT}/{CONFIG}: by holds a UUID",
    ),
    "header": (
        at(CLIENT, lambda f: put(f, tensors_of(f), by="/home/ann/x")),
        f"A7 FAIL {CLIENT}/{WEIGHTS}: __metadata__.by tells an absolute path",
    ),
    "file name": (
        lay("exchange/ann@example.org.json", "{}"),
        "A7 FAIL exchange/ann@example.org.json: its name te",
    ),
    "key": (lay("data/x.txt", "-----BEGIN OPENSSH PRIVATE KEY-----"), "A8 FAIL data/x.txt: holds a private key"),
    "key's name": (lay("private/server/id_ed25519"), "A8 FAIL private/server/id_ed25519: is named like a secret key"),
    "keys' folder": (lay("private/.fedcollm-secrets"), "A8 FAIL private: is a folder of secret keys"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damage_is_found_by_its_check_and_named(kind: str, finished: Path) -> None:
    harm, expected = DAMAGE[kind]
    harm(finished)
    before = published(finished) if kind != "named pipe" else {}
    said = problems(audit([finished]))
    assert any(re.match(expected, line) for line in said), said
    assert kind == "named pipe" or published(finished) == before


def test_where_products_are_averaged_the_drift_is_of_products(finished: Path) -> None:
    edit(finished / "fedcollm.toml", "[distillation]", '[aggregation]\ncombine = "product"\n\n[distillation]')
    averages = [finished / f"private/server/round-000{number}/aggregate" for number in (1, 2)]
    starts = [finished / f"exchange/round-000{number}/broadcast" for number in (1, 2)]
    (rank,) = {tensor.shape[0] for name, tensor in tensors_of(starts[0]).items() if "lora_A" in name}
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((rank, rank)))[0]
    change(averages[1], "lora_A", lambda a: turn.T @ a)  # BA stays as it is, A and B do not
    change(averages[1], "lora_B", lambda b: b @ turn)

    def product(folder: Path) -> np.ndarray:
        tensors = {name: tensor.astype(np.float64) for name, tensor in tensors_of(folder).items()}
        return np.concatenate([(tensors[a.replace("_A", "_B")] @ tensors[a]).ravel() for a in tensors if "_A" in a])

    first, second = (product(end) - product(start) for start, end in zip(starts, averages, strict=True))
    [told] = [one.measured for one in audit([finished]) if one.id == "A5" and one.measured]
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    assert told == pytest.approx(
        {"cosine": first @ second / (lengths[0] * lengths[1]), "norm_ratio": lengths[1] / lengths[0]}, rel=1e-4
    )


def test_every_check_has_a_damage() -> None:
    assert {expected[:2] for _, expected in DAMAGE.values()} == set(CHECKS) - {
        "A9",
        "A10",
        "A11",
        "A12",
        "A13",
    }  # tested beside


def test_a_sound_workspace_is_clean_and_every_check_says_what_it_looked_at(finished: Path) -> None:
    found = audit([finished])
    assert problems(found) == []
    assert {one.id for one in found if one.level == "OK"} == set(CHECKS) - {"A9", "A10", "A11", "A12", "A13"}
    skipped = [one.found for one in found if one.level == "SKIP"]
    assert skipped == [
        "signatures: no keys of this federation are here",
        "modes of the folder of keys: no keys on this machine",
        "plain mode: the server reads each client's update",
        "no differential privacy in this agreement",
    ]


def test_a_damage_does_not_stop_what_else_is_found(finished: Path) -> None:
    for name in (MANIFEST, CONFIG, WEIGHTS):
        (finished / CLIENT / name).write_bytes(b"\x80\x04.")
    flip(finished / "exchange/round-0002/client-3" / WEIGHTS)
    said = problems(audit([finished]))
    assert any(line.startswith(f"A1 FAIL {CLIENT}") for line in said)
    assert any(line.startswith("A2 FAIL exchange/round-0002/client-3") for line in said)


@pytest.mark.parametrize("name", [MANIFEST, CONFIG, WEIGHTS])
def test_whatever_bytes_a_file_has_the_audit_goes_to_its_end(name: str, finished: Path) -> None:
    """Bits flipped, bytes put in, files cut: each is either found, or changed nothing that is checked by digest."""
    draw = random.Random(7)
    folder = finished / CLIENT
    whole = (folder / name).read_bytes()
    for _ in range(25):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(min(len(content), 400))
            content[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(1, 4))
        (folder / name).write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        assert problems(audit([folder, finished / "exchange"]))


@pytest.mark.parametrize("depth", [100, 900, 5000])
def test_json_however_deep_is_no_end_of_the_audit(depth: int, finished: Path) -> None:
    (finished / CLIENT / "deep.json").write_text('{"a": ' * depth + '"/home/ann/x"' + "}" * depth)
    found = problems(audit([finished]))
    assert f"A2 WARN {CLIENT}/deep.json: no manifest names it" in found
    assert depth > 100 or any(line.startswith(f"A7 FAIL {CLIENT}/deep.json: a.a.a") for line in found)


def test_two_copies_of_an_exchange_that_differ_contradict_each_other(finished: Path, tmp_path: Path) -> None:
    """A server that gives each client another broadcast is found by those who lay their copies side by side."""
    copy = tmp_path / "from-client-2"
    shutil.copytree(finished / "exchange", copy)
    scale(copy / "round-0002/broadcast", 2)
    said = problems(audit([finished / "exchange", copy]))
    assert any(
        re.match(r"A1 FAIL .*from-client-2/round-0002/broadcast: contradicts exchange/round-0002/b", s) for s in said
    )
    assert not problems(audit([finished / "exchange", finished / "exchange/round-0001"]))


def test_a_client_far_longer_than_four_others_is_an_outlier(finished: Path) -> None:
    exchange, agreement = finished / "exchange/round-0001", finished / "fedcollm.toml"
    start = tensors_of(exchange / "broadcast")
    update = {name: tensor - start[name] for name, tensor in tensors_of(exchange / "client-1").items()}
    edit(agreement, "clients = 3", "clients = 5")
    for k, factor in enumerate((1.0, 1.1, 0.9, 1.2, 30.0), 1):
        if k > 3:
            shutil.copytree(exchange / "client-1", exchange / f"client-{k}")
        put(exchange / f"client-{k}", {name: start[name] + np.float32(factor) * update[name] for name in start})
        sign(exchange / f"client-{k}", client=k)
    said = [line for line in problems(audit([finished])) if line.startswith("A6")]
    # The median of the logs is log 1.1. The distances from it are 0.095, 0, 0.201, 0.087 and 3.306, their median is
    # 0.0953: 0.6745 * 3.306 / 0.0953 = 23.4
    assert len(said) == 1
    assert re.match(
        r"A6 WARN exchange/round-0001/client-5: .* z of the norm 23.4; expected z from -3.5 to 3.5", said[0]
    )


def test_an_audit_for_one_client_tells_of_that_client_alone(finished: Path) -> None:
    for client in (1, 2):
        flip(finished / f"exchange/round-0001/client-{client}" / WEIGHTS)
    said = problems(audit([finished], client=2))
    assert said
    assert all("client-2" in line for line in said)
    found = audit([finished], client=3)
    assert problems(found) == []
    assert not any("private/server" in one.where or "client-1" in one.where for one in found)


def test_a_clients_own_copy_is_clean_and_says_which_parents_are_elsewhere(finished: Path) -> None:
    shutil.rmtree(finished / "private")
    for other in (1, 3):
        for number in (1, 2):
            shutil.rmtree(finished / "exchange" / f"round-000{number}" / f"client-{other}")
    found = audit([finished])
    assert problems(found) == []
    said = {one.id: one.text for one in found if one.level == "OK"}
    assert "1 parent not on this machine: slm for round-0002/broadcast" in said["A1"]
    assert [one.found for one in found if (one.id, one.level) == ("A6", "SKIP")]


def test_the_numbers_are_those_of_linear_algebra(finished_once: Path) -> None:
    folder = finished_once / CLIENT
    [found] = [one for one in audit([folder]) if (one.id, one.level) == ("A4", "OK")]
    tensors, start = tensors_of(folder), tensors_of(folder.with_name("broadcast"))
    [a] = [tensor for name, tensor in tensors.items() if "lora_A" in name]
    [b] = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    whole = 8 / 4 * b.astype(float) @ a.astype(float)  # alpha / r
    shares = np.linalg.svd(whole, compute_uv=False)[:4] / np.linalg.svd(whole, compute_uv=False).sum()
    layer = "base_model.model.transformer.h.0.attn.c_attn"
    vector = np.concatenate([(tensors[name].astype(float) - start[name]).ravel() for name in tensors])
    expected = {
        "largest": max(np.abs(tensor).max() for tensor in tensors.values()),
        "norm": np.sqrt((a.astype(float) ** 2).sum() + (b.astype(float) ** 2).sum()),
        "update_norm": np.linalg.norm(vector),
        f"product_norm/{layer}": np.linalg.norm(whole),
        f"effective_rank/{layer}": np.exp(-(shares * np.log(shares)).sum()),
    }
    assert dict(found.measured) == pytest.approx(expected)


def test_the_numbers_are_the_same_however_small_the_pieces_are(
    finished_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured() -> list[dict[str, float]]:
        return [dict(one.measured) for one in audit([finished_once]) if one.id in ("A4", "A6")]

    whole = measured()
    for module in (check_numbers, means, updates):
        monkeypatch.setattr(module, "CACHED_NUMBERS", 7)
    assert [pytest.approx(one, rel=1e-9) for one in measured()] == whole


def test_what_tells_something_is_told_of_every_file_that_holds_it(finished: Path) -> None:
    for client in (1, 2, 3):
        config(finished / f"exchange/round-0001/client-{client}", by="/home/somebody/x", beside="nothing")
    said = [line for line in problems(audit([finished])) if line.startswith("A7")]
    assert said == [
        f"A7 FAIL exchange/round-0001/client-{client}/{CONFIG}: by tells an absolute path" for client in (1, 2, 3)
    ]


def test_the_cross_term_is_the_one_that_the_aggregate_tells(finished_once: Path) -> None:
    told = json.loads((finished_once / SERVER / MANIFEST).read_text())["metrics"]
    [found] = [one for one in audit([finished_once]) if one.where == "exchange/round-0001" and one.id == "A6"]
    layer = "base_model.model.transformer.h.0.attn.c_attn"
    assert found.measured == pytest.approx({layer: told[f"cross_term/{layer}"]})


def test_a_manifest_cannot_vouch_for_a_pickle(finished: Path) -> None:
    (finished / CLIENT / "adapter_model.bin").write_bytes(b"\x80")
    files = json.loads((finished / CLIENT / MANIFEST).read_text())["files"]
    sign(finished / CLIENT, files=files | {"adapter_model.bin": {}})
    found = problems(audit([finished]))
    assert (
        f"A2 FAIL {CLIENT}/adapter_model.bin: is named by the manifest; expected no such file in such a folder" in found
    )
