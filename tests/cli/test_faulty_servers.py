"""Secure mode: a server that shows clients different things is refused by name, with keys in plain mode too.

The thirty faults that the protocol has an answer to are in tests/cli/test_faulty_*.py, by their numbers: here
15 to 20. A cheating party signs with its own true key.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy

from builders import Outcome, edit
from faulty_federations import (
    AGGREGATE,
    ROUND,
    digest,
    make_states,
    manifest_of,
    reveal,
    signed,
    state,
    train,
)

Fedcollm, Refused, Secure = Callable[..., Outcome], Callable[..., str], Callable[[str], Path]
Give = Callable[..., Outcome]
MANIFEST, WEIGHTS = "manifest.json", "adapter_model.safetensors"


# --- 16, 17: a server that shows clients different rounds


def other_global(folder: Path) -> None:
    """The server signs another adapter for the same opening of the round."""
    place = folder / ROUND / "broadcast"
    tensors = safetensors.numpy.load((place / WEIGHTS).read_bytes())
    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(doubled, place / WEIGHTS, metadata={"format": "pt"})
    signed(place, "server")


def test_16_a_second_broadcast_of_a_round_is_refused_and_both_digests_are_told(
    secure: Secure, refused: Refused
) -> None:
    folder = secure("answered")
    first = digest(folder / ROUND / "broadcast" / MANIFEST)
    other_global(folder)
    second = digest(folder / ROUND / "broadcast" / MANIFEST)
    for words in (train(1), train(1, "--overwrite")):
        said = refused(folder, 5, *words)
        assert f"a second broadcast of round 1: sha256 {second}, the one taken before {first}" in said
        assert "it may be showing clients different rounds" in said


def test_17_a_client_that_was_given_another_global_is_named_before_anything_is_opened(
    secure: Secure, tmp_path: Path, refused: Refused, give: Give
) -> None:
    folder = secure("opened")
    true = shutil.copytree(folder / ROUND / "broadcast", tmp_path / "true")
    other_global(folder)
    give(folder, *train(3))
    shutil.rmtree(folder / ROUND / "broadcast")
    true.rename(folder / ROUND / "broadcast")
    for client in (1, 2, 4):
        give(folder, *train(client))
    seen = [manifest_of(folder / ROUND / f"client-{client}")["transcript"] for client in (3, 1)]
    said = refused(folder, 5, *AGGREGATE)
    assert "client 3's update was masked for another opening of round 1" in said
    assert f"(transcript {seen[0][:16]}..., here {seen[1][:16]}...)" in said
    assert not (folder / ROUND / "close").exists()


def test_17_clients_with_different_pair_keys_are_named_in_pairs(secure: Secure, refused: Refused) -> None:
    folder = secure("answered")
    update = folder / ROUND / "client-3"
    masking = manifest_of(update)["masking"]
    signed(update, "client-3", masking=masking | {"commit_pairs": dict.fromkeys(masking["commit_pairs"], "0" * 64)})
    said = refused(folder, 4, *AGGREGATE)
    assert "clients 1 and 3, 2 and 3, 3 and 4 derived different pair keys" in said
    assert "compare the sha256sum of their broadcast/manifest.json" in said
    assert not (folder / ROUND / "close").exists()


# --- 18 to 20: closes that a client does not reveal for


def close_over(folder: Path, clients: tuple[int, ...], **other: str) -> None:
    """The server signs a close over these clients; other: what it says of one of them instead of the truth."""
    updates = {f"client-{k}": folder / ROUND / f"client-{k}" for k in clients}
    closing = {name: manifest_of(update)["masking"]["y_sha256"] for name, update in updates.items()}
    parents = {name: digest(update / MANIFEST) for name, update in updates.items()}
    broadcast = digest(folder / ROUND / "broadcast" / MANIFEST)
    signed(folder / ROUND / "close", "server", closing=closing | other, parents=parents | {"broadcast": broadcast})


CLOSES: dict[str, tuple[tuple[int, ...], dict[str, str], str]] = {
    "18 too few": ((1, 2), {}, "the sum has 2 clients; it must have 3 of 4 to be unmasked"),
    "18 alone": ((1,), {}, "the sum has 1 clients; it must have 3 of 4 to be unmasked"),
    "20 another update": (
        (1, 2, 3, 4),
        {"client-1": "0" * 64},
        "the server lists another update of client 1 than the one masked here",
    ),
    "20 left out": ((2, 3, 4), {}, "the close of round 1 leaves client 1 out"),
    "20 an invented client": (
        (1, 2, 3, 4),
        {"client-5": "0" * 64},
        "the close of round 1 lists client-5, which the round does not have",
    ),
}


@pytest.mark.parametrize("fault", CLOSES)
def test_a_close_that_would_show_too_much_is_not_revealed_for(fault: str, secure: Secure, refused: Refused) -> None:
    clients, other, expected = CLOSES[fault]
    folder = secure("closed")
    close_over(folder, clients, **other)
    said = refused(folder, 5, *reveal(1))
    assert expected in said
    assert f"in    {folder / ROUND / 'close'}" in said
    assert not (folder / ROUND / "reveal-1").exists()


def test_18_the_server_closes_over_no_fewer_than_enough(secure: Secure, refused: Refused) -> None:
    folder = secure("answered")
    for client in (3, 4):
        shutil.rmtree(folder / ROUND / f"client-{client}")
    said = refused(folder, 3, *AGGREGATE)
    assert "round 1 has 2 of the 3 updates it needs; absent: client 3, 4" in said


def test_19_a_second_close_is_refused_for_ever_and_the_audit_shows_the_fork(
    three: Path, tmp_path: Path, refused: Refused, fedcollm: Fedcollm, give: Give
) -> None:
    give(three, *reveal(1))
    first = shutil.copytree(three / ROUND / "close", tmp_path / "round-0001/close")
    shutil.copytree(tmp_path / "late", three / ROUND / "client-4")
    for clients in ((1, 2, 3, 4), (1, 2, 4)):
        close_over(three, clients)
        said = refused(three, 5, *reveal(1))
        second = digest(three / ROUND / "close" / MANIFEST)
        assert f"this is a second close of round 1: sha256 {second}; client 1 revealed for {digest(first / MANIFEST)}"
        assert "reveals once for ever" in said
    outcome = fedcollm("audit", three / ROUND, tmp_path / "round-0001")
    assert outcome.code == 4
    assert re.search(r"A1  FAIL .*close: contradicts .*close: both say they are round-0001/close", outcome.out)
    assert "round-0001/reveal-1: was made from another close" in outcome.out


def test_19_the_server_itself_closes_a_round_once(three: Path, tmp_path: Path, refused: Refused, give: Give) -> None:
    first = (three / ROUND / "close").rename(tmp_path / "close")
    (tmp_path / "late").rename(three / ROUND / "client-4")
    said = refused(three, 5, *AGGREGATE)
    assert f"round 1 was closed before, by a close of sha256 {digest(first / MANIFEST)}, which is not here" in said
    shutil.copytree(first, three / ROUND / "close")
    close_over(three, (1, 2, 4))
    assert f"by a close of sha256 {digest(first / MANIFEST)}" in refused(three, 5, *AGGREGATE)
    shutil.rmtree(three / ROUND / "close")
    first.rename(three / ROUND / "close")
    assert "waits for 3 more reveals, of client 1, 2, 3" in give(three, *AGGREGATE, code=3).err


# --- a federation in plain mode that has keys


@pytest.fixture(scope="session")
def plain_states(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Path:
    place = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(place / "secrets"))
        return make_states(place, base_models, "")


UNSIGNED: dict[str, tuple[Callable[[Path], object], int, str, str]] = {
    "03 no signature": (
        lambda folder: (folder / "client-2/manifest.json.sig").unlink(),
        3,
        "aggregate --round 1",
        "manifest.json.sig is not there: manifest.json counts only with client-2's signature",
    ),
    "14 another's signature": (
        lambda folder: signed(folder / "client-2", "client-3"),
        4,
        "aggregate --round 1",
        "is signed with key_id",
    ),
    "15 edited": (
        lambda folder: edit(folder / "client-2" / MANIFEST, '"steps": 1', '"steps": 2'),
        4,
        "aggregate --round 1",
        "manifest.json is not what client-2 signed",
    ),
    "16 another broadcast": (
        lambda folder: other_global(folder.parents[1]),
        5,
        "client-train --client 2 --round 1",
        "this is a second broadcast of round 1",
    ),
    "15 broadcast without signature": (
        lambda folder: (folder / "broadcast/manifest.json.sig").unlink(),
        3,
        "client-train --client 2 --round 1",
        "manifest.json counts only with server's signature",
    ),
}


@pytest.mark.parametrize("fault", UNSIGNED)
def test_where_there_are_keys_plain_mode_takes_nothing_unsigned_either(
    fault: str, plain_states: Path, tmp_path: Path, refused: Refused
) -> None:
    harm, code, command, expected = UNSIGNED[fault]
    folder = state(plain_states, "answered", tmp_path)
    harm(folder / ROUND)
    assert expected in refused(folder, code, *command.split())
