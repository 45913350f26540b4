"""A pair of FedMKT: a client and the server, what each knows of how the other reads, and the map to learn by."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from stages.artefacts.manifest import BaseIdentity
from stages.artefacts.public_rows import of_other_rows
from stages.artefacts.receiving import received
from stages.artefacts.vocabulary_files import Vocabulary, parse_vocabulary
from stages.distillation.aligning import Align, Sides, read_map
from stages.distillation.alignment import Alignment
from stages.distillation.alignment_figures import AlignmentReport, Read
from stages.distillation.cuts import Cuts, check_cuts, parse_cuts, reads
from stages.distillation.public import Public
from stages.parties import names
from stages.parties.party import Party
from stages.runtime.events import Report
from stages.workspace.commands import Command
from stages.workspace.names import CUTS, VOCABULARY
from stages.workspace.settings import Role

MOST_ROWS = 1000
"""Public rows that an alignment is measured on, the first: some thousand answer positions are enough for a share."""


class Voice(NamedTuple):
    """What a party has told of how it reads. base: its model; sha256: of the manifest that says so."""

    vocabulary: Vocabulary
    cuts: Cuts
    base: BaseIdentity
    sha256: str


@dataclass(frozen=True)
class Pair:
    """Who learns and from whom, as both read. alignment: its teacher is the other one, its student oneself."""

    own: Voice
    other: Voice
    alignment: Alignment
    report: AlignmentReport


def aligned_by(client: int | None) -> Command:
    """The command with which a party tells how it reads."""
    return Command("align", server=True) if client is None else Command("align", client=client)


def voice_of(party: Party, client: int | None, public: Public) -> Voice:
    """What a party (None: the server) has told of how it reads these rows. Raises as received and the parsers do.

    Raises Refused where it has told of other rows.
    """
    workspace, name = party.workspace, names.of(client)
    folder = workspace.vocabulary(client)
    where = f"{aligned_by(client)}" + ("" if party.name == name else " there; then carry exchange/ here")
    missing = f"{names.said(name)} has not told its vocabulary", where
    found = received(folder, by=party, stage="align", round=1, client=client, missing=missing)
    vocabulary = parse_vocabulary(found.contents[VOCABULARY], folder / VOCABULARY)
    cuts = parse_cuts(found.contents[CUTS], folder / CUTS, vocabulary)
    if cuts.data_sha256 != public.sha256:
        raise of_other_rows(workspace, client, public.path, cuts.data_sha256, public.sha256)
    check_cuts(cuts, folder / CUTS, public.rows)
    return Voice(vocabulary, cuts, found.manifest.base, found.sha256)


def pair_with(
    party: Party,
    client: int,
    public: Public,
    report: Report,
    *,
    own: Voice | None = None,
    overwrite: bool = False,
) -> Pair:
    """The pair of the server and this client, as one of them (party) has it; its maps are made if they are not there.

    own: what the party itself has told, if that is read already. Where both are on this machine, a teacher that reaches
    little is warned of once.
    """
    here = None if party.is_server else client
    there = client if party.is_server else None
    own = own or voice_of(party, here, public)
    other = voice_of(party, there, public)
    mine: Role = "llm" if party.is_server else "slm"
    theirs: Role = "slm" if party.is_server else "llm"
    voices = {mine: own, theirs: other}
    folder = party.workspace.alignment_with(client, at=here)
    agreed = party.workspace.agreement.distillation.alignment
    is_told = party.workspace.alignment_with(client, at=there).exists() and not overwrite

    made = Align(
        party=party,
        publishes=[folder],
        log=folder.with_name(f"{folder.name}.jsonl"),
        sides=partial(_sides, voices, public),
        method=None if agreed == "best" else agreed,
        again_by=aligned_by(here).also(overwrite=True),
        whose=f"{names.said(names.client(client))}: ",
        warns=not is_told,
        by_map=party.workspace.agreement.distillation.divergence not in ("spans", "sorted"),
        overwrite=overwrite,
        done=f"already aligned with {names.said(names.of(there))}",
        report=report,
    ).take()
    return Pair(own, other, read_map(folder, theirs, {role: one.vocabulary for role, one in voices.items()}), made)


def _sides(voices: Mapping[Role, Voice], public: Public) -> Sides:
    """Both vocabularies, and the public rows as both have told to read them."""
    labelled = [row.completion is not None for row in public.rows]

    def read(role: Role) -> list[Read | None]:
        found = reads(voices[role].cuts, voices[role].vocabulary, public.rows)
        return list(itertools.islice(itertools.compress(found, labelled), MOST_ROWS))

    rows = list(itertools.islice(itertools.compress(public.rows, labelled), MOST_ROWS))
    return Sides({role: voice.vocabulary for role, voice in voices.items()}, read, rows, public.sha256)
