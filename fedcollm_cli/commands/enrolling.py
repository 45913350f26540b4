"""The commands that a federation with keys begins with: each client's keys, the server's roster, and joining it."""

from __future__ import annotations

from typing import Annotated

import typer

from fedcollm_cli.session import ClientOption, Session, in_workspace

RenewOption = Annotated[
    bool, typer.Option("--renew", help="Make new ones, for a new federation; those made before no longer count.")
]


@in_workspace("quiet")
def keys(
    *,
    client: ClientOption,
    renew: RenewOption = False,
    opened: Session,
) -> None:
    """Client: make the keys that sign, mask and encrypt.

    Secret keys go to the user's own data folder, outside the workspace (machine.toml's `secrets`). Writes
    exchange/keys/client-k.json and its .sig, which go to the server. Where updates are masked or encrypted there must
    be keys. In plain mode they are optional: with keys every exchanged file is signed.

    Example: fedcollm keys --client 2
    """
    from stages.parties.keys import keys as stage

    made = stage(opened.workspace, client=client, renew=renew, report=opened.console.report)
    shown = opened.workspace.shown(made.path)
    opened.console.result({"path": shown, "key_id": made.key_id}, shown)


@in_workspace("quiet")
def enroll(
    *,
    renew: RenewOption = False,
    opened: Session,
) -> None:
    """Server: make the roster of all clients.

    Reads exchange/keys/client-k.json of every client. Writes exchange/federation.json and its .sig. These and
    exchange/keys go to the clients. Prints the roster's fingerprint. Clients compare it with each other before they
    join.

    Example: fedcollm enroll
    """
    from stages.parties.enroll import enroll as stage

    found = stage(opened.workspace, renew=renew, report=opened.console.report)
    value = {"path": opened.workspace.shown(found.path), "fingerprint": found.fingerprint}
    opened.console.result(value, found.fingerprint)


@in_workspace("quiet")
def join(
    *,
    client: ClientOption,
    fingerprint: Annotated[
        str | None,
        typer.Option("--fingerprint", help="The one that another client read out: XXXX-XXXX-..., 40 letters."),
    ] = None,
    opened: Session,
) -> None:
    """Client: trust the roster from now on.

    Reads exchange/federation.json and exchange/keys. Without --fingerprint it prints the roster's fingerprint. Read it
    to another client, not to the server: a dishonest server could give each client a different roster. Writes nothing
    into the workspace.

    Example: fedcollm join --client 2 --fingerprint 3QOV-2B4K-7XDL-55AQ-ZK3T-LW6E-H2MD-Q5RA-4NVJ-OY7C
    """
    from stages.parties.join import join as stage

    found = stage(opened.workspace, client=client, fingerprint=fingerprint, report=opened.console.report)
    opened.console.result({"client": client, "fingerprint": found}, f"client {client} has joined {found}")
