"""A10, the privacy ledger: what clients claim in public, and, where a ledger is here, that it comes to what it says.

Composing epsilon again takes opacus, and with it torch; nothing else of an audit does. Without a ledger on this
machine neither is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from stages.accounting import budget, ledger
from stages.accounting.accountant import total_epsilon
from stages.artefacts.manifest import Manifest
from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import Folder, Scope, said_by
from stages.runtime.errors import Problem, UsageProblem
from stages.workspace.privacy import Privacy

A10 = Check("A10", "privacy")

TRAINED = ("client-train", "share-knowledge", "client-distill")
"""What a client makes with its private rows, and what is made of that alone, which costs nothing more."""
TOLERANCE = 1e-3
"""Of epsilon, relative: what another version of the accountant may differ by."""


def privacy_of(scope: Scope, folders: list[Folder], client: int | None) -> Iterator[Finding]:
    """Of one workspace: the claims in its manifests, and each client's ledger that is on this machine."""
    workspace, agreement = scope.workspace, scope.agreement
    if workspace is None or agreement is None or not agreement.privacy.is_on:
        yield A10.skip("no differential privacy in this agreement" if agreement else "no agreement that can be read")
        return
    claims: dict[int, list[tuple[Folder, Manifest]]] = {}
    for folder in folders:
        if folder.manifest and folder.manifest.stage in TRAINED and folder.manifest.client:
            claims.setdefault(folder.manifest.client, []).append((folder, folder.manifest))
    for k, of_client in claims.items():
        yield from _claims(of_client, agreement.privacy, _borne_out(scope, k))
    checked = 0
    for k in workspace.clients if client is None else [client]:
        path = workspace.privacy_ledger(k)
        try:
            lines = ledger.read_ledger(path)
            known = ledger.rounds_of(lines)
            for round in budget.trained_here(workspace, k):
                if round not in known:
                    found = "knows nothing of it" if lines else "is missing"
                    yield A10.fail(scope.shown(path), found, f"what round {round}, trained here, has spent")
            for place in budget.unknown_anchors(lines, budget.anchors(workspace, k)) if lines else ():
                yield A10.fail(
                    scope.shown(path), "lacks its last lines, or is another one", f"that of {scope.shown(place)}"
                )
            if lines:
                yield from _ledger(lines, scope.shown(path), claims.get(k, []))
                checked += 1
        except UsageProblem as problem:
            yield A10.skip(f"{scope.shown(path)}: {said_by(problem)}")
        except (Problem, OSError) as problem:
            yield A10.fail(scope.shown(path), said_by(problem), "the ledger as it was written")
    made = sum(map(len, claims.values()))
    yield A10.ok(
        f"{number_of(made, 'claim')} within the budget, {number_of(checked, 'ledger')} on this machine composed"
    )


def _borne_out(scope: Scope, client: int) -> set[tuple[int, str]]:
    """The rounds and claims that the client's ledger, if it is here and sound, has a line for."""
    assert scope.workspace is not None
    try:
        entries = [line.entry for line in ledger.read_ledger(scope.workspace.privacy_ledger(client))]
    except (Problem, OSError):
        return set()
    return {(one.round, _rounded_up(one.epsilon)) for one in entries if isinstance(one, ledger.Reserved)}


def _claims(
    of_client: list[tuple[Folder, Manifest]], privacy: Privacy, borne_out: set[tuple[int, str]]
) -> Iterator[Finding]:
    """What one client says in public, round after round.

    A round that was trained again after later ones has spent more than they: where the ledger is here, it says so.
    """
    before = 0.0
    for folder, manifest in sorted(of_client, key=lambda one: one[1].round):
        claim = manifest.privacy
        if claim is None:
            yield A10.fail(folder.shown, "claims no privacy", "epsilon and delta, which the agreement asks for")
            continue
        if claim.delta != privacy.delta:
            yield A10.fail(folder.shown, f"delta {claim.delta:g}", f"{privacy.delta:g}")
        if privacy.epsilon is not None and claim.epsilon > privacy.epsilon + 1e-4:  # claims are rounded up
            yield A10.fail(folder.shown, f"epsilon {claim.epsilon:g}", f"at most {privacy.epsilon:g}")
        if claim.reset:
            yield A10.warn(folder.shown, f"epsilon {claim.epsilon:g} since a reset: what was spent before is not in it")
        elif claim.epsilon < before and (manifest.round, f"{claim.epsilon:.4f}") not in borne_out:
            found = f"epsilon {claim.epsilon:g}, after {before:g}: a round before was trained again since"
            yield A10.warn(folder.shown, f"{found}, or the ledger was begun anew and does not say so")
        before = claim.epsilon


def _ledger(lines: list[ledger.Line], shown: str, claims: list[tuple[Folder, Manifest]]) -> Iterator[Finding]:
    """Each line's epsilon composed again, and the claims that must be among them, or be of rounds before a reset."""
    written: dict[int, set[str]] = {}
    given_up: set[int] = set()
    is_reset = False
    for number, line in enumerate(lines, 1):
        if isinstance(line.entry, ledger.Reset):
            yield A10.warn(shown, f"line {number}: somebody chose to count from zero again")
            given_up, is_reset = given_up | set(line.entry.rounds), True
        if not isinstance(line.entry, ledger.Reserved):
            continue
        found = total_epsilon(ledger.charges(lines[:number]), line.entry.delta)
        if not math.isclose(found, line.entry.epsilon, rel_tol=TOLERANCE):
            yield A10.fail(
                shown, f"line {number} says epsilon {line.entry.epsilon:.4f}", f"{found:.4f}, composed again"
            )
        claimed = f"{_rounded_up(line.entry.epsilon)}{_since(is_reset)}"
        written.setdefault(line.entry.round, set()).add(claimed)
    for folder, manifest in claims:
        if (claim := manifest.privacy) is None:
            continue
        known, told = written.get(manifest.round, set()), f"{claim.epsilon:.4f}{_since(claim.reset)}"
        is_before_reset = manifest.round in given_up and not (claim.reset and known)
        if told not in known and not is_before_reset:
            yield A10.fail(folder.shown, f"claims epsilon {told}", f"{', '.join(sorted(known)) or 'none'}, by {shown}")


def _rounded_up(epsilon: float) -> str:
    """As claims are."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}"


def _since(is_reset: bool) -> str:
    return " since a reset" if is_reset else ""
