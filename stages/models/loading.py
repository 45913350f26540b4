"""The base models: loaded once, identified by content, checked against each other, with an adapter attached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedTokenizerBase

from stages.artefacts.adapter_files import read_adapter
from stages.artefacts.manifest import BaseIdentity
from stages.artefacts.reading import Artefact
from stages.artefacts.residual_files import read_residual
from stages.bases import base_files, base_folders
from stages.models import adapters, packing, quantization, residual
from stages.models.base_loading import (
    check_fits,
    check_unread,
    load_model,
    load_tokenizer,
    read_configuration,
)
from stages.models.devices import device_of, naming_memory_knobs, precision
from stages.models.fused import fuse
from stages.models.identity import identify
from stages.models.tuned import Outline, Tuned, context_in
from stages.models.vocabulary import check_one_vocabulary
from stages.runtime.errors import NotReady, Refused, UsageProblem
from stages.runtime.processes import ALONE, Processes
from stages.workspace.averaging import Factors
from stages.workspace.names import AGREEMENT
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES, Role


class Models:
    """The base models of a workspace, each loaded the first time it is asked for and kept.

    Separate commands make a new one each; `run` hands the same one to all its stages, and `of` shares what is loaded
    with workspaces that have the same bases and LoRA shapes: other methods, other seeds.
    """

    def __init__(self, workspace: Workspace, processes: Processes = ALONE) -> None:
        self._workspace, self._processes = workspace, processes
        self._roles: dict[Role, Tuned] = {}
        self._loaded: dict[tuple[object, ...], Tuned] = {}
        self.device = device_of(workspace.machine)

    def of(self, workspace: Workspace) -> Models:
        """The models of another workspace on this machine, or of one client of this workspace."""
        if workspace == self._workspace:
            return self
        other = Models(workspace, self._processes)
        other._loaded = self._loaded
        return other

    def use(self, *roles: Role) -> None:
        """Say which models a stage is about to use; with offload_idle the others wait in the CPU's memory meanwhile."""
        if not self._workspace.machine.offload_idle:
            return
        used = [self._roles[role].model for role in roles if role in self._roles]
        for tuned in self._loaded.values():
            if all(tuned.model is not model for model in used):
                tuned.model.to("cpu")
        clear_device_cache()

    def get(self, role: Role) -> Tuned:
        """The SLM or the LLM with an adapter of the agreed shape (whatever values it last had)."""
        if role not in self._roles:
            workspace = self._workspace
            lora, checkpointing = workspace.agreement.model_of(role).lora, workspace.machine.gradient_checkpointing
            folder, precisions = base_folders.folder(workspace, role), precision(workspace, role, self.device)
            held = workspace.agreement.model_of(role).quantization
            key: tuple[object, ...] = (
                folder.resolve(),
                precisions,
                lora.model_dump_json(),
                self.device,
                checkpointing,
                held,
            )
            held_here = [one.model for one in self._roles.values()]
            if key in self._loaded and any(self._loaded[key].model is one for one in held_here):
                key = (*key, role)  # one base as SLM and LLM: each has an adapter of its own
            if key not in self._loaded:
                with naming_memory_knobs():
                    self._loaded[key] = self._load(role, folder, precisions)
            self._roles[role] = replace(self._loaded[key], role=role)
        if self._workspace.machine.offload_idle:
            self._roles[role].model.to(self.device)
        return self._roles[role]

    def outline(self, role: Role) -> Outline:
        """What is known of the SLM or the LLM without its weights, which need not be here. Raises NotReady."""
        if role in self._roles:
            return self._roles[role].outline
        folder = base_folders.configuration(self._workspace, role)
        mend = base_folders.fetching(self._workspace, role)
        if folder is None:
            raise NotReady(f"the {role.upper()}'s configuration and tokenizer are not here", mend=mend)
        tokenizer = check_unread(folder, role, self._workspace.agreement.model_of(role).quantization)
        config = read_configuration(folder, f"the {role.upper()}")
        if tokenizer is None:
            raise NotReady(f"the {role.upper()}'s tokenizer is not here", where=folder, mend=mend)
        return _outline(tokenizer, config)

    def expect(self, role: Role, identity: BaseIdentity, whose: str) -> Tuned:
        """As get, but the base must be the one named by identity. Raises Refused otherwise."""
        tuned = self.get(role)
        if name := tuned.identity.differs(identity):
            here, there = (str(getattr(one, name) or "none")[:16] for one in (tuned.identity, identity))
            message = f"the {role.upper()} here is not the one of {whose}: {name} is {here}, there {there}"
            setting = base_folders.setting(self._workspace, role)
            mend = f"use the same {role}.model and revision everywhere; see {setting} in machine.toml"
            if name == "weights_sha256":
                mend += "; the same weights pickled (*.bin), or in another precision, are other files: copy theirs"
            if name == "settings_sha256":
                message = f"{message}; the weights are the same, another configuration lies beside them"
                mend += "; copy config.json, generation_config.json and the tokenizer's files of the others"
            raise Refused(message, where=self._workspace.root, mend=mend)
        return tuned

    def check_both(self) -> None:
        """Raise UsageProblem, without reading weights, for two models that cannot teach each other.

        Raises as base_files.check does for a folder that holds no whole base. Says nothing where a model's
        configuration or tokenizer is not here.
        """
        found = []
        for role in ROLES:
            folder, whose = base_folders.configuration(self._workspace, role), f"the {role.upper()}"
            if folder is None or not base_files.tokenizer_files(folder):
                return
            base_files.check(folder, role, self._workspace.agreement.model_of(role).quantization, weights=False)
            found.append(_outline(load_tokenizer(folder, whose), read_configuration(folder, whose)))
        check_one_vocabulary(*found)

    def begun(
        self, role: Role, start: Artefact | None, *, seed: int, whose: str | None = None, trains: Factors = "AB"
    ) -> Tuned:
        """The SLM or the LLM with the adapter that it starts from; without one, with a fresh one drawn from the seed.

        trains: which of its matrices are trained. Raises as with_adapter does.
        """
        tuned = self.get(role) if start is None else self.with_adapter(role, start, whose)
        if start is None:
            residual.put(tuned.model, {})
            adapters.make_fresh(tuned.model, seed)
        adapters.train_only(tuned.model, trains)
        return tuned

    def with_adapter(self, role: Role, artefact: Artefact, whose: str | None = None) -> Tuned:
        """The SLM or the LLM with this adapter in it, all of it trainable, and what it stands on beneath it, frozen.

        Raises as expect, read_adapter and read_residual do.

        whose: what messages call the adapter; by default its path.
        """
        tuned = self.expect(role, artefact.manifest.base, whose or self._workspace.shown(artefact.path))
        lora = self._workspace.agreement.model_of(role).lora
        layout = adapters.layout(tuned.model)
        adapters.put(tuned.model, read_adapter(artefact, layout, lora))
        beneath = read_residual(artefact, layout, self._workspace.agreement) if role == "slm" else {}
        residual.put(tuned.model, beneath)
        adapters.train_only(tuned.model, "AB")
        return tuned

    def _load(self, role: Role, folder: Path, precisions: tuple[torch.dtype, torch.dtype]) -> Tuned:
        settings = self._workspace.agreement.model_of(role)
        compute, dtype = precisions
        quantized = quantization.loading(role, settings.quantization, compute, self.device)
        is_spread = role in self._workspace.machine.sharding and self._processes.count > 1
        if quantized and is_spread:
            mend = f'take "{role}" out of sharding in machine.toml, or agree to leave {role}.quantization out'
            raise UsageProblem(f"the {role.upper()} cannot be both quantised and spread over processes", mend=mend)
        whose = f"the {role.upper()}"
        base_files.check(folder, role, settings.quantization)
        tokenizer = load_tokenizer(folder, whose)
        identity = identify(folder, tokenizer, settings.quantization)
        base = load_model(folder, whose, dtype=dtype, **quantized)
        check_fits(tokenizer, int(base.get_input_embeddings().weight.shape[0]), whose)
        if not (quantized or is_spread):
            base.to(self.device)
        quantization.never_repack(base)
        fuse(base)
        longest_packed = packing.packs(base)
        base.config.use_cache = False
        if self._workspace.machine.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = adapters.attach(base, settings, where=self._workspace.root / AGREEMENT)
        if is_spread:
            from stages.models import sharding

            sharding.spread(model, self.device, self._processes.count)
        return Tuned(
            role=role,
            longest_packed=longest_packed,
            model=model,
            tokenizer=tokenizer,
            identity=identity,
            autocast=compute == torch.bfloat16,
        )


def _outline(tokenizer: PreTrainedTokenizerBase, config: Any) -> Outline:
    return Outline(tokenizer, int(config.get_text_config().vocab_size), context_in(config))
