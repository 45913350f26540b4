"""export: one model in the form that others load, a PEFT folder or merged weights, with a model card.

Reads the adapter that `evaluate` reads, and for the card results/ and private/split.json where they are there.
Writes exports/NAME-round-t or another folder; export.json in it says what it was made from.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from stages.artefacts.manifest import versions
from stages.artefacts.reading import Artefact
from stages.artefacts.subjects import Subject, adapter_of, subject_of
from stages.bases import base_folders
from stages.bases.base_names import hub_id, name_of
from stages.export.made_folders import Entry, already_made, digests, spare_base
from stages.export.model_card import model_card
from stages.files import reading, writing
from stages.runtime import quiet
from stages.runtime.errors import UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPORT, MODEL_CARD
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from stages.export.exported import Proof
    from stages.workspace.settings import Role

FORMAT = "fedcollm-export/1"


class Source(TypedDict):
    """What decides an export: two that agree on it are the same."""

    format: str
    federation: str
    subject: str  # slm, llm, aggregate or client-k
    round: int
    merged: bool
    adapter_sha256: str
    manifest_sha256: str
    agreement_sha256: str
    base: dict[str, Any]  # as a BaseIdentity, with its model and revision on a hub
    model_card_sha256: str


class Export(Source):
    """All that export.json says."""

    proof: Proof
    files: dict[str, Entry]  # by their paths in the folder
    versions: dict[str, str]


def export(
    workspace: Workspace,
    *,
    model: Subject = "slm",
    round: int,
    client: int | None = None,
    merged: bool = False,
    folder: Path | None = None,
    overwrite: bool = False,
    report: Report = ignore,
) -> Export:
    """Write one model as others load it. Returns what export.json says.

    model, client: as evaluate has them. merged: whole weights instead of an adapter. folder: instead of the place in
    exports/. Before it is published, the export is loaded back and proven to have the logits of base and adapter, and
    not those of the base; BadNumbers otherwise.
    """
    subject = subject_of(model, client)
    workspace = workspace if client is None else workspace.of_client(client)  # whose model it is
    report(Event("stage", f"export {subject}, round {round}{', merged' if merged else ''}"))
    adapter = adapter_of(workspace, model, round, client)
    role: Role = "llm" if subject == "llm" else "slm"
    _check_changes_something(workspace, subject, adapter)
    base_model = hub_id(workspace, role)
    revision = workspace.agreement.model_of(role).revision if base_model else None
    card = model_card(workspace, adapter, subject, merged=merged, base_model=base_model, revision=revision).encode()
    what: Source = {
        "format": FORMAT,
        "federation": adapter.manifest.federation,
        "subject": subject,
        "round": round,
        "merged": merged,
        "adapter_sha256": adapter.manifest.files[ADAPTER_WEIGHTS].sha256,
        "manifest_sha256": adapter.sha256,
        "agreement_sha256": workspace.agreement_sha256,
        "base": adapter.manifest.base.model_dump() | {"model": base_model, "revision": revision},
        "model_card_sha256": reading.sha256(card),
    }
    target = folder or workspace.export(round, subject, merged=merged)
    shown = workspace.shown(target)
    if base := base_folders.configuration(workspace, role):
        spare_base(target, base, shown)
    if done := already_made(target, what, shown, record=EXPORT, made="exported", overwrite=overwrite):
        report(Event("note", "already done"))
        _tell_loss(done["proof"], report)
        return cast(Export, done)
    with writing.publishing(target) as draft:
        if not merged:
            _write_adapter(draft, adapter, base_model, revision)
        with quiet.libraries():
            proof = _write_and_prove(draft, workspace, role, adapter, merged=merged)
        (draft / MODEL_CARD).write_bytes(card)
        made: Export = {**what, "proof": proof, "files": digests(draft), "versions": versions()}
        (draft / EXPORT).write_bytes(reading.json_bytes(made))
    words = f"off by {proof['error']:.2g} at most, where the adapter moves them by {proof['change']:.2g}"
    if base_model is None:
        report(Event("note", f"its base has no name that others know: it was tuned on {name_of(workspace, role)}"))
    report(Event("note", f"loaded back, its logits are those of base and adapter: {words}"))
    _tell_loss(proof, report)
    return made


def _check_changes_something(workspace: Workspace, subject: str, adapter: Artefact) -> None:
    """Raise UsageProblem for the server's SLM where every B is a client's own."""
    if subject in ("slm", "aggregate") and workspace.agreement.server_has_no_b:
        message = "the server's SLM is its base: with personal B and no training at the server, every B is a client's"
        mend = Command("export", client=1, round=adapter.manifest.round)
        raise UsageProblem(message, where=adapter.path, mend=mend)


def _tell_loss(proof: Proof, report: Report) -> None:
    from stages.export import exported

    if lost := exported.loss(proof):
        report(Event("warning", lost))


def _write_adapter(draft: Path, adapter: Artefact, base_model: str | None, revision: str | None) -> None:
    """The exchanged files, the base named where it has a name; the weights byte for byte, if they stand on nothing."""
    from stages.export.one_adapter import one_adapter

    config, weights = one_adapter(adapter)
    config |= {"base_model_name_or_path": base_model, "revision": revision}
    (draft / ADAPTER_CONFIG).write_bytes(reading.json_bytes(config))
    (draft / ADAPTER_WEIGHTS).write_bytes(weights)


def _write_and_prove(draft: Path, workspace: Workspace, role: Role, adapter: Artefact, *, merged: bool) -> Proof:
    """Write merged weights, or take the adapter that was written; then load the draft back.

    In float32 whatever the settings say; of the two models that are compared only one is in memory at a time.
    """
    import torch

    from stages.export import exported
    from stages.models import quantization
    from stages.models.devices import naming_memory_knobs
    from stages.models.loading import Models

    settings = workspace.agreement.model_of(role)
    in_float32 = dataclasses.replace(workspace, flags=workspace.flags.model_copy(update={"dtype": "float32"}))
    with naming_memory_knobs("export on a machine with more memory, or with --device cpu: it computes in float32"):
        models = Models(in_float32)
        device = models.device
        tuned = models.with_adapter(role, adapter)
        base = Path(tuned.tokenizer.name_or_path)
        tokenizer = tuned.tokenizer
        tuned = exported.in_full(tuned, settings) if merged else tuned
        expected = exported.reference(tuned)
        if merged:
            exported.write_merged(draft, tuned, base)
            exported.copy_tokenizer(draft, base, tokenizer)
        del models, tuned
        gc.collect()  # modules refer to each other in circles
        quantized = quantization.loading(role, settings.quantization, torch.float32, device)
        found = exported.load_merged(draft, device) if merged else exported.load_adapter(draft, base, device, quantized)
        dtype = exported.stored_dtype(base) if merged else torch.float32
        proof = exported.check_logits(found, expected, dtype)
    if merged:
        exported.check_tokenizer(draft, adapter.manifest.base.tokenizer_sha256)
    return proof
