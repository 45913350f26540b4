"""What a party remembers of a round beside its workspace: enough to send the same again, and nothing else."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.parties.vault import Vault
from stages.workspace.names import round_name

Hexadecimal = Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]


class Kept(BaseModel):
    """What a party remembers of a round, in its vault. From slot on, where updates are hidden.

    y_sha256: of what it sent, masked or encrypted. own_shares: uint8 [K, 33] in hexadecimal. close_sha256: of the one
    close that the server made, or that the client revealed for. reveal: the sealed bytes in hexadecimal, to be sent
    again if need be.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    attempt: Annotated[int, Field(ge=0)]
    broadcast_sha256: str
    slot: Annotated[int, Field(ge=0)] | None = None
    adapter_sha256: str | None = None
    y_sha256: str | None = None
    own_shares: Hexadecimal | None = None
    close_sha256: str | None = None
    reveal: Hexadecimal | None = None


def recall(vault: Vault, round: int) -> Kept | None:
    """What the party remembers of a round."""
    value = vault.kept(round_name(round))
    try:
        return None if value is None else Kept.model_validate(value)
    except ValidationError as error:
        raise vault.damaged(f"{round_name(round)}.json") from error


def remember(vault: Vault, round: int, kept: Kept) -> None:
    """Keep this of a round, on disk when this returns."""
    vault.keep(round_name(round), kept.model_dump())
