"""Secure mode: clients that cheat, come late or repeat themselves, and numbers that must not be sent.

The thirty faults that the protocol has an answer to are in tests/cli/test_faulty_*.py, by their numbers: here
1, 2, 13, 14, 21 to 24 and 29. A cheating party signs with its own true key.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from builders import Outcome, published, remembered
from faulty_federations import (
    AGGREGATE,
    RESULT,
    ROUND,
    SECURE,
    digest,
    make_federation,
    manifest_of,
    reveal,
    signed,
    train,
)
from stages.parties.party import Party
from stages.secagg import reveals
from stages.workspace.paths import Workspace

Fedcollm, Refused, Secure = Callable[..., Outcome], Callable[..., str], Callable[[str], Path]
Give = Callable[..., Outcome]
MANIFEST, WEIGHTS = "manifest.json", "adapter_model.safetensors"


# --- 1, 2, 29: numbers

UNSENDABLE = {
    "02 beyond the bound": (  # AdamW's first step is as long as its learning rate; 2^-6 is the next power of two
        SECURE + "max_update_value = 1e-3\n",
        r"error: the update holds 0\.01, aggregation.max_update_value allows 0\.001\n.*\n.*_value = 0\.015625",
    ),
    "29 more examples than agreed": (
        SECURE + 'weighting = "samples"\nmax_examples = 3\n',
        r"error: client 1 would train on 4 examples, aggregation.max_examples is 3",
    ),
    "29 beyond the privacy budget": (
        SECURE + "[privacy]\nnoise_multiplier = 1.0\nepsilon = 0.5\n",
        r"error: round 1 would bring client 1 to epsilon \d\.\d+, the budget is 0\.5",
    ),
}


@pytest.mark.parametrize("fault", UNSENDABLE)
def test_an_update_that_must_not_be_sent_is_told_by_its_numbers_and_nothing_is_published(
    fault: str, tmp_path: Path, base_models: Path, fedcollm: Fedcollm, give: Give
) -> None:
    settings, expected = UNSENDABLE[fault]
    folder = make_federation(tmp_path / "study", base_models, settings)
    give(folder, "broadcast", "--round", 1)
    for _ in range(2):  # it stays so
        outcome = fedcollm(*train(1), "-w", folder)
        assert outcome.code == 6, outcome.err
        assert re.search(expected, outcome.err), outcome.err
        assert "\n  in    " in outcome.err
        assert "\n  mend  " in outcome.err
        assert not (folder / ROUND / "client-1").exists()
        if fault.startswith("29"):  # before training
            assert not list(folder.glob("private/client-1/round-0001/*/"))


def test_01_a_trained_adapter_with_nan_is_named_by_its_tensor_and_kept(
    secure: Secure, refused: Refused, give: Give
) -> None:
    folder = secure("answered")
    give(folder, "broadcast", "--round", 1, "--overwrite")
    shutil.rmtree(folder / ROUND / "client-1")
    give(folder, *train(1))
    shutil.rmtree(folder / ROUND / "client-1")
    kept = folder / "private/client-1/round-0001/slm"
    tensors = safetensors.numpy.load((kept / WEIGHTS).read_bytes())
    name = sorted(tensors)[0]
    tensors[name].flat[3] = np.nan
    safetensors.numpy.save_file(tensors, kept / WEIGHTS, metadata={"format": "pt"})
    signed(kept, "client-1")
    assert f"{name} holds NaN or infinity" in refused(folder, 6, *train(1))


# --- 13, 14: another's, or another round's


def test_13_an_update_of_the_round_before_is_refused_by_both_rounds(
    secure: Secure, refused: Refused, give: Give
) -> None:
    folder = secure("revealed")
    give(folder, *AGGREGATE)
    give(folder, "broadcast", "--round", 2)
    shutil.copytree(folder / ROUND / "client-2", folder / "exchange/round-0002/client-2")
    said = refused(folder, 5, "aggregate", "--round", 2)
    transcript = manifest_of(folder / ROUND / "client-2")["transcript"]
    assert f"round-0002/client-2 is of another round: 1 (transcript {transcript[:16]}...), here it is 2" in said
    assert "take it out" in said


def test_13_an_update_of_an_earlier_attempt_is_passed_over(secure: Secure, fedcollm: Fedcollm, give: Give) -> None:
    folder = secure("answered")
    give(folder, "broadcast", "--round", 1, "--overwrite")
    outcome = fedcollm(*AGGREGATE, "-w", folder)
    assert outcome.code == 3
    assert outcome.err.count("update is of an earlier attempt at this round") == 4
    assert "round 1 has 0 of the 3 updates it needs; absent: client 1, 2, 3, 4" in outcome.err


def test_14_an_update_signed_by_another_member_is_refused_by_both_keys(secure: Secure, refused: Refused) -> None:
    folder = secure("answered")
    signed(folder / ROUND / "client-2", "client-3")
    said = refused(folder, 4, *AGGREGATE)
    keys = [digest_of_key(folder, client) for client in (3, 2)]
    assert f"manifest.json is signed with key_id '{keys[0]}'; client-2 has '{keys[1]}'" in said


def digest_of_key(folder: Path, client: int) -> str:
    public = json.loads((folder / f"exchange/keys/client-{client}.json").read_text())["ed25519"]
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[:16]


# --- 21, 22: reveals


def test_21_one_reveal_short_is_waited_for(secure: Secure, refused: Refused, give: Give) -> None:
    folder = secure("revealed")
    for client in (2, 4):
        shutil.rmtree(folder / ROUND / f"reveal-{client}")
    said = refused(folder, 3, *AGGREGATE)
    assert "round 1 waits for 1 more reveal, of client 2, 4" in said
    assert f"in    {folder / ROUND / 'reveal-2'}" in said
    assert "fedcollm reveal --client 2 --round 1" in said
    give(folder, *reveal(4))
    give(folder, *AGGREGATE)
    assert manifest_of(folder / RESULT)["unmasking"] == {"survivors": [1, 2, 3, 4], "revealed": [1, 3, 4], "count": 4}


def flip_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def swap_reveals(folder: Path) -> None:
    """Client 2 sends, under its own signature, what client 3 sealed."""
    shutil.copy(folder / ROUND / "reveal-3/reveal.bin", folder / ROUND / "reveal-2/reveal.bin")
    signed(folder / ROUND / "reveal-2", "client-2")


def garbled(folder: Path) -> None:
    """Client 2 sends shares that open for nobody."""
    path = folder / ROUND / "client-2/shares.safetensors"
    shares = safetensors.numpy.load_file(path)["s"]
    safetensors.numpy.save_file({"s": shares ^ 1}, path)
    signed(path.parent, "client-2")


BAD_REVEALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "22 corrupted": (
        lambda folder: flip_last(folder / ROUND / "reveal-2/reveal.bin"),
        "reveal.bin is not the file its manifest names",
    ),
    "22 signed by another": (lambda folder: signed(folder / ROUND / "reveal-2", "client-3"), "is signed with key_id"),
    "22 another's": (swap_reveals, "the shares that client 2 revealed do not open"),
}


@pytest.mark.parametrize("fault", BAD_REVEALS)
def test_a_reveal_that_is_not_its_clients_is_refused(fault: str, secure: Secure, refused: Refused) -> None:
    harm, expected = BAD_REVEALS[fault]
    folder = secure("revealed")
    harm(folder)
    said = refused(folder, 4, *AGGREGATE)
    assert expected in said
    assert f"in    {folder / ROUND / 'reveal-2'}" in said


def test_22_a_client_that_signs_wrong_shares_is_named_and_done_without(
    secure: Secure, secure_states: Path, tmp_path: Path, give: Give
) -> None:
    folder, honest = secure("revealed"), tmp_path / "honest"
    shutil.copytree(folder, honest, symlinks=True)
    place, closed = folder / ROUND / "reveal-2", digest(folder / ROUND / "close" / MANIFEST)
    box = Party(Workspace(folder), "server").keys.box
    shares = reveals.open_reveal(
        (place / "reveal.bin").read_bytes(), client=2, box=box, close_sha256=closed, survivors=4, missing=0
    ).copy()
    shares[:, :, 0] ^= 1  # one bit of each share
    server = box.public_key().public_bytes_raw()
    (place / "reveal.bin").write_bytes(reveals.seal_reveal(shares, client=2, server=server, close_sha256=closed))
    signed(place, "client-2")
    said = give(folder, *AGGREGATE).err
    assert "warning: client 2 revealed wrong shares of the secrets of clients 1, 2, 3, 4" in said
    give(honest, *AGGREGATE)
    assert (folder / RESULT / WEIGHTS).read_bytes() == (honest / RESULT / WEIGHTS).read_bytes()


def test_22_a_client_that_dealt_nothing_that_opens_is_named_and_the_next_attempt_does_without_it(
    secure: Secure, refused: Refused, give: Give
) -> None:
    folder = secure("answered")
    update = folder / ROUND / "client-2"
    signed(update, "client-2", masking=manifest_of(update)["masking"] | {"commit_self": "0" * 64})
    give(folder, *AGGREGATE, code=3)
    for client in (1, 3, 4):
        give(folder, *reveal(client))
    said = refused(folder, 4, *AGGREGATE)
    assert "opens what clients 2 committed to" in said
    assert "without client 2" in said


def test_22_shares_that_do_not_open_are_told_by_who_was_to_open_them(
    secure: Secure, refused: Refused, give: Give
) -> None:
    folder = secure("answered")
    garbled(folder)
    give(folder, *AGGREGATE, code=3)
    said = refused(folder, 4, *reveal(1))
    assert "the shares that client 2 sealed for 1 do not open" in said
    assert f"in    {folder / ROUND / 'close/client-1.safetensors'}" in said


# --- 23, 24: late, and again


def test_23_an_update_after_the_close_is_left_out_and_its_own_mask_is_never_opened(
    three: Path, tmp_path: Path, refused: Refused, give: Give
) -> None:
    shutil.copytree(tmp_path / "late", three / ROUND / "client-4")
    for client in (1, 2, 3):
        give(three, *reveal(client))
    said = give(three, *AGGREGATE).err
    assert "warning: client 4's update came after the close: it is left out, and stays masked" in said
    assert manifest_of(three / RESULT)["unmasking"]["survivors"] == [1, 2, 3]
    assert "leaves client 4 out" in refused(three, 5, *reveal(4))

    close = digest(three / ROUND / "close" / MANIFEST)
    for client in (1, 2, 3):
        # Of each survivor u the share of b_u and that of k_u4, and of client 4 nothing.
        reveals.open_reveal(
            (three / ROUND / f"reveal-{client}/reveal.bin").read_bytes(),
            client=client,
            box=Party(Workspace(three), "server").keys.box,
            close_sha256=close,
            survivors=3,
            missing=1,
        )


def test_24_training_again_sends_nothing_new_until_the_server_opens_the_round_again(
    secure: Secure, refused: Refused, give: Give, own_secrets: Path
) -> None:
    folder = secure("answered")
    before, kept = published(folder), remembered(own_secrets)
    assert "already sent" in give(folder, *train(2)).err
    assert (published(folder), remembered(own_secrets)) == (before, kept)

    said = refused(folder, 5, *train(2, "--overwrite"))
    assert "client 2 has sent its masked update of this opening of round 1, which cannot be replaced" in said
    assert "on the server, open the round again: fedcollm broadcast --round 1 --overwrite" in said

    first = manifest_of(folder / ROUND / "client-2")
    give(folder, "broadcast", "--round", 1, "--overwrite")
    opening = manifest_of(folder / ROUND / "broadcast")
    assert (opening["attempt"], opening["opening"]["slot"]) == (1, 1)
    give(folder, *train(2))
    second = manifest_of(folder / ROUND / "client-2")
    assert second["attempt"] == 1
    assert second["transcript"] != first["transcript"]
    assert not set(second["masking"]["commit_pairs"].values()) & set(first["masking"]["commit_pairs"].values())


def test_24_after_a_reveal_there_is_no_further_attempt_at_the_round(
    secure: Secure, refused: Refused, give: Give
) -> None:
    folder = secure("closed")
    give(folder, *reveal(1))
    give(folder, "broadcast", "--round", 1, "--overwrite")
    said = refused(folder, 5, *train(1))
    assert "this client has revealed for round 1 already; it takes no further attempt at it" in said
    assert "fedcollm broadcast --round 2" in said
    give(folder, *train(2))  # who has not revealed takes it


def test_a_round_that_cannot_be_opened_is_given_up_and_the_next_one_begins(
    secure: Callable[[str], Path], fedcollm: Callable[..., Outcome]
) -> None:
    folder = secure("closed")
    assert fedcollm(*AGGREGATE, "-w", folder).code == 3
    outcome = fedcollm(*AGGREGATE, "--keep-old", "-w", folder)
    assert outcome.code == 0
    assert "round 1 is given up: its aggregate is the broadcast's adapter" in outcome.err
    kept, start = (folder / place / "adapter_model.safetensors" for place in (RESULT, f"{ROUND}/broadcast"))
    assert kept.read_bytes() == start.read_bytes()
    assert fedcollm("broadcast", "--round", 2, "--without", 2, "-w", folder).code == 0
    assert fedcollm("client-train", "--client", 1, "--round", 2, "-w", folder).code == 0
    refused = fedcollm("client-train", "--client", 2, "--round", 2, "-w", folder)
    assert refused.code == 5
    assert "round 2 was opened without client 2" in refused.err
    assert "FAIL" not in fedcollm("audit", "-w", folder).out
    assert fedcollm("verify", "-w", folder).code == 0
