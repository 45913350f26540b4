"""What parties of FedMKT have told, as an audit reads it: how each reads the public rows, and what it knows of them.

Of each file what later checks need is kept, and it is small: cuts and losses, no vocabulary and no probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stages.artefacts.vocabulary_files import parse_vocabulary
from stages.audit.folders import Folder, Scope, open_folder
from stages.data.row_files import read_rows
from stages.data.rows import Row
from stages.distillation.cuts import Cuts, check_cuts, parse_cuts
from stages.distillation.knowledge import Knowledge, Told, figures, parse_knowledge, told_by_itself
from stages.runtime.errors import Problem
from stages.workspace.names import CUTS, KNOWLEDGE, VOCABULARY, round_name


@dataclass(frozen=True)
class Voice:
    """How a party has told that it reads. rows: how many ids its vocabulary has. beside: the public rows that are here.

    fault: what its cuts do to those rows that cannot be; empty if nothing, or if none are here.
    """

    tokenizer_sha256: str
    vocabulary_sha256: str
    rows: int
    cuts: Cuts
    beside: str
    fault: str


@dataclass(frozen=True)
class Said:
    """What a party has told that it knows. losses: float64 [rows]; figures: as its manifest should tell them."""

    folder: Folder
    losses: np.ndarray
    figures: dict[str, float]
    size_bytes: int


@dataclass
class Heard:
    """All of it: by its folder, a voice or why there is none; what was told; and public rows, by their file."""

    voices: dict[Path, Voice | str] = field(default_factory=dict)
    said: dict[Path, Said] = field(default_factory=dict)
    public: dict[Path, tuple[list[Row], str] | None] = field(default_factory=dict)

    def voice_of(self, knowledge: Folder) -> Voice | str | None:
        """How the party reads that has told this, or why that is not known; None where it is not here."""
        path = knowledge.path.parents[1] / round_name(1) / f"vocabulary-{knowledge.said.party}"
        return self.voice_at(path, lambda: open_folder(path, knowledge.scope)) if path.is_dir() else None

    def voice_at(self, path: Path, opened: Callable[[], Folder]) -> Voice | str:
        """The one that was told in a folder. Each is read once."""
        if path not in self.voices:
            self.voices[path] = self._voice(opened())
        return self.voices[path]

    def _voice(self, folder: Folder) -> Voice | str:
        files = [folder.contents.get(name) for name in (VOCABULARY, CUTS)]
        vocabulary_bytes, cuts_bytes = files
        if folder.manifest is None or vocabulary_bytes is None or cuts_bytes is None:
            return "is not whole"
        try:
            vocabulary = parse_vocabulary(vocabulary_bytes, Path(VOCABULARY))
            cuts = parse_cuts(cuts_bytes, Path(CUTS), vocabulary)
        except Problem as problem:
            return problem.message
        place, fault = self._public_of(folder), ""
        if place is not None and (found := self.public[place]) is not None:
            fault = _fault(cuts, *found)
        beside = folder.scope.shown(place) if place else ""
        return Voice(vocabulary.tokenizer_sha256, vocabulary.sha256, vocabulary.rows, cuts, beside, fault)

    def _public_of(self, folder: Folder) -> Path | None:
        """The public rows on this machine, the party's own copy first; None where no sound one is here."""
        workspace = folder.scope.workspace
        if workspace is None or folder.scope.agreement is None:
            return None
        for party in (folder.said.client, None, *workspace.clients):
            path = workspace.public_data(party)
            if path not in self.public:
                try:
                    self.public[path] = read_rows(path, unlabelled=True, texts=True)
                except (Problem, OSError):  # it is not here, or A2 and the steps say what is wrong with it
                    self.public[path] = None
            if self.public[path]:
                return path
        return None

    def hear(self, folder: Folder, voice: Voice) -> str:
        """Take in what was told by this party. Returns what is wrong with it; empty if nothing is."""
        try:
            knowledge = knowledge_in(folder, voice)
        except Problem as problem:
            return problem.message
        size_bytes = len(folder.contents[KNOWLEDGE])
        self.said[folder.path] = Said(folder.closed(), knowledge.losses, figures(knowledge), size_bytes)
        return ""


def _fault(cuts: Cuts, rows: Sequence[Row], data_sha256: str) -> str:
    """What is wrong with cuts of these rows; empty if nothing is."""
    if cuts.data_sha256 != data_sha256:
        found = f"{CUTS} is of other public rows: sha256 {cuts.data_sha256[:16]}..."
        return f"{found}, here they have {data_sha256[:16]}..."
    try:
        check_cuts(cuts, Path(CUTS), rows)
    except Problem as problem:
        return problem.message
    return ""


def knowledge_in(folder: Folder, voice: Voice) -> Knowledge:
    """What a folder tells, by how its party reads. Raises as parse_knowledge does."""
    content, name = folder.contents[KNOWLEDGE], Path(KNOWLEDGE)
    expected = _expected(folder.scope, told_by_itself(content, name), voice)
    return parse_knowledge(content, name, voice.cuts, expected)


def _expected(scope: Scope, told: Told, voice: Voice) -> Told:
    """What knowledge has to say of itself: by the agreement, or where none is here, as it says."""
    agreed = scope.agreement.distillation if scope.agreement else told
    return Told(voice.cuts.data_sha256, voice.vocabulary_sha256, agreed.temperature, voice.rows, agreed.top_k)
