"""unmasking: the sum to the bit whoever vanishes, nothing beyond it, and who is named for a wrong share."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from secure_rounds import Masking, masked_round
from stages.runtime.errors import Damaged, NotReady, Refused
from stages.secagg import masking, prg, unmasking
from stages.secagg.unmasking import Opened
from stages.workspace.averaging import threshold


def unmask(made: Masking, survivors: list[int], opened: Opened) -> np.ndarray:
    return unmasking.unmask((made.masked[u].y for u in survivors), opened, made.round)


def wrong(shares: np.ndarray) -> None:
    """Change every share, in place."""
    shares[..., 0] ^= 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_sum_is_exact_to_the_bit_whoever_vanishes(data: st.DataObject) -> None:
    count = data.draw(st.integers(3, 8))
    clients = sorted(data.draw(st.lists(st.integers(1, 256), min_size=count, max_size=count, unique=True)))
    made = masked_round(clients, size=data.draw(st.integers(0, 9)), seed=data.draw(st.integers(0, 2**32)))
    some = st.lists(st.sampled_from(clients), min_size=threshold(count), unique=True)
    survivors = data.draw(some)
    revealing = data.draw(st.permutations(survivors))[: data.draw(st.integers(threshold(count), len(survivors)))]
    opened = made.open(survivors, made.reveals(survivors, revealing))
    np.testing.assert_array_equal(unmask(made, survivors, opened), made.sum(survivors))
    assert opened.wrong_shares == {}
    assert opened.warnings == []


def test_removing_one_stream_fewer_leaves_noise() -> None:
    made = masked_round([1, 2, 3, 4], size=20_000)
    survivors = [1, 2, 4]
    opened = made.open(survivors, made.reveals(survivors, survivors))
    for kept in opened.secrets:
        left = {name: secret for name, secret in opened.secrets.items() if name != kept}
        with pytest.raises(Damaged, match="checksum"):
            unmask(made, survivors, Opened(survivors, left, {}))
        total = np.sum([made.masked[u].y for u in survivors], axis=0, dtype=np.uint32)
        prg.add(total, [(key, -sign) for key, sign in unmasking.remaining_streams(
            Opened(survivors, left, {}), made.round
        )])  # fmt: skip
        noise = total[:-1] - made.sum(survivors)
        counts = np.bincount(noise.view(np.uint8), minlength=256)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < chi2.isf(1e-9, 255)


@pytest.mark.parametrize("place", [0, 3, -3, -2, -1])
def test_another_value_than_was_masked_is_damage(place: int) -> None:
    made = masked_round([1, 2, 3], size=5)
    opened = made.open([1, 2, 3], made.reveals([1, 2, 3], [1, 2, 3]))
    made.masked[2].y[place] += 1
    with pytest.raises(Damaged, match="does not hold its own checksum"):
        unmask(made, [1, 2, 3], opened)


@pytest.mark.parametrize("uploads", [[1, 2, 3], [1, 2, 3, 4, 4], [1, 2, 3, 3]])
def test_another_set_of_uploads_than_the_survivors_is_damage(uploads: list[int]) -> None:
    made = masked_round([1, 2, 3, 4], size=5)
    opened = made.open([1, 2, 3, 4], made.reveals([1, 2, 3, 4], [1, 2, 3]))
    with pytest.raises(Damaged, match="does not hold its own checksum"):
        unmask(made, uploads, opened)


def test_a_client_that_counts_itself_twice_is_damage() -> None:
    made = masked_round([1, 2, 3], size=5)
    made.encoded[2][-1] = 2
    made.masked[2] = masking.mask(made.encoded[2], made.round, client=2, secret=made.keys[2])
    opened = made.open([1, 2, 3], made.reveals([1, 2, 3], [1, 2, 3]))
    with pytest.raises(Damaged, match="checksum"):
        unmask(made, [1, 2, 3], opened)


@pytest.mark.parametrize("survivors", [[1, 2, 3], [1, 2, 3, 3], [1, 2, 3, 9]])
def test_the_server_opens_no_less_than_a_crowd(survivors: list[int]) -> None:
    made = masked_round([1, 2, 3, 4, 5], size=3)
    revealed = made.reveals([1, 2, 3, 4], [1, 2, 3, 4])
    commitments = dict.fromkeys(survivors, "")
    with pytest.raises(Refused):
        unmasking.open_secrets(
            revealed,
            made.round,
            survivors=survivors,
            commit_selves=commitments,
            commit_pairs={u: {} for u in survivors},
        )


def test_clients_that_masked_for_another_opening_are_named_in_pairs() -> None:
    made, other = masked_round([1, 2, 3, 4], size=3), masked_round([1, 2, 3, 4], size=3, opening=b"another")
    published = {u: made.masked[u].commit_pairs for u in (1, 2, 4)} | {3: other.masked[3].commit_pairs}
    assert unmasking.disagreements(published) == [(1, 3), (2, 3), (3, 4)]
    assert unmasking.disagreements({u: made.masked[u].commit_pairs for u in made.masked}) == []


def test_a_client_that_reveals_wrong_shares_is_named_and_not_needed() -> None:
    made = masked_round([1, 2, 3, 4, 5, 6], size=4)  # t = 5
    survivors = [1, 2, 3, 4, 5, 6]
    revealed = made.reveals(survivors, survivors)
    wrong(revealed[2])
    opened = made.open(survivors, revealed)
    assert opened.wrong_shares == {2: survivors}
    assert opened.warnings == ["client 2 revealed wrong shares of the secrets of clients 1, 2, 3, 4, 5, 6"]
    np.testing.assert_array_equal(unmask(made, survivors, opened), made.sum(survivors))


def test_of_one_wrong_share_either_end_is_named() -> None:
    made = masked_round([1, 2, 3, 4, 5, 6, 7], size=4)  # t = 5
    survivors = [1, 2, 3, 4, 5, 6]
    revealed = made.reveals(survivors, survivors)
    wrong(revealed[1][3, 1])
    opened = made.open(survivors, revealed)
    assert opened.wrong_shares == {1: [4]}
    assert opened.warnings == ["client 1 revealed a wrong share of client 4's secret: one of the two altered it"]
    np.testing.assert_array_equal(unmask(made, survivors, opened), made.sum(survivors))


def test_of_some_wrong_shares_either_end_may_be_to_blame() -> None:
    """Clients 3 and 4 dealt client 1 wrong shares, or it altered them: who reads the shares cannot tell."""
    made = masked_round([1, 2, 3, 4, 5, 6, 7], size=4)  # t = 5
    survivors = [1, 2, 3, 4, 5, 6]
    revealed = made.reveals(survivors, survivors)
    wrong(revealed[1][2:4])
    opened = made.open(survivors, revealed)
    assert opened.wrong_shares == {1: [3, 4]}
    assert opened.warnings == [
        "client 1 revealed wrong shares of the secrets of clients 3, 4, or these clients dealt them so"
    ]


def test_three_wrong_clients_of_sixty_four_are_found() -> None:
    """C(58, 43) sets cannot all be tried; C(55, 43) / C(58, 43) = 1.5 % of them will do."""
    made = masked_round(range(1, 65), size=3)
    survivors = list(range(1, 59))
    revealed = made.reveals(survivors, survivors)
    for bad in (1, 30, 43):
        wrong(revealed[bad])
    opened = made.open(survivors, revealed)
    assert sorted(opened.wrong_shares) == [1, 30, 43]
    np.testing.assert_array_equal(unmask(made, survivors, opened), made.sum(survivors))


def test_a_dealer_whose_shares_open_nothing_is_named() -> None:
    made = masked_round([1, 2, 3, 4, 5], size=4)
    survivors = [1, 2, 3, 4, 5]
    revealed = made.reveals(survivors, [1, 2, 3, 4])
    for i, shares in enumerate(revealed.values()):
        shares[2, 0, 5] ^= 4**i  # by Lagrange's 4, -6, 4, -1 the secret changes by ±4 ±24 ±64 ±64: never by nothing
    with pytest.raises(Damaged, match="opens what clients 3 committed to") as raised:
        made.open(survivors, revealed)
    assert (
        raised.value.mend == "`fedcollm reveal` at one of clients 5 may tell; or open the next round without client 3"
    )


def test_one_more_reveal_settles_who_was_wrong() -> None:
    made = masked_round([1, 2, 3, 4, 5], size=4)
    survivors = [1, 2, 3, 4, 5]
    revealed = made.reveals(survivors, [1, 2, 3, 4])
    wrong(revealed[4])
    with pytest.raises(Damaged, match="too many of those revealed wrong ones"):
        made.open(survivors, revealed)
    assert made.open(survivors, revealed | made.reveals(survivors, [5])).wrong_shares == {4: survivors}


def test_one_reveal_too_few_opens_nothing_and_names_who_can_help() -> None:
    made = masked_round([1, 2, 3, 4, 5], size=4)
    with pytest.raises(NotReady, match="3 of 4 reveals are there; any of clients 1, 3 can give one") as raised:
        made.open([1, 2, 3, 4, 5], made.reveals([1, 2, 3, 4, 5], [2, 4, 5]))
    assert "fedcollm reveal" in str(raised.value.mend)


def test_uploads_are_taken_one_at_a_time() -> None:
    """Memory is the sum and one upload, plus buffers, whatever the number of clients."""
    made = masked_round([1, 2, 3, 4, 5, 6], size=1_000_000)
    clients = list(made.masked)
    opened = made.open(clients, made.reveals(clients, clients))

    def uploads() -> Iterator[np.ndarray]:
        for u in clients:
            yield made.masked[u].y.copy()

    tracemalloc.start()
    total = unmasking.unmask(uploads(), opened, made.round, threads=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(total, made.sum(clients))
    assert peak < 4 * 4_000_000  # the sum, an upload and the next one, three MiB of buffers


@pytest.mark.slow
def test_a_hundred_and_twenty_eight_clients_of_whom_forty_two_vanish() -> None:
    survivors = list(range(43, 129))  # t = 86
    made = masked_round(range(1, 129), size=3, masking_clients=survivors)
    assert len(survivors) == made.round.threshold
    opened = made.open(survivors, made.reveals(survivors, survivors))
    np.testing.assert_array_equal(unmask(made, survivors, opened), made.sum(survivors))
