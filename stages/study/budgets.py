"""The ledger of training: optimiser steps, examples and tokens of each party, from the manifests.

Methods are compared only where each was given as much: every client's local training is the same by all methods, and
every LLM is tuned for as many steps and examples as co-distill takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stages.artefacts.reading import read_manifest
from stages.runtime.errors import BadNumbers
from stages.workspace.agreement import Method
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace


@dataclass(frozen=True)
class Spent:
    """What one party's training took over all rounds; tokens are those that carried loss."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.examples} examples" + (f", {self.tokens} tokens" if self.tokens else "")

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.steps + other.steps, self.examples + other.examples, self.tokens + other.tokens)


def spent(workspace: Workspace) -> dict[str, Spent]:
    """By party: "client-1", ..., "server". Clients that sent nothing in a round spent nothing in it."""
    found: dict[str, Spent] = {}
    for round in range(1, workspace.agreement.federation.rounds + 1):
        places = {f"client-{k}": path for k, path in workspace.client_adapters(round).items()}
        places |= {"server": workspace.llm(round)} if workspace.agreement.federation.distils else {}
        for party, place in places.items():
            manifest, _ = read_manifest(place)
            found[party] = found.get(party, Spent()) + Spent(manifest.steps, manifest.examples, manifest.tokens)
    return found


RunAgain = Callable[[Workspace], Command]
"""The command that makes a workspace's federation again."""


def check_equal(by_method: Mapping[Method, Workspace], run_again: RunAgain) -> None:
    """Raise BadNumbers, naming the method and the party, unless each was given as much as by the first method.

    Clients' local training: by every method but centralized. The LLM's: co-distill's and centralized's, in steps and
    examples; its tokens depend on the rows, which are others.
    """
    ledgers = {method: spent(workspace) for method, workspace in by_method.items()}
    clients: dict[Method, dict[str, Spent]] = {
        method: {party: done for party, done in ledger.items() if party != "server"}
        for method, ledger in ledgers.items()
        if method != "centralized"
    }
    _check(clients, by_method, run_again)
    trained: dict[Method, str] = {"centralized": "client-1", "fedcollm": "server", "fedavg-aux": "server"}
    llm: dict[Method, dict[str, Spent]] = {
        method: {"the LLM": Spent(ledger[trained[method]].steps, ledger[trained[method]].examples)}
        for method, ledger in ledgers.items()
        if trained.get(method) in ledger
    }
    _check(llm, by_method, run_again)


def _check(
    ledgers: Mapping[Method, Mapping[str, Spent]], by_method: Mapping[Method, Workspace], run_again: RunAgain
) -> None:
    reference = next(iter(ledgers), None)
    for method, ledger in ledgers.items():
        assert reference is not None
        expected = ledgers[reference]
        for party in sorted(ledger.keys() | expected.keys()):
            found, wanted = ledger.get(party, Spent()), expected.get(party, Spent())
            if found != wanted:
                message = f"budgets differ: {method} gave {party} {found}; {reference} gave it {wanted}"
                lesser = by_method[method if found.examples < wanted.examples else reference]
                mend = f"{run_again(lesser)}; or leave one of them out with --methods"
                raise BadNumbers(message, where=lesser.root, mend=mend)
