"""The server's side: secrets from revealed shares, checked against commitments, and the masks off the sum.

Uploads are taken one at a time, so that memory does not grow with clients. Who dealt or revealed a wrong share is
named as far as it can be known.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from stages.runtime.errors import Damaged, NotReady
from stages.secagg import prg, shamir
from stages.secagg.masking import Round, checksum, commit_pair, commit_self, pair_streams, self_mask
from stages.secagg.prg import Stream
from stages.secagg.reveals import check_survivors
from stages.workspace.commands import Command

MOST_SETS = 2000
"""How many sets of revealing clients are tried where shares are wrong."""

Secret = tuple[int, int]
"""Survivor u and missing client v for k_uv; u and 0 for b_u."""


@dataclass(frozen=True)
class Opened:
    """The secrets that unmask one sum.

    secrets: 32 bytes each. wrong_shares: of each client that revealed shares which do not fit, the dealers they are
    from. One that fits no dealer, itself included, is to blame; else it may be the client or these dealers.
    """

    survivors: list[int]
    secrets: dict[Secret, bytes] = field(repr=False)
    wrong_shares: dict[int, list[int]]

    @property
    def warnings(self) -> list[str]:
        """One sentence for each client with wrong shares."""
        return [self._warning(holder, dealers) for holder, dealers in self.wrong_shares.items()]

    def _warning(self, holder: int, dealers: list[int]) -> str:
        if len(dealers) == 1:
            return f"client {holder} revealed a wrong share of client {dealers[0]}'s secret: one of the two altered it"
        message = f"client {holder} revealed wrong shares of the secrets of clients {_list(dealers)}"
        return message if set(dealers) == set(self.survivors) else f"{message}, or these clients dealt them so"


def disagreements(commit_pairs: Mapping[int, Mapping[int, str]]) -> list[tuple[int, int]]:
    """Pairs of clients that committed to different pair keys: their masks would not cancel.

    commit_pairs: what each client published for each other one.
    """
    pairs = combinations(sorted(commit_pairs), 2)
    return [(u, v) for u, v in pairs if commit_pairs[u].get(v) != commit_pairs[v].get(u)]


def open_secrets(
    reveals: Mapping[int, np.ndarray],
    round: Round,
    *,
    survivors: Sequence[int],
    commit_selves: Mapping[int, str],
    commit_pairs: Mapping[int, Mapping[int, str]],
) -> Opened:
    """The secrets behind revealed shares: by the lowest clients that are enough, by others where those do not fit.

    reveals: each revealing client's shares, uint8 [|U3|, 1+|D|, 33]. commit_selves, commit_pairs: what each survivor
    published. Raises NotReady with too few reveals, Damaged where no set of them opens a client's commitment.
    """
    check_survivors(round.clients, survivors)
    if len(reveals) < round.threshold:
        waiting = _list(set(survivors) - set(reveals))
        message = f"{len(reveals)} of {round.threshold} reveals are there; any of clients {waiting} can give one"
        raise NotReady(message, mend=f"`{Command('reveal')}` at one of those clients")
    survivors = sorted(survivors)
    closed = _shares_by_secret(reveals, survivors, [v for v in round.clients if v not in survivors])
    commitments = {(u, v): commit_pairs[u].get(v) if v else commit_selves[u] for u, v in closed}
    opened: dict[Secret, bytes] = {}
    wrong: dict[int, set[int]] = {}
    for tries, holders in enumerate(_sets(sorted(reveals), round.threshold)):
        weights = shamir.coefficients(holders)
        if tries and not any(_open(round, _first_of_each_dealer(closed), holders, weights, commitments)):
            continue  # one secret of each dealer told that these will not do either
        found = dict(_open(round, closed, holders, weights, commitments))
        opened |= found
        if tries:
            for holder, dealer in _misfits(holders, {name: closed[name] for name in found}):
                wrong.setdefault(holder, set()).add(dealer)
        closed = {name: shares for name, shares in closed.items() if name not in found}
        if not closed:
            break
    else:
        raise _unopened({u for u, _ in closed}, reveals, survivors)
    return Opened(survivors, opened, {holder: sorted(wrong[holder]) for holder in sorted(wrong)})


def unmask(uploads: Iterable[np.ndarray], opened: Opened, round: Round, *, threads: int | None = None) -> np.ndarray:
    """The exact sum of what the survivors encoded, uint32 [d+2], for `ring.decode`.

    uploads: each survivor's y, uint32 [d+3], once, in any order; taken one at a time. Raises Damaged unless the sum's
    own checksum and count hold.
    """
    total = np.zeros(0, "<u4")
    for y in uploads:
        total = y.copy() if not len(total) else np.add(total, y, out=total)
    prg.add(total, [(key, -sign) for key, sign in remaining_streams(opened, round)], threads=threads)
    values, trailer = total[:-1], int(total[-1])
    if int(values[-1]) != len(opened.survivors) or checksum(round.transcript, values) != trailer:
        message = "the unmasked sum does not hold its own checksum or count: a client or an upload is at fault"
        raise Damaged(message, mend="open the next round; which client it was cannot be told")
    return values


def remaining_streams(opened: Opened, round: Round) -> Iterator[Stream]:
    """What does not cancel in the sum of the survivors' uploads."""
    for (u, v), secret in opened.secrets.items():
        if v:
            yield from pair_streams(u, {v: secret})
        else:
            yield self_mask(round, u, secret), 1


def _shares_by_secret(
    reveals: Mapping[int, np.ndarray], survivors: Sequence[int], missing: Sequence[int]
) -> dict[Secret, dict[int, bytes]]:
    """For each secret to be opened, the share that each client revealed."""
    return {
        (u, v): {w: reveals[w][i, j].tobytes() for w in reveals}
        for i, u in enumerate(survivors)
        for j, v in enumerate((0, *missing))
    }


def _sets(holders: Sequence[int], least: int) -> Iterator[tuple[int, ...]]:
    """Sets of `least` holders to try, the lowest first: all where they are few, else some at random.

    Where b of m holders are bad, a random set has none of them with probability C(m-b, least) / C(m, least): for
    38 needed of 58, some 4 % with b = 3. In order, one bad holder could be in every set that is tried.
    """
    if math.comb(len(holders), least) <= MOST_SETS:
        yield from combinations(holders, least)
        return
    yield tuple(holders[:least])
    chance = random.Random(0)
    for _ in range(MOST_SETS - 1):
        yield tuple(sorted(chance.sample(holders, least)))


def _open(
    round: Round,
    closed: Mapping[Secret, Mapping[int, bytes]],
    holders: Sequence[int],
    weights: Sequence[int],
    commitments: Mapping[Secret, str | None],
) -> Iterator[tuple[Secret, bytes]]:
    """The secrets that these holders' shares give and that are what their dealer committed to."""
    for (u, v), shares in closed.items():
        secret = shamir.as_secret(shamir.interpolate(weights, [shares[w] for w in holders]))
        if secret is not None:
            found = commit_pair(round, u, v, secret) if v else commit_self(round, u, secret)
            if found == commitments[u, v]:
                yield (u, v), secret


def _first_of_each_dealer(closed: dict[Secret, dict[int, bytes]]) -> dict[Secret, dict[int, bytes]]:
    firsts = {u: (u, v) for u, v in reversed(closed)}
    return {name: closed[name] for name in firsts.values()}


def _misfits(holders: Sequence[int], opened: Mapping[Secret, Mapping[int, bytes]]) -> Iterator[tuple[int, int]]:
    """Who revealed a share that is not on the polynomial of holders who opened a secret; and who dealt it."""
    others = [w for w in next(iter(opened.values())) if w not in holders]
    for w in others:
        weights = shamir.coefficients(holders, at=w)
        for (u, _), shares in opened.items():
            if shamir.interpolate(weights, [shares[x] for x in holders]) != int.from_bytes(shares[w], "little"):
                yield w, u


def _unopened(dealers: Iterable[int], reveals: Mapping[int, np.ndarray], survivors: Sequence[int]) -> Damaged:
    waiting = set(survivors) - set(reveals)
    message = (
        f"no set of the reveals of clients {_list(reveals)} opens what clients {_list(dealers)} committed to: "
        "these dealt wrong shares, or too many of those revealed wrong ones"
    )
    again = f"`{Command('reveal')}` at one of clients {_list(waiting)} may tell; or " if waiting else ""
    return Damaged(message, mend=f"{again}open the next round without client {_list(dealers)}")


def _list(clients: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(clients)))
