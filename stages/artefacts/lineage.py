"""Lineage: whose an artefact is, what it was made from, and where that lies."""

from __future__ import annotations

import re
from pathlib import Path

from stages.artefacts.manifest import Manifest, Stage
from stages.artefacts.reading import LEVELS, Artefact
from stages.artefacts.sizes import check_sizes
from stages.parties import names, signatures
from stages.parties.names import SERVER
from stages.parties.party import Reader
from stages.parties.roster import Roster
from stages.runtime.errors import Refused
from stages.workspace import edits
from stages.workspace.names import (
    CLIENT,
    MANIFEST,
    round_name,
    round_of,
)
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES

EDITED = "undo the edit of fedcollm.toml, which is the same for all; only where all agreed on it, --overwrite"


def check_belongs(
    artefact: Artefact,
    *,
    by: Reader,
    stage: Stage,
    round: int,
    client: int | None = None,
) -> None:
    """Raise unless the artefact is what its place says, made under this workspace's agreement, by whom the roster says.

    Looks at its manifest and signature alone, and so can be asked before anything else is read.

    by: who is about to use it, whose roster counts.
    """
    manifest, members = artefact.manifest, by.members
    workspace = by.workspace if client is None else by.workspace.of_client(client)
    shaped = workspace.agreement if client is not None else workspace.agreement_of_all
    if members:
        check_signed(artefact, members, names.of(client))
    claims = [
        ("federation", manifest.federation, workspace.agreement.federation.name),
        ("stage", manifest.stage, stage),
        ("round", manifest.round, round),
        ("client", manifest.client, client),
        ("LoRA shape", manifest.lora, shaped.model_of(manifest.role).lora),
        ("agreement (sha256 of fedcollm.toml)", manifest.agreement_sha256, workspace.agreed_in(round)),
        ("roster (sha256 of federation.json)", manifest.federation_sha256, members.sha256 if members else None),
    ]
    for name, found, expected in claims:
        if found != expected:
            masked = f" (transcript {manifest.transcript[:16]}...)" if manifest.transcript else ""
            shown = workspace.shown(artefact.path)
            message = f"{shown} is of another {name}: {short(found)}{masked}, here it is {short(expected)}"
            mend = "take it out, and copy what belongs there"
            edited = edits.since(workspace, manifest.agreement_sha256)
            if edited and name.startswith(("federation", "agreement", "LoRA")):
                message, mend = f"{message}; edited since in fedcollm.toml: {edited}", EDITED
            elif name.startswith(("agreement", "LoRA")):
                mend = EDITED
            elif name.startswith("roster"):
                mend = "it was made before this federation enrolled, or for another: make it again with --overwrite"
            raise Refused(message, where=artefact.path / MANIFEST, mend=mend)
    mode = workspace.agreement.aggregation.mode
    if manifest.hidden_by not in (None, mode):
        message = f"{workspace.shown(artefact.path)} is of {manifest.hidden_by} mode, the agreement says {mode}"
        raise Refused(message, where=artefact.path / MANIFEST, mend="take it out, and ask who sent it")
    check_sizes(artefact, workspace)


def place_of(manifest: Manifest, workspace: Workspace | None) -> str:
    """Where a folder says it belongs, as the last names of its path: round-0005/client-2.

    What a client keeps for itself when it learns in public has its name in front: client-2/round-0005/trained. An
    adapter that is to be averaged after that names the broadcast.
    workspace: where that is known; its agreement says whether a client keeps what it trains.
    """
    round, own = round_name(manifest.round), f"client-{manifest.client}"
    if manifest.stage == "client-distill":
        is_sent = "broadcast" in manifest.parents and (workspace is None or workspace.agreement.averages)
        return f"{round}/adapter-{own}" if is_sent else f"{own}/{round}/slm"
    if manifest.stage == "client-train" and workspace and workspace.agreement.federation.learns_in_public:
        return f"{own}/{round}/trained"
    names = {"client-train": own, "reveal": f"reveal-{manifest.client}", "co-distill": manifest.role}
    names |= {"capture": f"captured-{manifest.role}"}
    names |= {"share-knowledge": manifest.party, "align": f"vocabulary-{manifest.party}"}
    return f"{round}/{names.get(manifest.stage, manifest.stage)}"


def has_attempt(manifest: Manifest) -> bool:
    """Whether a folder belongs to one attempt at its round: it was made from the broadcast that began that."""
    is_averaged = manifest.stage == "client-distill" and "broadcast" in manifest.parents
    return is_averaged or manifest.stage in ("client-train", "close", "reveal", "aggregate")


def lies_at(folder: Path, place: str) -> str:
    """As many of the last names of a folder's path as a place has, to compare with it."""
    return "/".join(folder.parts[-len(place.split("/")) :])


def own_parent(round: int) -> str:
    """How a client's adapter calls, among its parents, the one of an earlier round whose A or B is its own."""
    return f"own-{round_name(round)}"


def round_of_parent(manifest: Manifest, name: str) -> int:
    """The round that a folder's parent of this name was made in: its own, the one before, or as the name says."""
    if before := round_of(name.removeprefix("own-")):
        return before
    is_start = manifest.stage == "broadcast" or (manifest.stage == "client-train" and name != "broadcast")
    is_start |= manifest.stage == name == "aggregate"
    if name.startswith("vocabulary-"):
        return 1
    return manifest.round - (is_start or (manifest.stage in ("co-distill", "capture") and name == "llm"))


def parent_place(workspace: Workspace, manifest: Manifest, name: str) -> Path:
    """Where a folder's parent of this name lies."""
    round = round_of_parent(manifest, name)
    if found := re.fullmatch(CLIENT, name):
        return workspace.sent_by(round, int(found[1]))
    if found := re.fullmatch(f"adapter-{CLIENT}", name):
        return workspace.client_update(round, int(found[1]))
    for role in ROLES:
        if name == f"captured-{role}":
            return workspace.captured(round, role)
    if name.startswith("vocabulary-"):
        found = re.fullmatch(CLIENT, name.removeprefix("vocabulary-"))
        return workspace.vocabulary(int(found[1]) if found else None)
    if name == SERVER:
        return workspace.knowledge(workspace.told_in(round), None)
    if manifest.client is not None and name == own_parent(round):
        return workspace.client_adapter(round, manifest.client)
    if manifest.client is not None and name in ("slm", "trained"):
        place = workspace.client_adapter if name == "slm" else workspace.client_trained
        return place(round, manifest.client)
    places = {"aggregate": workspace.aggregate, "slm": workspace.slm, "llm": workspace.llm, "close": workspace.close}
    return places.get(name.removesuffix("-after"), workspace.broadcast)(round)


def check_signed(artefact: Artefact, members: Roster, party: str) -> None:
    """Raise unless this party signed the manifest as the kind of folder that it says it is."""
    where = artefact.path / MANIFEST
    signatures.check(artefact.signed, artefact.manifest.stage, members.key_of(party), where, party, levels=LEVELS)


def short(value: object) -> str:
    """A value as messages show it: of a digest, its beginning."""
    text = str(value)
    return f"{text[:16]}..." if len(text) == 64 else text
