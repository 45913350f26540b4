"""The base models: loaded once, identified by content, checked against each other, with an adapter attached."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from stages.artefacts.adapter_files import read_adapter
from stages.artefacts.manifest import Artefact, BaseIdentity
from stages.bases import base_files, base_folders
from stages.bases.base_names import NO_SHAPE
from stages.models import adapters, quantization
from stages.models.base_loading import (
    PROBE,
    check_fits,
    check_unread,
    is_out_of_memory,
    load_model,
    load_tokenizer,
    not_finite,
    read_configuration,
    read_generation,
)
from stages.runtime.errors import BadNumbers, Damaged, NotReady, Refused, UsageProblem
from stages.runtime.processes import ALONE, Processes
from stages.training import batches
from stages.workspace.agreement import Machine, Quantization, Role
from stages.workspace.paths import AGREEMENT, Workspace

PROBE_TEXTS = (
    PROBE,
    "  two  spaces,\ttab; 3.14159 and 2,718",
    "naïve café — “quotes”, 数学, Ελληνικά, 🙂",
)
"""What a tokenizer must encode alike to count as the same one: its vocabulary alone does not show its merges."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

VARYING = {
    *NO_SHAPE,
    "_attn_implementation",
    "_commit_hash",
    "_from_model_config",
    "attn_implementation",
    "cache_config",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
}
"""Settings that may differ between copies of one model: names, precisions, versions, ways to the same numbers."""


@dataclass(frozen=True)
class Outline:
    """What is known of a base model without its weights.

    vocabulary: how many token ids it has logits for, padding included. context: the longest sequence it takes.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    context: int


@dataclass(frozen=True)
class Tuned:
    """A base model with an adapter attached, its tokenizer and its identity.

    autocast: whether it computes in bfloat16 (the adapter stays float32). packs: see batches.packs.
    """

    role: Role
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseIdentity
    autocast: bool
    packs: bool

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """The precision it computes in."""
        return "bfloat16" if self.autocast else "float32"

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return context_of(self.model)

    @property
    def outline(self) -> Outline:
        """What would be known of it without its weights."""
        rows = int(self.model.get_output_embeddings().weight.shape[0])
        return Outline(self.tokenizer, rows, self.context)

    @property
    def hidden_size(self) -> int:
        """The width of its residual stream."""
        return int(self.model.config.get_text_config().hidden_size)


def context_of(model: PeftModel) -> int:
    """The longest sequence a model takes, in tokens, as its configuration says."""
    return _context(model.config)


def _context(config: Any) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 30))


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
        """The models of another workspace on this machine."""
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
            key = (folder.resolve(), precisions, lora.model_dump_json(), self.device, checkpointing, held)
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
        mend = f"`fedcollm prefetch --model {role}` where there is a network, or set models.{role} in machine.toml"
        if folder is None:
            raise NotReady(f"the {role.upper()}'s configuration and tokenizer are not here", mend=mend)
        tokenizer = check_unread(folder, role, self._workspace.agreement.model_of(role).quantization)
        config = read_configuration(folder, f"the {role.upper()}")
        if tokenizer is None:
            raise NotReady(f"the {role.upper()}'s tokenizer is not here", where=folder, mend=mend)
        return Outline(tokenizer, int(config.get_text_config().vocab_size), _context(config))

    def expect(self, role: Role, identity: BaseIdentity, whose: str) -> Tuned:
        """As get, but the base must be the one named by identity. Raises Refused otherwise."""
        tuned = self.get(role)
        if name := tuned.identity.differs(identity):
            here, there = (str(getattr(one, name) or "none")[:16] for one in (tuned.identity, identity))
            message = f"the {role.upper()} here is not the one of {whose}: {name} is {here}, there {there}"
            mend = f"use the same {role}.model and revision everywhere; see models.{role} in machine.toml"
            if name == "weights_sha256":
                mend += "; the same weights pickled (*.bin), or in another precision, are other files: copy theirs"
            if name == "settings_sha256":
                message = f"{message}; the weights are the same, another configuration lies beside them"
                mend += "; copy config.json, generation_config.json and the tokenizer's files of the others"
            raise Refused(message, where=self._workspace.root, mend=mend)
        return tuned

    def with_adapter(self, role: Role, artefact: Artefact) -> Tuned:
        """The SLM or the LLM with this adapter in it. Raises as expect and read_adapter do."""
        tuned = self.expect(role, artefact.manifest.base, self._workspace.shown(artefact.path))
        lora = self._workspace.agreement.model_of(role).lora
        adapters.put(tuned.model, read_adapter(artefact, adapters.layout(tuned.model), lora))
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
        packs = batches.packs(base)
        base.config.use_cache = False
        if self._workspace.machine.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = adapters.attach(base, settings, where=self._workspace.root / AGREEMENT)
        if is_spread:
            from stages.models import sharding

            sharding.spread(model, self.device, self._processes.count)
        return Tuned(
            role=role,
            packs=packs,
            model=model,
            tokenizer=tokenizer,
            identity=identity,
            autocast=compute == torch.bfloat16,
        )


def device_of(machine: Machine) -> torch.device:
    """The device that a machine's settings ask for. Raises UsageProblem if it has none such."""
    wanted = machine.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    kind = wanted.partition(":")[0]  # the command line shows CUDA the one GPU that was chosen
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UsageProblem(f"there is no device {wanted} here", mend="give --device cpu, or auto")
    return torch.device(kind)


def precision(workspace: Workspace, role: Role, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """The types that a base model computes in and is kept in."""
    wanted = workspace.machine.dtype or workspace.agreement.model_of(role).dtype
    if wanted == "auto":
        wanted = "bfloat16" if _has_fast_bfloat16(device) else "float32"
    compute = torch.bfloat16 if wanted == "bfloat16" else torch.float32
    # bfloat16 weights are faster on a GPU; on a CPU float32 weights under autocast are, and serve evaluation too.
    return compute, compute if device.type == "cuda" else torch.float32


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def identify(folder: Path, tokenizer: Any, quantization: Quantization | None = None) -> BaseIdentity:
    """A base model's identity by content: every tensor's name, type, shape and bytes, whatever files they lie in.

    quantization: how it is held once it is loaded.
    """
    architecture = str(json.loads((folder / "config.json").read_text()).get("model_type", "unknown"))
    return BaseIdentity(
        architecture=architecture,
        weights_sha256=_weights_sha256(folder, looks_for_nan=quantization is not None),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        settings_sha256=_settings_sha256(folder, tokenizer),
        quantization=quantization,
    )


def tokenizer_sha256(tokenizer: Any) -> str:
    """A tokenizer's identity by content: its vocabulary in order, and how it splits the probe texts."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    encodings = [tokenizer.encode(text) for text in PROBE_TEXTS]
    return hashlib.sha256(json.dumps([vocabulary, encodings]).encode()).hexdigest()


def _settings_sha256(folder: Path, tokenizer: Any) -> str:
    """Of what else decides a model's numbers and texts: its configuration, how it generates, its special tokens."""
    configuration, generation = read_configuration(folder, "the base"), read_generation(folder, "the base")
    special = {name: str(getattr(tokenizer, name)) for name in SPECIAL_TOKENS if getattr(tokenizer, name) is not None}
    told = [_told(one) for one in (configuration, generation)]
    return hashlib.sha256(json.dumps([*told, special], sort_keys=True, default=str).encode()).hexdigest()


def _told(settings: Any) -> dict[str, Any]:
    """What differs from the defaults of its class, to which later versions of transformers add."""
    try:
        plain: dict[str, Any] = type(settings)().to_dict()
    except Exception:  # the classes of each architecture raise what they like; some have no defaults
        plain = {}
    told: dict[str, Any] = settings.to_diff_dict()
    changed = {key: value for key, value in told.items() if key not in plain or plain[key] != value}
    return dict(_without_varying(changed))


def _without_varying(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {str(key): _without_varying(value) for key, value in settings.items() if key not in VARYING}
    return settings


def _weights_sha256(folder: Path, *, looks_for_nan: bool) -> str:
    """Of the files that are loaded, whatever else lies beside them. Raises Damaged if one cannot be read.

    looks_for_nan: raise it for NaN and infinity too, which few bits would hide.
    """
    lines = []
    for path in base_files.weight_files(folder):
        if path.suffix != ".safetensors":  # an old checkpoint: pickled weights of a base model, by file
            with path.open("rb") as binary:
                lines.append(f"{path.name} {hashlib.file_digest(binary, 'sha256').hexdigest()}\n")
            continue
        try:
            lines += _tensor_lines(path, looks_for_nan)
        except SafetensorError as error:
            message = f"{path.name} is cut short or damaged: {error}"
            raise Damaged(message, where=path, mend=base_files.FETCH_AGAIN) from error
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _tensor_lines(path: Path, looks_for_nan: bool) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name)
            if looks_for_nan and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise not_finite("the base", name, path)
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
            yield f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}\n"


def check_one_vocabulary(slm: Outline, llm: Outline) -> int:
    """How many token ids the two models share. Raises UsageProblem unless their tokenizers agree on each of them.

    Rows of the larger vocabulary beyond that are padding (Qwen2.5 has 151,936 and 152,064) and are cut off.
    """
    shared = min(slm.vocabulary, llm.vocabulary)
    where = llm.tokenizer.name_or_path
    mend = "mutual distillation needs two models with one tokenizer: take both from one family"
    theirs = {index: token for token, index in llm.tokenizer.get_vocab().items()}
    ours = {index: token for token, index in slm.tokenizer.get_vocab().items()}
    for index in range(shared):
        if ours.get(index) != theirs.get(index):
            found = f"{ours.get(index)!r} for the SLM, {theirs.get(index)!r} for the LLM"
            raise UsageProblem(f"the tokenizers differ: token {index} is {found}", where=where, mend=mend)
    for text in PROBE_TEXTS:
        if slm.tokenizer.encode(text) != llm.tokenizer.encode(text):
            message = f"the tokenizers share a vocabulary but split text differently: {text!r}"
            raise UsageProblem(message, where=where, mend=mend)
    return shared


MEMORY_KNOBS = (
    "set micro_batch = 1 (or a small number) and gradient_checkpointing = true in machine.toml, "
    "give --dtype bfloat16, or agree on a smaller max_length or evaluation.batch_size"
)


@contextlib.contextmanager
def naming_memory_knobs(mend: str = MEMORY_KNOBS) -> Iterator[None]:
    """Turn running out of memory into BadNumbers that names what needs less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        text = str(error) or type(error).__name__
        raise BadNumbers(f"out of memory: {text.splitlines()[0]}", mend=mend) from error
