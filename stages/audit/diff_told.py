"""diff of what parties of FedMKT tell: two files of knowledge row by row and place by place, or two vocabularies.

Reads two folders, and the vocabularies that knowledge is told in; writes nothing and loads no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.artefacts.vocabulary_files import Kind, Vocabulary, parse_vocabulary
from stages.audit.checks import number_of
from stages.audit.folders import Folder, open_folder, scope_of
from stages.audit.heard import Heard, Voice, knowledge_in
from stages.distillation.knowledge import Knowledge
from stages.runtime.errors import Damaged, NotReady, UsageProblem
from stages.workspace.names import KNOWLEDGE, VOCABULARY

MOST_SHOWN = 20
"""How many tokens that only one has are shown; all are counted."""


@dataclass(frozen=True)
class KnowledgeDifference:
    """Of the rows that both tell: how many B knows better and worse, mean nats of a row's completion in each.

    only_in_a, only_in_b: rows that the other leaves out. total_variation, divergence: means over all positions, of the
    tokens that both tell and all others as one outcome, so at most the true ones; KL(A || B) in nats. None where the
    two are told in other vocabularies, at other places, or at other temperatures.
    """

    rows: int
    better: int
    worse: int
    nats_a: float | None
    nats_b: float | None
    only_in_a: int
    only_in_b: int
    total_variation: float | None
    divergence: float | None

    @property
    def as_lines(self) -> list[str]:
        """In words."""
        said = f"of {number_of(self.rows, 'row')} that both tell, B knows {self.better} better, {self.worse} worse"
        if self.nats_a is not None and self.nats_b is not None:
            said += f"; mean loss of an answer {self.nats_a:.4g} nats in A, {self.nats_b:.4g} in B"
        only = {"A": self.only_in_a, "B": self.only_in_b}
        lines = [said, *(f"{number_of(count, 'row')} only in {name}" for name, count in only.items() if count)]
        if self.total_variation is None or self.divergence is None:
            why = "the two are told in other vocabularies, at other places, or at other temperatures"
            return [*lines, f"probabilities are not compared: {why}"]
        apart = f"{self.total_variation:.4g} in total variation, {self.divergence:.4g} nats in KL(A || B)"
        return [*lines, f"probabilities are apart by {apart}: means over all positions, at least"]


@dataclass(frozen=True)
class VocabularyDifference:
    """The tokens that only one has, counted, and the first of them; and how many both have under another id."""

    tokens_a: int
    tokens_b: int
    only_in_a: int
    only_in_b: int
    shown_a: list[str]
    shown_b: list[str]
    moved: int

    @property
    def as_lines(self) -> list[str]:
        """In words."""
        lines = [f"{number_of(self.tokens_a, 'token')} in A, {self.tokens_b} in B"]
        only = {"A": (self.only_in_a, self.shown_a), "B": (self.only_in_b, self.shown_b)}
        for name, (count, shown) in only.items():
            if count:
                more = f" and {count - len(shown)} more" if count > len(shown) else ""
                lines.append(f"{number_of(count, 'token')} only in {name}: {', '.join(shown)}{more}")
        moved = "1 token has" if self.moved == 1 else f"{self.moved} tokens have"
        return [*lines, f"{moved} another id"]


def is_told(folder: Path) -> bool:
    """Whether a folder holds what a party tells, and no adapter."""
    return any((folder / name).exists() for name in (KNOWLEDGE, VOCABULARY))


def diff_told(first: Path, second: Path) -> KnowledgeDifference | VocabularyDifference:
    """Compare two such folders. Raises Damaged, or NotReady for what is not there."""
    folders = [open_folder(path.absolute(), scope_of(path)) for path in (first, second)]
    if all(VOCABULARY in folder.contents for folder in folders):
        one, other = (parse_vocabulary(folder.contents[VOCABULARY], folder.path / VOCABULARY) for folder in folders)
        return _vocabularies(one, other)
    (a, voice_a), (b, voice_b) = (_knowledge(folder) for folder in folders)
    if len(a.losses) != len(b.losses) or a.told.data_sha256 != b.told.data_sha256:
        raise Damaged("the two are of other public rows", where=second, mend="compare knowledge of the same rows")
    has_a, has_b = ~np.isnan(a.losses), ~np.isnan(b.losses)
    both = has_a & has_b
    means = [float(one.losses[both].mean()) if both.any() else None for one in (a, b)]
    variation, divergence = _distributions(a, b, voice_a, voice_b)
    return KnowledgeDifference(
        rows=int(both.sum()),
        better=int((b.losses < a.losses).sum()),
        worse=int((b.losses > a.losses).sum()),
        nats_a=means[0],
        nats_b=means[1],
        only_in_a=int((has_a & ~has_b).sum()),
        only_in_b=int((has_b & ~has_a).sum()),
        total_variation=variation,
        divergence=divergence,
    )


def _knowledge(folder: Folder) -> tuple[Knowledge, Voice]:
    mend = "name two folders of knowledge, two of vocabularies, or two adapters"
    if folder.is_adapter or VOCABULARY in folder.contents:
        raise UsageProblem("here is no knowledge, as in the other folder", where=folder.path, mend=mend)
    if KNOWLEDGE not in folder.contents or folder.manifest is None:
        raise NotReady("here is no knowledge with its manifest", where=folder.path, mend=mend)
    voice = Heard().voice_of(folder)
    if not isinstance(voice, Voice):
        message = f"the vocabulary of {folder.said.party} is {f'not sound: {voice}' if voice else 'not here'}"
        raise NotReady(message, where=folder.path, mend="put it beside round 1 of the same exchange")
    return knowledge_in(folder, voice), voice


def _distributions(a: Knowledge, b: Knowledge, one: Voice, other: Voice) -> tuple[float | None, float | None]:
    """Total variation and KL(A || B), means over positions, of the common tokens and one outcome for all others."""
    is_same = one.vocabulary_sha256 == other.vocabulary_sha256 and a.told.temperature == b.told.temperature
    if not is_same or not np.array_equal(one.cuts.positions, other.cuts.positions):
        return None, None
    count, rows = len(a.tokens), np.int64(a.told.vocabulary)
    ours, theirs = ((np.arange(count)[:, None] * rows + each.tokens).ravel() for each in (a, b))
    common, in_a, in_b = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
    k = [each.tokens.shape[1] for each in (a, b)]
    p, q = (
        np.exp(each.log_probabilities[:, :size].astype(np.float64)).ravel()[chosen]
        for each, size, chosen in ((a, k[0], in_a), (b, k[1], in_b))
    )
    place = common // rows
    rest_p, rest_q = (np.clip(1 - np.bincount(place, one, count), 0, 1) for one in (p, q))
    tiny = np.finfo(np.float64).tiny
    apart = np.abs(p - q).sum() + np.abs(rest_p - rest_q).sum()
    parts = [
        each * (np.log(np.maximum(each, tiny)) - np.log(np.maximum(by, tiny)))
        for each, by in ((p, q), (rest_p, rest_q))
    ]
    return float(apart / 2 / count), float(sum(part.sum() for part in parts) / count)


def _vocabularies(a: Vocabulary, b: Vocabulary) -> VocabularyDifference:
    has_a, has_b = a.ids, b.ids
    only_a, only_b = ([token for token in one if token not in other] for one, other in ((has_a, has_b), (has_b, has_a)))
    shown = [[repr(token)[1:] for token in only[:MOST_SHOWN]] for only in (only_a, only_b)]
    moved = sum(has_b.get(token, index) != index for token, index in has_a.items())
    size_a, size_b = (int((one.kinds != Kind.NOTHING).sum()) for one in (a, b))
    return VocabularyDifference(size_a, size_b, len(only_a), len(only_b), shown[0], shown[1], moved)
