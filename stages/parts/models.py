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
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from stages.parts import adapters, batches, quiet
from stages.parts.adapter_files import read_adapter
from stages.parts.config import Model
from stages.parts.errors import BadNumbers, NotReady, Refused, UsageProblem
from stages.parts.manifest import Artefact, BaseIdentity
from stages.parts.workspace import AGREEMENT, Workspace

Role = Literal["slm", "llm"]

PROBE_TEXTS = (
    "Question: Which of these is a mammal?\nAnswer: a whale",
    "  two  spaces,\ttab; 3.14159 and 2,718",
    "naïve café — “quotes”, 数学, Ελληνικά, 🙂",
)
"""What a tokenizer must encode alike to count as the same one: its vocabulary alone does not show its merges."""

OUT_OF_MEMORY_PHRASES = ("can't allocate memory", "out of memory")
"""How torch says so on a CPU and on a GPU."""


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
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))

    @property
    def hidden_size(self) -> int:
        """The width of its residual stream."""
        return int(self.model.config.get_text_config().hidden_size)


class Models:
    """The base models of a workspace, each loaded the first time it is asked for and kept.

    Separate commands make a new one each; `run` hands the same one to all its stages, and `of` shares what is loaded
    with workspaces that have the same bases and LoRA shapes: other methods, other seeds.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._roles: dict[Role, Tuned] = {}
        self._loaded: dict[tuple[object, ...], Tuned] = {}
        self.device = _device(workspace.machine.device)

    def of(self, workspace: Workspace) -> Models:
        """The models of another workspace on this machine."""
        other = Models(workspace)
        other._loaded = self._loaded
        return other

    def get(self, role: Role) -> Tuned:
        """The SLM or the LLM with an adapter of the agreed shape (whatever values it last had)."""
        if role not in self._roles:
            settings, machine = self._workspace.agreement.model_of(role), self._workspace.machine
            folder, compute = self._folder(role, settings), self._dtype(role)
            key = (
                folder.resolve(),
                compute,
                settings.lora.model_dump_json(),
                self.device,
                machine.gradient_checkpointing,
            )
            if key not in self._loaded:
                with naming_memory_knobs():
                    self._loaded[key] = self._load(role, folder, compute)
            self._roles[role] = replace(self._loaded[key], role=role)
        return self._roles[role]

    def expect(self, role: Role, identity: BaseIdentity, whose: str) -> Tuned:
        """As get, but the base must be the one named by identity. Raises Refused otherwise."""
        tuned = self.get(role)
        for name in ("architecture", "weights_sha256", "tokenizer_sha256"):
            here, there = getattr(tuned.identity, name), getattr(identity, name)
            if here != there:
                message = (
                    f"the {role.upper()} here is not the one of {whose}: {name} is {here[:16]}, there {there[:16]}"
                )
                mend = f"use the same {role}.model and revision everywhere; see models.{role} in machine.toml"
                raise Refused(message, where=self._workspace.root, mend=mend)
        return tuned

    def with_adapter(self, role: Role, artefact: Artefact) -> Tuned:
        """The SLM or the LLM with this adapter in it. Raises as expect and read_adapter do."""
        tuned = self.expect(role, artefact.manifest.base, self._workspace.shown(artefact.path))
        lora = self._workspace.agreement.model_of(role).lora
        adapters.put(tuned.model, read_adapter(artefact, adapters.layout(tuned.model), lora))
        return tuned

    def _dtype(self, role: Role) -> torch.dtype:
        wanted = self._workspace.machine.dtype or self._workspace.agreement.model_of(role).dtype
        if wanted == "auto":
            return torch.bfloat16 if _has_fast_bfloat16(self.device) else torch.float32
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32

    def _load(self, role: Role, folder: Path, compute: torch.dtype) -> Tuned:
        settings = self._workspace.agreement.model_of(role)
        # bfloat16 weights are faster on a GPU; on a CPU float32 weights under autocast are, and serve evaluation too.
        dtype = compute if self.device.type == "cuda" else torch.float32
        try:
            with quiet.libraries():
                tokenizer = AutoTokenizer.from_pretrained(folder)
                identity = identify(folder, tokenizer)
                base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
                base.to(self.device)
                packs = batches.packs(base)
        except (OSError, ValueError) as error:
            message = f"the {role.upper()} {settings.model} cannot be loaded: {error}"
            raise UsageProblem(message, where=folder, mend=f"check {role}.model in fedcollm.toml") from error
        base.config.use_cache = False
        if self._workspace.machine.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return Tuned(
            role=role,
            packs=packs,
            model=adapters.attach(base, settings, where=self._workspace.root / AGREEMENT),
            tokenizer=tokenizer,
            identity=identity,
            autocast=compute == torch.bfloat16,
        )

    def _folder(self, role: Role, settings: Model) -> Path:
        """Where the base lies: machine.toml's own path, the workspace, or the hub's cache (fetched if need be)."""
        override = getattr(self._workspace.machine.models, role)
        local = self._workspace.local(override or settings.model)
        if local.is_dir():
            return local
        if override or settings.model.startswith((".", "/", "~")):
            mend = f"put the model there, or set models.{role} in machine.toml"
            raise NotReady(f"the {role.upper()}'s folder is not there", where=local, mend=mend)
        patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
        try:
            folder = Path(
                snapshot_download(
                    settings.model, revision=settings.revision, allow_patterns=[*patterns, "*.safetensors"]
                )
            )
            if not any(folder.glob("*.safetensors")):
                snapshot_download(settings.model, revision=settings.revision, allow_patterns=[*patterns, "*.bin"])
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            mend = f"fetch it where there is a network, or set models.{role} in machine.toml to a local folder"
            raise NotReady(
                f"the {role.upper()} {settings.model} is neither here nor on the hub: {error}", mend=mend
            ) from error
        return folder


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    kind = wanted.partition(":")[0]  # the command line shows CUDA the one GPU that was chosen
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UsageProblem(f"there is no device {wanted} here", mend="give --device cpu, or auto")
    return torch.device(kind)


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def identify(folder: Path, tokenizer: Any) -> BaseIdentity:
    """A base model's identity by content: every tensor's name, type, shape and bytes, whatever files they lie in."""
    architecture = str(json.loads((folder / "config.json").read_text()).get("model_type", "unknown"))
    return BaseIdentity(
        architecture=architecture,
        weights_sha256=_weights_sha256(folder),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
    )


def tokenizer_sha256(tokenizer: Any) -> str:
    """A tokenizer's identity by content: its vocabulary in order, and how it splits the probe texts."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    encodings = [tokenizer.encode(text) for text in PROBE_TEXTS]
    return hashlib.sha256(json.dumps([vocabulary, encodings]).encode()).hexdigest()


def _weights_sha256(folder: Path) -> str:
    lines = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                content = tensor.contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
                lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}\n")
    if not lines:  # an old checkpoint: pickled weights of a base model, by file
        for path in sorted(folder.glob("*.bin")):
            with path.open("rb") as binary:
                lines.append(f"{path.name} {hashlib.file_digest(binary, 'sha256').hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def check_one_vocabulary(slm: Tuned, llm: Tuned) -> int:
    """How many token ids the two models share. Raises UsageProblem unless their tokenizers agree on each of them.

    Rows of the larger vocabulary beyond that are padding (Qwen2.5 has 151,936 and 152,064) and are cut off.
    """
    shared = min(_vocabulary_rows(slm), _vocabulary_rows(llm))
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


def _vocabulary_rows(tuned: Tuned) -> int:
    return int(tuned.model.get_output_embeddings().weight.shape[0])


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
        text = str(error) or type(error).__name__
        if isinstance(error, RuntimeError) and not any(phrase in text for phrase in OUT_OF_MEMORY_PHRASES):
            raise
        raise BadNumbers(f"out of memory: {text.splitlines()[0]}", mend=mend) from error
