"""How far a party has come with keys, roster and joining."""

from __future__ import annotations

from stages.parties import roster, roster_files
from stages.parties.names import SERVER, client
from stages.parties.vault import Vault
from stages.runtime.errors import Problem, Refused
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


def enrolment(workspace: Workspace, party: str | None) -> tuple[str, str]:
    """What is still to be done before the first round of secure aggregation: keys, a roster, and joining it.

    A literal command, or what is waited for; both empty if the party, or all of them here, have joined.
    """
    here = [client(k) for k in workspace.clients if workspace.client_data(k).exists()]
    here += [SERVER] if workspace.auxiliary_data.exists() else []
    asked = [party] if party else here
    vaults = {one: Vault.find(workspace, one) for one in asked}
    for one in asked:
        if vaults[one] is None and one != SERVER:
            return f"fedcollm keys --{one.replace('-', ' ')}", ""
    absent = [client(k) for k in workspace.clients if not workspace.public_keys(k).exists()]
    for one in sorted(asked, key=lambda name: name != SERVER):
        vault = vaults[one]
        if vault is not None and vault.pinned is not None:
            continue
        if one == SERVER:
            return ("", f"exchange/keys of {', '.join(absent)}") if absent else ("fedcollm enroll", "")
        if not workspace.federation.exists():
            return "", "the roster, exchange/federation.json, from the server's `fedcollm enroll`"
        if others := other_tasks(workspace, of_exchange=True):
            return "", f"the tasks/ of the roster, before anybody joins: {others}"
        return "", f"a person to compare the roster's fingerprint: fedcollm join --{one.replace('-', ' ')}"
    return "", ""
