"""A3, the layout: which tensors an adapter has, of what type and shape, and whether that is LoRA on linear layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.artefacts import lora_settings
from stages.artefacts.adapter_files import A, B, Layout, check_config, part_of
from stages.artefacts.sparse_files import Sparse, parse_sparse
from stages.audit.checks import Check, Finding, number_of
from stages.audit.folders import Folder
from stages.audit.foreign_adapters import AnyAdapter
from stages.audit.parts import factors_of
from stages.distillation.top_k_logits import parse_capture
from stages.runtime.errors import Damaged, Problem
from stages.workspace.averaging import Factors
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CAPTURE, SPARSE_UPDATE

A3 = Check("A3", "layout")

TOKEN_LAYERS = {"embed_tokens", "embed_positions", "embed_in", "embed_out", "embeddings", "word_embeddings"}
TOKEN_LAYERS |= {"wte", "wpe", "shared", "lm_head"}
"""Layers with a row for each token: an adapter of one tells which tokens were trained on."""
LINEAR = "attention and MLP layers only"
NAME = re.compile(r"base_model\.model\.[\w.]+\.lora_[AB]\.weight")


def layout_of_adapter(folder: Folder, adapter: AnyAdapter) -> Iterator[Finding]:
    """Of one folder: names, types and shapes against its configuration, and the configuration against the agreement."""
    weights, settings = folder.file(ADAPTER_WEIGHTS), folder.file(ADAPTER_CONFIG)
    factors = factors_of(folder, adapter.tensors)
    yield from _names(adapter, weights)
    yield from _shapes(adapter, weights, factors)
    yield from _settings(adapter, settings)
    expected = {"format": "pt"}
    if adapter.metadata not in ({}, expected):
        more = ", ".join(sorted(adapter.metadata.keys() - expected.keys())) or "other values"
        found = A3.fail if folder.is_ours else A3.warn
        yield found(weights, f"carries metadata: {more}", "none but format: pt")
    dtypes = sorted(set(adapter.dtypes.values()))
    if folder.is_ours and dtypes != ["F32"]:
        yield A3.fail(weights, f"holds {', '.join(dtypes) or 'nothing'}", "F32")
    if folder.manifest:
        yield from _against_manifest(folder, adapter)
    shape = f"{number_of(len(adapter.tensors), 'tensor')}, {', '.join(dtypes)}, rank {adapter.config.get('r')}"
    yield A3.ok(shape + ("" if factors == "AB" else f", {factors} alone"), where=folder.shown)


def _names(adapter: AnyAdapter, weights: str) -> Iterator[Finding]:
    for name in adapter.tensors:
        on_tokens = TOKEN_LAYERS & set(name.split("."))
        if on_tokens or ".lora_embedding_" in name:
            yield A3.fail(
                weights, f"{name} adapts tokens, and so tells which occurred", "attention and MLP layers only"
            )
        elif not NAME.fullmatch(name):
            yield A3.fail(weights, f"{name} is no LoRA matrix", "names that end in lora_A.weight or lora_B.weight")


def _shapes(adapter: AnyAdapter, weights: str, factors: Factors) -> Iterator[Finding]:
    """A is [r, inputs] and B is [outputs, r], with the r of the configuration unless that has one for each layer."""
    for name, tensor in adapter.tensors.items():
        other = name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A
        if not name.endswith((A, B)):
            continue
        if factors != "AB":
            yield from _alone(adapter, name, weights, factors)
        elif other not in adapter.tensors:
            yield A3.fail(weights, f"{name} is there without its {other.split('.')[-2]}", "both of each layer")
        elif tensor.ndim != 2:
            yield A3.fail(weights, f"{name} has shape {list(tensor.shape)}", "a matrix")
        elif name.endswith(A):
            b = adapter.tensors[other]
            found, its = tensor.shape[0], b.shape[1] if b.ndim == 2 else None
            module = name.removesuffix(A)
            rank = int(lora_settings.of_layer(adapter.config, "r", module)) if adapter.is_understood else None
            if its is not None and (found != its or found != (rank or found)):
                text = f"{name} has shape {list(tensor.shape)}, its B {list(b.shape)}"
                yield A3.fail(weights, text, f"[{rank or 'r'}, inputs] and [outputs, {rank or 'r'}]")


def _alone(adapter: AnyAdapter, name: str, weights: str, factors: Factors) -> Iterator[Finding]:
    """One matrix where A or B alone is sent."""
    shape, own = adapter.tensors[name].shape, A if name.endswith(A) else B
    if own != {"A": A, "B": B}[factors]:
        yield A3.fail(weights, f"{name} is there", f"{factors} alone: what stays as the broadcast has it is not sent")
        return
    rank = int(lora_settings.of_layer(adapter.config, "r", name.removesuffix(own))) if adapter.is_understood else None
    found = shape[0 if own == A else 1] if len(shape) == 2 else None
    if found is None or found != (rank or found):
        expected = f"[{rank or 'r'}, inputs]" if own == A else f"[outputs, {rank or 'r'}]"
        yield A3.fail(weights, f"{name} has shape {list(shape)}", expected)


def _settings(adapter: AnyAdapter, settings: str) -> Iterator[Finding]:
    config = adapter.config
    for key in ("modules_to_save", "trainable_token_indices"):
        if config.get(key):
            yield A3.fail(settings, f"{key} = {config[key]!r}", "nothing but LoRA matrices")
    targets = config.get("target_modules")
    if isinstance(targets, list) and (on_tokens := TOKEN_LAYERS & {str(name).rpartition(".")[2] for name in targets}):
        yield A3.fail(settings, f"target_modules has {', '.join(sorted(on_tokens))}", LINEAR)
    modules = sorted({name.removesuffix(A).removesuffix(B) for name in adapter.tensors if name.endswith((A, B))})
    for said in lora_settings.not_understood(config):
        yield A3.warn(settings, f"{said} is not understood: what the adapter adds is not known here", "plain LoRA")
    for said in lora_settings.fits_nothing(config, modules):
        yield A3.warn(settings, f"{said}, which fits no layer of the adapter", "names that fit")
    if config.get("bias", "none") != "none":
        yield A3.fail(settings, f"bias = {config['bias']!r}", "none")
    if config.get("peft_type", "LORA") != "LORA":
        yield A3.fail(settings, f"peft_type = {config['peft_type']!r}", "LORA")


def _against_manifest(folder: Folder, adapter: AnyAdapter) -> Iterator[Finding]:
    assert folder.manifest is not None
    agreement, manifest = folder.scope.agreement, folder.manifest
    agreement = agreement.of_client(manifest.client) if agreement and manifest.client else agreement
    lora = agreement.model_of(manifest.role).lora if agreement else manifest.lora
    content = folder.contents.get(ADAPTER_CONFIG)
    if content is not None:
        try:
            check_config(content, Path(ADAPTER_CONFIG), lora)
        except Damaged as problem:
            yield A3.fail(folder.file(ADAPTER_CONFIG), problem.message)
    found = sum(tensor.size for tensor in adapter.tensors.values())
    if found != manifest.parameters:
        yield A3.fail(folder.file(ADAPTER_WEIGHTS), f"holds {found} numbers", f"{manifest.parameters}, by its manifest")


def layout_of_capture(folder: Folder) -> Iterator[Finding]:
    """Of one capture, or sparse update: that it is exactly of its form."""
    kinds: dict[str, tuple[Callable[[bytes, Path], object], str]] = {
        CAPTURE: (parse_capture, "what co-distill --phase capture writes"),
        SPARSE_UPDATE: (parse_sparse, "positions, each once and in order, and a change for each"),
    }
    for name, (parse, expected) in kinds.items():
        if (content := folder.contents.get(name)) is not None:
            try:
                found = parse(content, Path(name))
            except Problem as problem:
                yield A3.fail(folder.file(name), problem.message, expected)
                continue
            if isinstance(found, Sparse) and folder.manifest and len(found.positions) != folder.manifest.parameters:
                text = f"holds {len(found.positions)} numbers"
                yield A3.fail(folder.file(name), text, f"{folder.manifest.parameters}, by its manifest")


def same_layout(layouts: dict[Path, Layout], folders: list[Folder]) -> Iterator[Finding]:
    """That the adapters of one model of one federation have the same tensors, or the same part of them."""
    first: dict[tuple[str, str, int | None, Factors], Folder] = {}
    readable = [folder for folder in folders if folder.path in layouts]
    for folder in readable:
        if folder.manifest is None:
            continue
        found, model = layouts[folder.path], (folder.manifest.federation, folder.manifest.role, folder.owner)
        factors = factors_of(folder, found)
        before = first.get((*model, "AB")) or first.setdefault((*model, factors), folder)
        expected = part_of(layouts[before.path], factors)
        if found != expected:
            names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            one, other = found.get(names[0]), expected.get(names[0])
            text = f"{names[0]} is {list(one) if one else 'missing'} ({number_of(len(names), 'difference')})"
            yield A3.fail(folder.shown, text, f"{list(other) if other else 'none'}, as in {before.shown}")
    if readable:
        yield A3.ok(f"{number_of(len(readable), 'adapter')}: LoRA on linear layers, as their configurations say")
    else:
        yield A3.skip("no adapter that can be read is here")
