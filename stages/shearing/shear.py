"""shear: a smaller model from the LLM, with its tokenizer, for those who find no small one that has it.

Reads the base of [llm], and text: files, or the auxiliary data. Writes a base folder that [slm] can name, with a card;
shearing.json in it says what it was made from.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stages.artefacts.manifest import versions
from stages.bases.base_names import hub_id
from stages.export import exported
from stages.export.made_folders import Entry, already_made, digests, ours, spare_base
from stages.files import reading, writing
from stages.models import adapters
from stages.models.base_loading import load_model, load_tokenizer
from stages.models.devices import naming_memory_knobs
from stages.models.fused import fuse
from stages.models.identity import PROBE_TEXTS, tokenizer_sha256
from stages.runtime import quiet
from stages.runtime.errors import BadNumbers, NotReady, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.shearing import blocks
from stages.shearing.card import LICENCES, card, in_digits, inherited
from stages.shearing.heal import Heal, Healed
from stages.shearing.heal import heal as train
from stages.shearing.neurons import narrow, narrow_configuration, norms
from stages.shearing.perplexity import perplexity
from stages.shearing.texts import Rows, as_rows, evenly, read_auxiliary, read_texts
from stages.shearing.whole import Whole
from stages.workspace.machine import Machine
from stages.workspace.names import MODEL_CARD, SHEARING
from stages.workspace.paths import Workspace

FORMAT = "fedcollm-shear/1"
SHEARED = "the sheared model"
GENERATION = "generation_config.json"
FOLDER = "models/slm"
"""Where a sheared model goes if nothing else is said: as [slm] can name it."""

ANOTHER = "its architecture has settings for each layer that are not known here; take another model"

MEASURED_ROWS = 32
"""On how many rows of text blocks are chosen, and on how many others perplexity is measured."""


class Source(TypedDict):
    """What decides a sheared model: two that agree on it are the same."""

    format: str
    base: dict[str, Any]  # of the whole model, as a BaseIdentity, with its name on a hub
    layers: int
    neurons: NotRequired[int]  # of each MLP, where they are fewer than the whole model has
    text: str  # "files" or "auxiliary"
    text_sha256: list[str]
    length: int
    heal: Healed | None
    seed: int
    dtype: str  # in which it was computed
    card_sha256: str  # of the whole model's card, from which the licence is taken; "" without one


class Perplexity(TypedDict):
    """On text that was kept out."""

    whole: float
    cut: float
    healed: NotRequired[float]


class Shear(Source):
    """All that shearing.json says."""

    influence: list[float]  # of every block of the whole model
    kept: list[int]
    perplexity: Perplexity
    measured_on: dict[str, int]
    files: dict[str, Entry]
    versions: dict[str, str]


def shear(
    workspace: Workspace,
    *,
    layers: int,
    neurons: int | None = None,
    texts: Sequence[Path] = (),
    on_auxiliary: bool = False,
    heal: Heal | None = None,
    length: int = 256,
    folder: Path | None = None,
    overwrite: bool = False,
    report: Report = ignore,
) -> Shear:
    """Write the LLM with so many of its layers. Returns what shearing.json says.

    neurons: how many each layer's MLP keeps; None for all. texts: files on which layers are chosen and the cut is
    healed; on_auxiliary: on the auxiliary data instead, on which layers are chosen by default too. heal: None for the
    cut alone. length: tokens of a row. folder: instead of FOLDER. All that can be refused is, before a weight is read.
    """
    of_neurons = f" with {neurons} neurons each" if neurons else ""
    report(Event("stage", f"shear, {layers} of the LLM's layers{of_neurons}"))
    target = folder or workspace.local(FOLDER)
    shown = workspace.shown(target)
    ours(target, FORMAT, shown, record=SHEARING, made="sheared")  # what else is there is refused at once
    whole = Whole.of(workspace, layers, neurons)
    spare_base(target, whole.folder, shown)
    on_auxiliary = on_auxiliary or _is_on_auxiliary(workspace, texts, heal)
    text = read_auxiliary(workspace.auxiliary_data) if on_auxiliary else read_texts(texts)
    rows = as_rows(text, whole.tokenizer, min(length, whole.context))
    own_card = whole.folder / MODEL_CARD
    what: Source = {
        "format": FORMAT,
        "base": whole.identity.model_dump() | {"model": hub_id(workspace, "llm")},
        "layers": layers,
        "text": "auxiliary" if on_auxiliary else "files",
        "text_sha256": text.sha256,
        "length": min(length, whole.context),
        "heal": heal.on(len(rows.trained)) if heal else None,
        "seed": workspace.seed_for("shear", 0),
        "dtype": str(whole.compute).removeprefix("torch."),
        "card_sha256": reading.sha256(reading.read_own(own_card)) if own_card.is_file() else "",
    }
    if neurons is not None:
        what["neurons"] = neurons
    if done := already_made(target, what, shown, record=SHEARING, made="sheared", overwrite=overwrite):
        report(Event("note", "already done"))
        return cast(Shear, done)
    report(Event("note", f"{len(rows.trained)} rows of text, and {len(rows.kept_out)} that are kept out"))
    with naming_memory_knobs():
        return _make(target, whole, rows, what, machine=workspace.machine, report=report)


def _make(target: Path, whole: Whole, rows: Rows, what: Source, *, machine: Machine, report: Report) -> Shear:
    """Cut, heal and publish."""
    cut = _cut(whole, rows, what, report)
    unfinished = target.with_name(f".{target.name}.healing")
    if how := what["heal"]:
        train(
            cut.model,
            cut.whole,
            rows.trained,
            how,
            whole=whole,
            machine=machine,
            seed=what["seed"],
            folder=unfinished,
            inputs={**what, "kept": cut.kept},
            report=report,
        )
    made = _publish(target, whole, cut, what, report)
    shutil.rmtree(unfinished, ignore_errors=True)
    return made


def _is_on_auxiliary(workspace: Workspace, texts: Sequence[Path], heal: Heal | None) -> bool:
    """Whether layers are chosen on D^a, no text being named. Raises UsageProblem or NotReady where there is none."""
    if texts:
        return False
    mend = "name text with --text, or give --heal-on auxiliary"
    if heal:
        raise UsageProblem("healing needs text", mend=mend)
    if not workspace.auxiliary_data.exists():
        message = "there is no text to choose layers on: neither files nor auxiliary data"
        raise NotReady(message, where=workspace.auxiliary_data, mend="name text with --text, or `prepare` first")
    return True


@dataclass
class _Cut:
    """A model of some blocks, and what was measured on the way. whole: what it was cut from; held: rows kept out."""

    whole: Any
    model: Any
    influence: list[float]
    kept: list[int]
    perplexity: Perplexity
    held: list[list[int]]


def _cut(whole: Whole, rows: Rows, what: Source, report: Report) -> _Cut:
    """Choose the blocks, and take them out of the whole; then the neurons of what is left."""
    model, held = whole.load(), evenly(rows.kept_out, MEASURED_ROWS)
    report(Event("stage", "the influence of each block"))
    sample = evenly(rows.trained, MEASURED_ROWS)
    influence = blocks.influence(model, sample, autocast=whole.autocast, report=report)
    kept = blocks.most_influential(influence, what["layers"])
    cut = blocks.shortened(model, kept)
    if what.get("neurons"):
        report(Event("stage", "the norm of what each neuron adds"))
        found = norms(cut, sample, autocast=whole.autocast, report=report)
        narrow(cut, found, what["neurons"])
    _check_configuration(whole, cut, kept, what)
    report(Event("stage", "perplexity of the whole model and of the cut one"))
    before, after = (perplexity(one, held, autocast=whole.autocast, report=report) for one in (model, cut))
    report(Event("note", f"perplexity: whole {in_digits(before)}, cut {in_digits(after)}"))
    return _Cut(model, cut, influence, kept, {"whole": before, "cut": after}, held)


@torch.no_grad()
def _check_configuration(whole: Whole, cut: Any, kept: Sequence[int], what: Source) -> None:
    """Raise BadNumbers, before hours of healing, unless the cut configuration makes the cut model."""
    config, weight = _configuration(whole, kept, what), next(cut.parameters())
    made: Any = AutoModelForCausalLM.from_config(config, dtype=weight.dtype).to(weight.device).eval()  # type: ignore[no-untyped-call]
    fuse(made)
    loaded = made.load_state_dict(cut.state_dict(), strict=False)
    if loaded.missing_keys or loaded.unexpected_keys:
        raise BadNumbers("the cut configuration makes a model of other weights", where=whole.folder, mend=ANOTHER)
    texts = _probes(whole)
    try:
        found, expected = ([adapters.logits(one, text) for text in texts] for one in (made, cut))
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise BadNumbers(f"the cut model does not compute: {error}", where=whole.folder, mend=ANOTHER) from error
    _check_same(found, expected, whole.folder)


def _configuration(whole: Whole, kept: Sequence[int], what: Source) -> Any:
    """The whole model's, as it was published, made that of the cut one."""
    config = AutoConfig.from_pretrained(whole.folder)
    blocks.shorten(config, kept)
    if what.get("neurons"):
        narrow_configuration(config, what["neurons"])
    return config


def _probes(whole: Whole) -> list[list[int]]:
    with quiet.libraries():  # which warn of texts longer than the context; they are cut
        return [whole.tokenizer.encode(text)[: whole.context] for text in PROBE_TEXTS]


def _publish(target: Path, whole: Whole, cut: _Cut, what: Source, report: Report) -> Shear:
    """Write the model, prove that it loads as what it is, measure what was loaded, and put it in its place."""
    config, stored = _configuration(whole, cut.kept, what), exported.stored_dtype(whole.folder)
    model, cut.whole, cut.model = cut.model.float().eval(), None, None  # memory is needed
    for weight in model.parameters():
        weight.data = weight.data.to(stored).float()
    texts = _probes(whole)
    expected = [adapters.logits(model, text) for text in texts]
    with writing.publishing(target) as draft:
        exported.write_whole(draft, model, config, stored)
        exported.copy_files(draft, whole.folder, (*exported.TOKENIZER_FILES, *LICENCES, GENERATION))
        del model
        loaded = load_model(draft, SHEARED, dtype=torch.float32).to(whole.device).eval()
        _check_same([adapters.logits(loaded, text) for text in texts], expected, draft)
        if tokenizer_sha256(load_tokenizer(draft, SHEARED)) != whole.identity.tokenizer_sha256:
            raise BadNumbers("loaded back, the tokenizer is not the LLM's", where=draft, mend="upgrade transformers")
        if what["heal"]:
            report(Event("stage", "perplexity of the healed model"))
            healed = perplexity(loaded, cut.held, autocast=whole.autocast, report=report)
            cut.perplexity["healed"] = healed
            report(Event("note", f"perplexity: healed {in_digits(healed)}"))
        made: Shear = {
            **what,
            "influence": cut.influence,
            "kept": cut.kept,
            "perplexity": cut.perplexity,
            "measured_on": {"rows": len(cut.held), "length": len(cut.held[0])},
            "files": {},
            "versions": versions(),
        }
        (draft / MODEL_CARD).write_text(card(made, inherited(whole.folder), whole.name), encoding="utf-8")
        made["files"] = digests(draft)
        (draft / SHEARING).write_bytes(reading.json_bytes(made))
    return made


def _check_same(found: list[torch.Tensor], expected: list[torch.Tensor], where: Path) -> None:
    """Raise BadNumbers unless a model, made as any base is, says what the one in memory says."""
    error, scale = exported.largest_difference(found, expected), max(float(one.abs().max()) for one in expected)
    if not error <= exported.TOLERANCE[torch.float32] * scale:
        message = f"loaded back, the model's logits are off by {error:.3g}, the largest being {scale:.3g}"
        raise BadNumbers(message, where=where, mend=ANOTHER)
