"""What must be agreed where the server sees the clients' sum alone, be it of masked updates or of encrypted ones."""

from __future__ import annotations

from stages.workspace.averaging import Aggregation, threshold
from stages.workspace.methods import Federation

MOST_CLIENTS = 256
"""In a sum: more of them would leave each too coarse a weight, or too little of the modulus."""


def check_hidden(aggregation: Aggregation, federation: Federation) -> None:
    """Raise ValueError for a method with nothing to hide, and for sums of too few clients to hide one of them."""
    mode, clients, method = aggregation.mode, federation.clients, federation.method
    fewest, least = (3, threshold(clients)) if aggregation.is_secure else (2, 2)
    if federation.clients_tell:
        raise ValueError(f"aggregation.mode {mode} hides what each client tells: method fedmkt compares just that")
    if not federation.averages:
        raise ValueError(f"aggregation.mode {mode} has nothing to hide: method {method} averages nothing")
    if not fewest <= clients <= MOST_CLIENTS:
        raise ValueError(f"aggregation.mode {mode} takes {fewest} to {MOST_CLIENTS} clients, here are {clients}")
    if (aggregation.min_clients or clients) < least:
        raise ValueError(f"aggregation.min_clients is below {least}, which mode {mode} needs of {clients} clients")
    if (aggregation.key_holder or 1) > clients:
        raise ValueError(f"aggregation.opener = {aggregation.opener}: there are clients 1 to {clients}")
