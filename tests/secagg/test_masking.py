"""masking: known answers from an independent reference, and what masked bytes look like to someone without the keys."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy.stats import chi2

import secagg_reference
from secure_rounds import masked_round, new_keys, seeded
from stages.parties import one_time_keys
from stages.runtime import errors
from stages.runtime.errors import Damaged, Refused
from stages.secagg import fixed_point, masking, reveals, shamir, unmasking
from stages.secagg.masking import Masked, Round
from stages.secagg.unmasking import Opened

FILES = sorted(path.stem for path in secagg_reference.FOLDER.glob("*.json"))


@cache
def content(name: str) -> str:
    return (secagg_reference.FOLDER / f"{name}.json").read_text()


def vector(name: str) -> dict[str, Any]:
    """A file's round; of a refusal that changes another round, the changed one."""
    found: dict[str, Any] = json.loads(content(name))
    if "of" in found:
        changed = vector(found["of"])
        *path, last = found["change"]["path"]
        place = changed
        for step in path:
            place = place[step]
        place[last] = found["change"]["value"]
        return changed | {"expect": found["expect"], "says": found["says"]}
    return found


def matrix(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(shape)


def round_of(found: dict[str, Any]) -> Round:
    transcript = one_time_keys.transcript(found["opening"].encode())
    return Round(transcript, {int(k): bytes.fromhex(client["prekey"]) for k, client in found["clients"].items()})


def mask_all(found: dict[str, Any], round: Round) -> dict[int, tuple[np.ndarray, Masked]]:
    """Every client's side, from the inputs."""
    made = {}
    for k, client in found["clients"].items():
        encoded = fixed_point.encode(
            np.frombuffer(bytes.fromhex(client["update"]), "<f4"), bound=found["bound"], clients=len(round.clients),
            examples=client["examples"], largest_examples=found["largest_examples"],
        )  # fmt: skip
        key = one_time_keys.prekey(bytes.fromhex(client["seed"]))
        draw = secagg_reference.draws(client["draws"])
        made[int(k)] = encoded, masking.mask(encoded, round, client=int(k), secret=key, draw=draw)
    return made


def open_rows(found: dict[str, Any], round: Round, client: int) -> dict[int, np.ndarray]:
    key = one_time_keys.prekey(bytes.fromhex(found["clients"][str(client)]["seed"]))
    opened = {}
    for u in set(found["survivors"]) & set(round.clients):
        sent = found["clients"][str(u)]
        row = matrix(sent["rows"][round.clients.index(client)], -1)
        opened[u] = matrix(sent["own_shares"], -1, 33) if u == client else masking.open_row(
            row, round, dealer=u, holder=client, secret=key, y_sha256=sent["y_sha256"]
        )  # fmt: skip
    return opened


def unmask(found: dict[str, Any], round: Round) -> tuple[np.ndarray, Opened]:
    """The receivers' side, from what the file says was sent."""
    survivors, server = found["survivors"], X25519PrivateKey.from_private_bytes(bytes.fromhex(found["server"]))
    sent = {u: found["clients"].get(str(u)) for u in survivors}
    opened = {}
    for w, reveal in found["reveals"].items():
        shares = reveals.reveal_shares(
            open_rows(found, round, int(w)), client=int(w), clients=round.clients, survivors=survivors
        )
        opened[int(w)] = reveals.open_reveal(
            bytes.fromhex(reveal["sealed"]), client=int(w), box=server, close_sha256=found["close_sha256"],
            survivors=len(survivors), missing=len(round.clients) - len(survivors),
        )  # fmt: skip
        if found["expect"] == "sum" and found["wrong_shares"].get(w) is None:
            sealed = reveals.seal_reveal(
                shares, client=int(w), server=server.public_key().public_bytes_raw(),
                close_sha256=found["close_sha256"], draw=secagg_reference.draws(reveal["draws"]),
            )  # fmt: skip
            assert shares.tobytes().hex() == reveal["shares"]
            assert sealed.hex() == reveal["sealed"]
    commit_pairs = {u: {int(v): text for v, text in client["commit_pairs"].items()} for u, client in sent.items()}
    for u, v in unmasking.disagreements(commit_pairs):
        raise AssertionError(f"disagreement: clients {u} and {v}")
    secrets = unmasking.open_secrets(
        opened, round, survivors=survivors, commit_pairs=commit_pairs,
        commit_selves={u: client["commit_self"] for u, client in sent.items()},
    )  # fmt: skip
    return unmasking.unmask((np.array(client["y"], "<u4") for client in sent.values()), secrets, round), secrets


def replay(found: dict[str, Any], round: Round) -> None:
    """Both sides, whatever they give."""
    mask_all(found, round)
    unmask(found, round)


def test_the_vectors_on_disk_are_what_the_reference_makes() -> None:
    made = {name: secagg_reference.text(vector) for name, vector in secagg_reference.vectors().items()}
    assert {name: content(name) for name in FILES} == made


@pytest.mark.parametrize("name", [name for name in FILES if vector(name)["expect"] == "sum"])
def test_a_round_gives_the_known_answer(name: str) -> None:
    found = vector(name)
    round = round_of(found)
    assert round.transcript.hex() == found["transcript"]
    dealt_as_drawn = "share" not in name
    for k, (encoded, masked) in mask_all(found, round).items():
        client = found["clients"][str(k)]
        assert encoded.tolist() == client["encoded"]
        assert masked.y.tolist() == client["y"]
        assert masked.y_sha256 == client["y_sha256"]
        assert masked.commit_self == client["commit_self"]
        assert {str(v): text for v, text in masked.commit_pairs.items()} == client["commit_pairs"]
        if dealt_as_drawn:
            assert [row.tobytes().hex() for row in masked.rows] == client["rows"]
            assert masked.own_shares.tobytes().hex() == client["own_shares"]
    total, opened = unmask(found, round)
    assert total.tolist() == found["sum"]
    assert opened.wrong_shares == {int(w): dealers for w, dealers in found["wrong_shares"].items()}


@pytest.mark.parametrize("name", [name for name in FILES if vector(name)["expect"] != "sum"])
def test_a_round_that_must_be_refused_is(name: str) -> None:
    found = vector(name)
    expected = getattr(errors, found["expect"], AssertionError)
    round = round_of(found)
    with pytest.raises(expected, match=found["says"]):
        replay(found, round)


def test_the_ratchet_gives_new_keys() -> None:
    seeds = [bytes(32)]
    while len(seeds) < 5:
        seeds.append(one_time_keys.next_seed(seeds[-1]))
    assert len({one_time_keys.prekey(seed).private_bytes_raw() for seed in seeds} | set(seeds)) == 10


def uniform(words: np.ndarray) -> bool:
    """Whether bytes pass a chi-square test at alpha = 1e-6. The draws are seeded: no run differs from another."""
    counts = np.bincount(words.astype("<u4").view(np.uint8), minlength=256)
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return bool(chi2.ppf(1e-6, 255) < statistic < chi2.isf(1e-6, 255))


def test_the_test_of_uniform_bytes_tells_an_update_from_noise() -> None:
    update = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * 1e-2
    assert not uniform(fixed_point.encode(update, bound=8.0, clients=3))
    assert uniform(np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32))


def masked_twice(size: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An encoded update, and its masked values of two maskings in one round."""
    round, keys = new_keys([1, 2, 3])
    update = np.random.default_rng(0).standard_normal(size).astype(np.float32) * 1e-2
    values = fixed_point.encode(update, bound=8.0, clients=3)
    first, second = (masking.mask(values, round, client=2, secret=keys[2], draw=seeded(i)).y for i in (1, 2))
    return values, first, second


def test_masked_bytes_are_uniform() -> None:
    values, first, second = masked_twice()
    assert uniform(first)
    assert uniform(second)
    assert uniform(first[:-1] - values)


def test_one_update_masked_twice_gives_unrelated_bytes() -> None:
    _, first, second = masked_twice()
    assert uniform(first - second)
    assert uniform(first ^ second)
    assert np.mean(first == second) < 1e-3


def test_masking_draws_anew_each_time() -> None:
    round, keys = new_keys([1, 2, 3])
    values = np.array([1, 2, 3, 5, 1], np.uint32)
    made = [masking.mask(values, round, client=1, secret=keys[1]) for _ in range(2)]
    assert made[0].commit_self != made[1].commit_self
    assert made[0].commit_pairs == made[1].commit_pairs  # the same round has the same pair keys
    assert not np.array_equal(made[0].y, made[1].y)
    assert not np.array_equal(made[0].rows[1], made[1].rows[1])


def test_another_opening_gives_other_pair_keys() -> None:
    one, other = (masked_round([1, 2, 3], size=3, opening=opening).masked for opening in (b"one", b"other"))
    assert all(one[u].commit_pairs[v] != other[u].commit_pairs[v] for u in one for v in one[u].commit_pairs)


def test_threads_give_the_same_bytes() -> None:
    round, keys = new_keys([1, 2, 3, 4])
    values = np.random.default_rng(0).integers(0, 2**32, 3 * 2**18 + 7, dtype=np.uint32)
    one, four = (
        masking.mask(values, round, client=2, secret=keys[2], draw=seeded(0), threads=threads).y_sha256
        for threads in (1, 4)
    )
    assert one == four


def test_the_values_stay_as_they_were() -> None:
    round, keys = new_keys([1, 2, 3])
    values = np.array([1, 2, 3, 5, 1], np.uint32)
    masking.mask(values, round, client=1, secret=keys[1])
    assert values.tolist() == [1, 2, 3, 5, 1]


def test_nobody_but_its_holder_opens_a_row() -> None:
    made = masked_round([1, 2, 3], size=3)
    sent = made.masked[1]
    for holder, secret in ((2, made.keys[3]), (3, made.keys[2]), (3, made.keys[3])):
        with pytest.raises(Damaged, match=f"client 1 sealed for {holder} do not open"):
            masking.open_row(sent.rows[1], made.round, dealer=1, holder=holder, secret=secret, y_sha256=sent.y_sha256)


def test_a_row_of_another_length_is_damage() -> None:
    made = masked_round([1, 2, 3], size=3)
    row, y_sha256 = made.masked[1].rows[1][:-33], made.masked[1].y_sha256
    with pytest.raises(Damaged, match="have 98 bytes, expected 131"):  # 16 + 3 x 33 + 16
        masking.open_row(row, made.round, dealer=1, holder=2, secret=made.keys[2], y_sha256=y_sha256)


def test_what_is_not_encoded_is_not_masked() -> None:
    round, keys = new_keys([1, 2, 3])
    with pytest.raises(ValueError, match="uint32"):
        masking.mask(np.zeros(3, np.float32), round, client=1, secret=keys[1])


def test_a_client_outside_the_round_cannot_mask() -> None:
    round, keys = new_keys([1, 2, 3])
    with pytest.raises(Refused, match="client 4's key"):
        masking.mask(np.zeros(3, np.uint32), round, client=4, secret=keys[1])


@pytest.mark.parametrize("clients", [[], [1, 2], [0, 1, 2]])
def test_a_round_without_a_crowd_is_none(clients: list[int]) -> None:
    with pytest.raises(ValueError, match="at least three clients"):
        new_keys(clients)


def test_among_two_hundred_and_fifty_six_clients_too_shares_open_what_was_committed_to() -> None:
    """Two of them mask; what the other 254 would open of one's own secret, 171 of them are enough for."""
    made = masked_round(range(1, 257), size=3, masking_clients=[1, 256])
    own = made.masked[1].own_shares  # [256, 33]: client 1's shares of its own secrets
    others = [masking.open_row(made.masked[1].rows[w - 1], made.round, dealer=1, holder=w, secret=made.keys[w],
                               y_sha256=made.masked[1].y_sha256) for w in range(2, 172)]  # fmt: skip
    shares = {1: own[0].tobytes()} | {w: row[0].tobytes() for w, row in zip(range(2, 172), others, strict=True)}
    secret = shamir.join(shares)
    assert secret is not None
    assert masking.commit_self(made.round, 1, secret) == made.masked[1].commit_self
    assert made.masked[1].commit_pairs[256] == made.masked[256].commit_pairs[1]
