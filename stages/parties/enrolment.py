"""How far a party has come with keys, roster and joining."""

from __future__ import annotations

from stages.parties import roster, roster_files
from stages.parties.names import SERVER, client, number_of
from stages.parties.vault import Vault
from stages.runtime.errors import Problem, Refused
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace


def other_tasks(workspace: Workspace, *, of_exchange: bool = False) -> str:
    """That tasks/ is not what the roster names, if it is not; whatever else is wrong with a roster, `verify` says.

    of_exchange: the roster that lies in the exchange, to be joined, and not one pinned before.
    """
    try:
        roster.check_tasks(workspace, roster_files.read_federation(workspace.federation)[0] if of_exchange else None)
    except Refused as problem:
        return f"{problem.message} ({problem.mend})"
    except (Problem, OSError):
        return ""
    return ""


def enrolment(workspace: Workspace, party: str | None) -> tuple[Command | None, str]:
    """What is still to be done before the first round of secure aggregation: keys, a roster, and joining it.

    A command, or what is waited for; neither if the party, or all of them here, have joined.
    """
    here = [client(k) for k in workspace.clients if workspace.client_data(k).exists()]
    here += [SERVER] if workspace.auxiliary_data.exists() else []
    asked = [party] if party else here
    vaults = {one: Vault.find(workspace, one) for one in asked}
    for one in asked:
        if vaults[one] is None and one != SERVER:
            return Command("keys", client=number_of(one)), ""
    absent = [client(k) for k in workspace.clients if not workspace.public_keys(k).exists()]
    for one in sorted(asked, key=lambda name: name != SERVER):
        vault = vaults[one]
        if vault is not None and vault.pinned is not None:
            continue
        if one == SERVER:
            if absent:
                return None, f"exchange/keys of {', '.join(absent)}"
            return Command("enroll"), ""
        if not workspace.federation.exists():
            return None, f"the roster, exchange/federation.json, from the server's `{Command('enroll')}`"
        if others := other_tasks(workspace, of_exchange=True):
            return None, f"the tasks/ of the roster, before anybody joins: {others}"
        return None, f"a person to compare the roster's fingerprint: {Command('join', client=number_of(one))}"
    return None, ""
