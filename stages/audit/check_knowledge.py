"""A11, knowledge: what parties of FedMKT tell of the public rows is what a model can have said of those very rows.

Who teaches each row is chosen from what was told alone, so that an auditor chooses again, and counts. Where the public
rows are not here, all is looked at but what takes their texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from stages.audit.check_choices import choices_of
from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import Folder, Scope
from stages.audit.heard import Heard, Said, Voice
from stages.workspace.names import CUTS, KNOWLEDGE, VOCABULARY

A11 = Check("A11", "knowledge")

ROUNDING = 1e-6
"""Relative, of a figure that a manifest tells: sums of floats differ by as little between machines."""


def knowledge_of(folder: Folder, heard: Heard) -> Iterator[Finding]:
    """Of one folder: a vocabulary and its cuts, or knowledge."""
    if folder.manifest is None:
        return
    if VOCABULARY in folder.contents or CUTS in folder.contents:
        yield from _voice(folder, heard.voice_at(folder.path, lambda: folder))
    if KNOWLEDGE in folder.contents:
        yield from _said(folder, heard)


def _voice(folder: Folder, voice: Voice | str) -> Iterator[Finding]:
    if isinstance(voice, str):
        yield A11.fail(folder.shown, voice, "a vocabulary, and cuts by it")
        return
    manifest, cuts = folder.said, voice.cuts
    if voice.tokenizer_sha256 != manifest.base.tokenizer_sha256:
        found = f"is of another tokenizer than its manifest says: {voice.tokenizer_sha256[:16]}..."
        yield A11.fail(folder.file(VOCABULARY), found, f"{manifest.base.tokenizer_sha256[:16]}...")
    counts = {"examples": int((cuts.positions > 0).sum()), "tokens": len(cuts.ends)}
    yield from _figures(folder, {name: getattr(manifest, name) for name in counts}, counts)
    if voice.fault:
        yield A11.fail(folder.file(CUTS), voice.fault, f"cuts of {voice.beside}")


def _said(folder: Folder, heard: Heard) -> Iterator[Finding]:
    voice = heard.voice_of(folder) if folder.place else None
    if not isinstance(voice, Voice):
        why = f"is not sound: {voice}" if voice else "is not here"
        yield A11.skip(f"what {folder.said.party} has told of its vocabulary {why}", where=folder.shown)
        return
    if problem := heard.hear(folder, voice):
        yield A11.fail(folder.file(KNOWLEDGE), problem, f"what {folder.said.party}'s model can say of these rows")
        return
    said = heard.said[folder.path]
    rows, positions = said.figures["rows"], len(voice.cuts.ends)
    counts = {"examples": rows, "tokens": positions, **said.figures}
    told = {"examples": folder.said.examples, "tokens": folder.said.tokens, **folder.said.metrics}
    yield from _figures(folder, told, counts)
    measured = {**said.figures, "positions": positions, "bytes": said.size_bytes, "bytes_a_row": said.size_bytes / rows}
    text = f"{positions} positions of {rows:.0f} rows, {measured['bytes_a_row']:.0f} bytes a row"
    text += f"; mean loss of an answer {said.figures['loss']:.4g} nats"
    yield A11.ok(text, where=folder.shown, measured=measured)


def _figures(folder: Folder, told: Mapping[str, float], counted: Mapping[str, float]) -> Iterator[Finding]:
    """That a manifest tells what its files come to."""
    for name, value in counted.items():
        here = told.get(name)
        if here is None or not math.isclose(here, value, rel_tol=ROUNDING):
            yield A11.fail(folder.shown, f"tells {name} {'not' if here is None else f'{here:.10g}'}", f"{value:.10g}")


def told_in_all(scope: Scope, folders: list[Folder], heard: Heard) -> Iterator[Finding]:
    """Of one workspace or exchange: that all tell of the same rows, each by one vocabulary; and what was chosen.

    folders: those with a manifest.
    """
    federation = scope.agreement.federation if scope.agreement else None
    if federation and federation.learns_in_public and not federation.server_tells:
        yield A11.skip(f"method {federation.method} tells nobody anything: clients learn from answers alone")
        return
    voices = [folder for folder in folders if folder.said.stage == "align"]
    told = [heard.said[folder.path] for folder in folders if folder.path in heard.said]
    if not voices and not told:
        if federation and federation.server_tells:
            yield A11.skip("nothing was told yet")
        return
    yield from _same_rows(folders, heard)
    yield from _same_vocabulary(folders)
    yield from _copies(told)
    beside = sorted({one.beside for one in heard.voices.values() if isinstance(one, Voice) and one.beside})
    if not beside:
        yield A11.skip("whether cuts are those of the rows' texts: no public rows are here")
    counts = list(choices_of(A11, scope, folders, heard))
    yield from counts
    if not counts:
        yield A11.skip("the choice of teachers cannot be repeated: no model that learned from others is here")
    text = f"vocabularies of {len(voices)} parties, {number_of(len(told), 'file')} of knowledge"
    if told:
        sizes = [one.size_bytes / one.figures["rows"] for one in told]
        text += f", {' to '.join(dict.fromkeys(f'{size:.0f}' for size in (min(sizes), max(sizes))))} bytes a row"
    if chosen := sum(one.level == "OK" for one in counts):
        text += f"; for {number_of(chosen, 'model')} the choice of teachers was repeated and is the same"
    yield A11.ok(text)


def _same_rows(folders: list[Folder], heard: Heard) -> Iterator[Finding]:
    """All vocabularies here were told of one file of rows."""
    first: tuple[Folder, str] | None = None
    for folder in folders:
        voice = heard.voices.get(folder.path)
        if not isinstance(voice, Voice):
            continue
        first = first or (folder, voice.cuts.data_sha256)
        if voice.cuts.data_sha256 != first[1]:
            found = f"is of other public rows than {first[0].shown}: {voice.cuts.data_sha256[:16]}..."
            yield A11.fail(folder.file(CUTS), found, f"{first[1][:16]}...")


def _same_vocabulary(folders: list[Folder]) -> Iterator[Finding]:
    """What a party has told, in every round, is by the one vocabulary that it told."""
    first: dict[str, Folder] = {}
    for folder in folders:
        manifest = folder.said
        name = f"vocabulary-{manifest.party}"
        if manifest.stage != "share-knowledge":
            continue
        before = first.setdefault(name, folder)
        one, other = manifest.parents.get(name), before.said.parents.get(name)
        if one is None:
            yield A11.fail(folder.shown, f"does not name {name}", "the vocabulary that it is told in")
        elif one != other:
            yield A11.fail(folder.shown, f"is told in another vocabulary than {before.shown}", "one in all rounds")


def _copies(told: list[Said]) -> Iterator[Finding]:
    """Knowledge that is another party's of the same round: two models never say the same to the bit."""
    first: dict[tuple[Path, str], Folder] = {}
    for one in told:
        entry = one.folder.said.files.get(KNOWLEDGE)
        if entry is not None:
            same = first.setdefault((one.folder.path.parent, entry.sha256), one.folder)
            if same is not one.folder:
                yield A11.warn(one.folder.shown, f"is {same.said.party}'s knowledge, byte for byte", "its own")
