"""The commands of one party, in their order: once before the first round, and in each round, with what it carries.

From the agreement alone, for people to read: `next` finds out by itself what is to be done now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stages.workspace.agreement import Agreement
from stages.workspace.commands import Command


@dataclass(frozen=True)
class Act:
    """A command, and what it is for in a few words."""

    command: Command
    why: str


ARRIVED = Command("unpack", "FILE")


def before_rounds(agreement: Agreement, client: int | None) -> list[Act]:
    """What a party does once, after its folder was made and its rows lie there."""
    is_server = client is None
    llm = "llm" if is_server and not agreement.is_of_one_slm else None  # clients' own models are not the server's
    fetch = Command("prefetch", client=client, model=llm)
    found = [Act(fetch, "fetches the models that are not here; needs a network")]
    found.append(Act(Command("check-rows", client=client), "checks the rows, and prints none of their text"))
    if agreement.aggregation.is_hidden:
        found += _keys(client)
    if agreement.federation.server_tells:
        found.append(Act(Command("align", server=is_server, client=client), "tells how the model reads, to exchange/"))
    return found


def _keys(client: int | None) -> Iterator[Act]:
    if client is None:
        yield Act(ARRIVED, "each client's public keys, as they arrive")
        yield Act(Command("enroll"), "makes the roster and prints its fingerprint")
        yield Act(Command("pack", roster=True), "makes a file for every client")
        return
    yield Act(Command("keys", client=client), "makes keys, outside of this folder")
    yield Act(Command("pack", keys=True, client=client), "makes a file for the server")
    yield Act(ARRIVED, "the roster, which the server sends")
    yield Act(
        Command("join", client=client), "prints the roster's fingerprint: compare it with another client, by phone"
    )
    fingerprint = "FINGERPRINT"
    yield Act(Command("join", client=client, fingerprint=fingerprint), "with what the other client reads out")


def in_round(agreement: Agreement, client: int | None, round: int) -> list[Act]:
    """What a party does in a round."""
    if agreement.federation.learns_in_public:
        return list(_in_public(agreement, client, round))
    return list(_averaging(agreement, client, round))


def _averaging(agreement: Agreement, client: int | None, round: int) -> Iterator[Act]:
    """Algorithm 1, in plain, secure and encrypted mode; or a baseline where clients stay alone."""
    is_hidden, holder = agreement.aggregation.is_hidden, agreement.aggregation.key_holder
    reveals = is_hidden and client is not None and holder in (None, client)
    if client is not None:
        if agreement.broadcasts(round):
            yield Act(ARRIVED, "the server's broadcast")
        yield Act(Command("client-train", client=client, round=round), "trains on the rows here")
        if agreement.averages:
            yield Act(Command("pack", client=client, round=round), "makes a file for the server")
        if reveals:
            yield Act(ARRIVED, "what the server sends when the round is closed")
            why = "lets the server open the sum"
            why += "; prints a code: compare it with another client" if holder is None else ""
            yield Act(Command("reveal", client=client, round=round), why)
            yield Act(Command("pack", client=client, round=round), "makes a second file for the server")
        return
    if agreement.broadcasts(round):
        yield Act(Command("broadcast", round=round), "begins the round")
        yield Act(Command("pack", server=True, round=round), "makes a file for every client")
    if not agreement.averages:
        return
    yield Act(ARRIVED, "each client's update, as it arrives")
    if is_hidden:
        yield Act(
            Command("aggregate", round=round), "closes the round, and ends with 3: it waits for what clients reveal"
        )
        to = holder or 1
        whom = f"client {holder}" if holder else "client 1, and so on for each client"
        yield Act(Command("pack", server=True, round=round, to=to), f"makes a file for {whom}")
        yield Act(ARRIVED, "what clients reveal, as it arrives")
    yield Act(Command("aggregate", round=round), "averages the updates")
    if agreement.federation.distils:
        yield Act(Command("co-distill", round=round), "trains both models on the auxiliary rows")


def _in_public(agreement: Agreement, client: int | None, round: int) -> Iterator[Act]:
    """FedMKT and its baselines: what models know of public rows travels."""
    federation = agreement.federation
    begins = agreement.broadcasts(round)
    tells_now = federation.clients_tell or (federation.server_tells and round == 1)
    if client is not None:
        if begins:
            yield Act(ARRIVED, "the server's broadcast")
        yield Act(Command("client-train", client=client, round=round), "trains on the rows here")
        if federation.clients_tell:
            what = "tells what the model knows of the public rows"
            yield Act(Command("share-knowledge", client=client, round=round), what)
            yield Act(Command("pack", client=client, round=round), "makes a file for the server")
        if tells_now:
            yield Act(ARRIVED, "what the server's LLM knows")
        yield Act(Command("client-distill", client=client, round=round), "learns from it on the public rows")
        if agreement.averages:
            yield Act(Command("pack", client=client, round=round), "makes a second file for the server")
        return
    if begins:
        yield Act(Command("broadcast", round=round), "begins the round")
        yield Act(Command("pack", server=True, round=round), "makes a file for every client")
    if federation.clients_tell:
        yield Act(ARRIVED, "what each client's model knows, as it arrives")
        yield Act(Command("co-distill", round=round), "the LLM learns from it")
    if tells_now:
        yield Act(Command("share-knowledge", server=True, round=round), "tells what the LLM knows of the public rows")
        yield Act(Command("pack", server=True, round=round), "makes a file for every client")
    if agreement.averages:
        yield Act(ARRIVED, "each client's adapter, as it arrives")
        yield Act(Command("aggregate", round=round), "averages the adapters")
