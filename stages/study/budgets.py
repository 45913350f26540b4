"""The ledger of training: optimiser steps, examples and tokens of each party, from the manifests.

Methods are compared only where each was given as much: every client's local training is the same by all methods, its
training on public rows by all that have it, and every LLM is tuned for as many steps and examples as co-distill takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from stages.artefacts.reading import Manifests
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.workspace.commands import Command
from stages.workspace.methods import Compared
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


Kind = Literal["own", "public", "server"]
"""Training: of a client on its own rows, of a client on the public ones (FedMKT), of the LLM at the server."""


def spent(workspace: Workspace, *kinds: Kind, manifests: Manifests | None = None) -> dict[str, Spent]:
    """By party: "client-1", ..., "server". Clients that sent nothing in a round spent nothing in it.

    kinds: of training; by default all. manifests: those that this command has read.
    """
    found, manifests = dict[str, Spent](), manifests or Manifests()
    for round in range(1, workspace.agreement.federation.rounds + 1):
        for kind, party, place in _trained(workspace, round):
            if kind in (kinds or get_args(Kind)):
                manifest, _ = manifests.of(place)
                found[party] = found.get(party, Spent()) + Spent(manifest.steps, manifest.examples, manifest.tokens)
    return found


def _trained(workspace: Workspace, round: int) -> Iterator[tuple[Kind, str, Path]]:
    """Every adapter that a round's training has made: of which kind, whose, and where it is."""
    federation = workspace.agreement.federation
    for k, place in workspace.client_adapters(round).items():
        if federation.learns_in_public:
            trained = workspace.client_trained(round, k)
            _check_here(workspace, k, trained)
            yield "own", f"client-{k}", trained
        yield ("public" if federation.learns_in_public else "own"), f"client-{k}", place
    if federation.distils or federation.clients_tell:
        yield "server", "server", workspace.llm(round)


def _check_here(workspace: Workspace, k: int, trained: Path) -> None:
    """Raise UsageProblem for what a client keeps on another machine."""
    if not trained.exists() and not workspace.client_data(k).exists():
        message = f"compare needs the models of all parties in one workspace; client {k}'s are not here"
        raise UsageProblem(message, where=trained, mend=f"{Command('evaluate')} scores what a party alone has")


RunAgain = Callable[[Workspace], Command]
"""The command that makes a workspace's federation again."""


def check_equal(
    by_method: Mapping[Compared, Workspace], run_again: RunAgain, manifests: Manifests | None = None
) -> None:
    """Raise BadNumbers, naming the method and the party, unless each was given as much as by the first method.

    Clients' local training: by every method but centralized; on public rows: by every method that has it. The LLM's:
    co-distill's and centralized's, in steps and examples; its tokens depend on the rows, which are others.
    """
    manifests = manifests or Manifests()
    clients = {method: workspace for method, workspace in by_method.items() if method != "centralized"}
    _check(
        {method: spent(workspace, "own", manifests=manifests) for method, workspace in clients.items()},
        by_method,
        run_again,
    )
    public = {method: spent(workspace, "public", manifests=manifests) for method, workspace in clients.items()}
    _check({method: ledger for method, ledger in public.items() if ledger}, by_method, run_again)
    llms = {
        method: spent(workspace, "own" if method == "centralized" else "server", manifests=manifests)
        for method, workspace in by_method.items()
    }
    _check({method: _of_llm(ledger) for method, ledger in llms.items() if ledger}, by_method, run_again)


def _of_llm(ledger: Mapping[str, Spent]) -> dict[str, Spent]:
    [done] = ledger.values()
    return {"the LLM": Spent(done.steps, done.examples)}


def _check(
    ledgers: Mapping[Compared, Mapping[str, Spent]], by_method: Mapping[Compared, Workspace], run_again: RunAgain
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
