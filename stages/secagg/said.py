"""What a party has said already in secure mode: its own updates and reveals in exchange/, held against its vault.

A vault that was put back from a copy has forgotten what was sent since, and would send it a second time. What lies in
exchange/ with the party's own signature remembers it.
"""

from __future__ import annotations

import os
from pathlib import Path

from stages.artefacts.lineage import check_signed
from stages.artefacts.reading import Artefact, read_artefact
from stages.parties.memory import recall
from stages.parties.names import keys_made_by
from stages.parties.party import Party
from stages.parties.roster import Roster
from stages.parties.vault import Vault
from stages.runtime.errors import Damaged, NotReady, Refused


def check_known(party: Party) -> None:
    """Raise Refused if an update or a reveal of this client is here that its vault knows nothing of."""
    workspace, whose, members, vault = party.workspace, party.name, party.members, party.keys
    if members is None:
        return
    for round in range(1, workspace.agreement.federation.rounds + 1):
        for place in (workspace.client_update(round, party.number), workspace.reveal(round, party.number)):
            found = _own(place, members, whose)
            if found and not _is_known(found, vault, round):
                message = (
                    f"{workspace.shown(place)} is {whose}'s own, of attempt {found.manifest.attempt}, and its keys "
                    "know nothing of it: they were put back from an older copy, and would tell twice what is told once"
                )
                anew = keys_made_by(whose, renew=True)
                mend = f"put the newest keys back; or, for a new federation: {anew}"
                raise Refused(message, where=place, mend=mend)


def _own(place: Path, members: Roster, party: str) -> Artefact | None:
    """A masked update or a reveal that the party has signed under this roster; None for anything else."""
    if not os.path.lexists(place):
        return None
    try:
        found = read_artefact(place, only=[])
        if found.manifest.transcript is None or found.manifest.federation_sha256 != members.sha256:
            return None
        check_signed(found, members, party)
    except (Damaged, NotReady):
        return None  # whoever reads it says what is wrong with it
    return found


def _is_known(found: Artefact, vault: Vault, round: int) -> bool:
    kept, manifest = recall(vault, round), found.manifest
    if manifest.round != round:
        return True  # carried to another place; whoever reads it refuses it
    if manifest.stage == "reveal":
        return kept is not None and kept.close_sha256 == manifest.parents.get("close")
    if kept is None or manifest.attempt > kept.attempt:
        return False
    return manifest.attempt < kept.attempt or (
        manifest.masking is not None and manifest.masking.y_sha256 == kept.y_sha256
    )
