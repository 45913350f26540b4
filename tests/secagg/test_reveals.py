"""reveals: shares of one secret of each client, never of both, and sealed for one server and one sum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.parties import one_time_keys
from stages.runtime.errors import Damaged, Refused
from stages.secagg import reveals
from stages.workspace.averaging import threshold


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_reveal_holds_shares_of_both_secrets_of_one_client(data: st.DataObject) -> None:
    """A row's first byte is its dealer, the second its place, so that what a reveal holds can be read off."""
    count = data.draw(st.integers(3, 12))
    clients = list(range(1, count + 1))
    survivors = sorted(data.draw(st.lists(st.sampled_from(clients), min_size=threshold(count), unique=True)))
    rows = {u: np.zeros((count, 33), np.uint8) for u in survivors}
    for u, row in rows.items():
        row[:, 0], row[:, 1] = u, np.arange(count)
    found = reveals.reveal_shares(rows, client=survivors[0], clients=clients, survivors=survivors)
    missing = [v for v in clients if v not in survivors]
    assert found.shape == (len(survivors), 1 + len(missing), 33)
    selves, pairs = set(), set()
    for u, index, *_ in found.reshape(-1, 33).tolist():
        if index == 0:
            selves.add(u)
        else:
            pairs.add((u, [v for v in clients if v != u][index - 1]))
    assert selves == set(survivors)
    assert pairs == set(itertools.product(survivors, missing))


@pytest.mark.parametrize(
    ("survivors", "says"),
    [
        ([1, 2, 3], "it must have 4 of 5"),
        ([1, 2, 3, 3], "each once"),
        ([1, 2, 3, 9], "not clients of this round"),
        ([1, 2, 3, 5], "client 4's own update"),
    ],
)
def test_what_would_unmask_less_than_a_crowd_is_refused(survivors: list[int], says: str) -> None:
    rows = {u: np.zeros((5, 33), np.uint8) for u in range(1, 10)}
    with pytest.raises(Refused, match=says):
        reveals.reveal_shares(rows, client=4, clients=[1, 2, 3, 4, 5], survivors=survivors)


@pytest.mark.parametrize("change", ["cut", "longer", "bit", "client", "close", "key"])
def test_a_reveal_opens_for_its_close_client_and_server_alone(change: str) -> None:
    box, other = (one_time_keys.prekey(bytes([i]) * 32) for i in (1, 2))
    shares = np.arange(3 * 2 * 33, dtype=np.uint8).reshape(3, 2, 33)
    content = reveals.seal_reveal(shares, client=2, server=box.public_key().public_bytes_raw(), close_sha256="11" * 32)
    whole = {"client": 2, "box": box, "close_sha256": "11" * 32, "survivors": 3, "missing": 1}
    np.testing.assert_array_equal(reveals.open_reveal(content, **whole), shares)  # type: ignore[arg-type]
    changed = {
        "cut": content[:-1],
        "longer": content + b"\0",
        "bit": content[:40] + bytes([content[40] ^ 1]) + content[41:],
    }
    whole |= {"client": {"client": 3}, "close": {"close_sha256": "22" * 32}, "key": {"box": other}}.get(change, {})
    with pytest.raises(Damaged, match=f"client {whole['client']}"):
        reveals.open_reveal(changed.get(change, content), **whole)  # type: ignore[arg-type]


def test_the_same_shares_are_sealed_anew_each_time() -> None:
    server = one_time_keys.prekey(bytes(32)).public_key().public_bytes_raw()
    shares = np.zeros((3, 1, 33), np.uint8)
    made = [reveals.seal_reveal(shares, client=2, server=server, close_sha256="11" * 32) for _ in range(2)]
    assert made[0][:32] != made[1][:32]
