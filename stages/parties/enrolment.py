"""How far a party has come with keys, roster and joining."""

from __future__ import annotations

import re

from stages.parties import agreed, names, roster_files
from stages.parties.party import Party, all_of
from stages.runtime.errors import Problem, Refused
from stages.workspace import listing
from stages.workspace.commands import Command
from stages.workspace.names import CLIENT
from stages.workspace.paths import Workspace


def other_tasks(workspace: Workspace, *, of_exchange: bool = False) -> str:
    """That tasks/ is not what the roster names, if it is not; whatever else is wrong with a roster, `verify` says.

    of_exchange: the roster that lies in the exchange, to be joined, and not one pinned before.
    """
    try:
        agreed.check_tasks(workspace, roster_files.read_federation(workspace.federation)[0] if of_exchange else None)
    except Refused as problem:
        return f"{problem.message} ({problem.mend})"
    except (Problem, OSError):
        return ""
    return ""


def check_is_new(party: Party) -> None:
    """Raise Refused if a party without a vault here has its keys elsewhere: new ones would replace those enrolled."""
    if party.vault is not None:
        return
    workspace, name = party.workspace, names.said(party.name)
    own = workspace.federation if party.is_server else workspace.public_keys(party.number)
    joined = [names.said(one.name) for one in all_of(workspace) if _has_joined(one)]
    if not joined and not own.exists() and not workspace.federation.exists():
        return
    arrived = "the roster has arrived" if workspace.federation.exists() else f"public keys of {name} are here"
    who = f"{', '.join(joined)} {'have' if len(joined) > 1 else 'has'} joined here" if joined else arrived
    anew = names.keys_made_by(party.name, renew=True)
    mend = f"give the command on the machine of {name}; only for a new federation: {anew}"
    raise Refused(f"{who}; the keys of {name} are on its own machine", where=own, mend=mend)


def sign_of_one_party(workspace: Workspace) -> str:
    """By what a machine shows that it is not that of all parties, in words; empty where nothing does.

    Keys of some parties and not of others; or a roster, or a round, that came from others, where no party has rows.
    """
    parties = list(all_of(workspace))
    keyed = [names.said(one.name) for one in parties if workspace.secrets_pointer(one.name).exists()]
    if keyed and len(keyed) < len(parties):
        return f"the keys of {', '.join(keyed)} are here, and not those of all"
    rows = [workspace.auxiliary_data, *map(workspace.client_data, workspace.clients)]
    if not keyed and not any(path.exists() for path in rows):
        if workspace.federation.exists():
            return "the roster of a federation is here, and nobody's keys"
        if listing.has_rounds(workspace):
            return "a round of a federation is here, and nobody's rows"
    return ""


def only_party(workspace: Workspace) -> str | None:
    """The one party that a folder was made for, by what lies in private/; None where none or several may be meant."""
    if workspace.machine.simulation is not False or not workspace.private.is_dir():
        return None
    found = [path.name for path in workspace.private.iterdir() if path.is_dir()]
    parties = [name for name in found if name == names.SERVER or re.fullmatch(CLIENT, name)]
    return parties[0] if len(parties) == 1 else None


def _has_joined(party: Party) -> bool:
    try:
        return party.pinned is not None
    except (Problem, OSError):  # whoever acts as this party says why
        return False


def _may_join(party: Party) -> bool:
    try:
        return party.vault is not None and party.pinned is None and party.workspace.federation.exists()
    except (Problem, OSError):  # whoever acts as this party says why
        return False


def enrolment(workspace: Workspace, party: str | None) -> tuple[Command | None, str]:
    """What is still to be done before the first round where updates are hidden: keys, a roster, and joining it.

    A command, or what is waited for; neither if the party, or all of them here, have joined. In plain mode, where keys
    are not needed, only whoever has keys here and a roster has to join.
    """
    here = [Party.client(workspace, k) for k in workspace.clients if workspace.client_data(k).exists()]
    here += [Party.server(workspace)] if workspace.auxiliary_data.exists() else []
    asked = [Party(workspace, party)] if party else here
    if not workspace.agreement.aggregation.is_hidden:
        asked = [one for one in asked if not one.is_server and _may_join(one)]
    if without := [one for one in asked if one.vault is None and not one.is_server]:
        return Command("keys", client=without[0].number), ""
    absent = [names.client(k) for k in workspace.clients if not workspace.public_keys(k).exists()]
    for one in sorted(asked, key=lambda one: not one.is_server):
        if one.pinned is not None:
            continue
        if one.is_server:
            if absent:
                return None, f"exchange/keys of {', '.join(absent)}"
            return Command("enroll"), ""
        if not workspace.federation.exists():
            return None, f"the roster, exchange/federation.json, from the server's `{Command('enroll')}`"
        if others := other_tasks(workspace, of_exchange=True):
            return None, f"the tasks/ of the roster, before anybody joins: {others}"
        return None, f"a person to compare the roster's fingerprint: {Command('join', client=one.number)}"
    return None, ""
