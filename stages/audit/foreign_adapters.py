"""An adapter file whoever made it: any floating-point type and any names, to be judged, not used.

Pickles are never opened, and a file that is not sound is damaged here too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from stages.artefacts import lora_settings
from stages.artefacts.adapter_files import A, B, Tensors
from stages.artefacts.tensor_files import SIZES, check_head, read_header
from stages.audit.folders import Scope, open_folder
from stages.files import reading
from stages.runtime.errors import Damaged, NotReady, Problem, UsageProblem
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ENCRYPTED, MASKED_UPDATE, SPARSE_UPDATE

DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
"""Those that NumPy has; BF16 is the upper half of a float32."""

LEAST_SQUARE, ROUNDING = 1e-4, 1e-14
"""Shares of |A|^2 |B|^2, by the norms of their Gram matrices."""


@dataclass(frozen=True)
class AnyAdapter:
    """tensors: by name, float32 or float64. dtypes: as they are stored. config: adapter_config.json, if it is there."""

    tensors: Tensors
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def extents(self) -> dict[str, float]:
        """The largest absolute value of each tensor, 0 of an empty one; NaN or infinity where it holds such."""
        return {
            name: max(float(tensor.max(initial=0)), -float(tensor.min(initial=0)))
            for name, tensor in self.tensors.items()
        }

    @property
    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(map(isfinite, self.extents.values()))

    @functools.cached_property
    def is_understood(self) -> bool:
        """Whether its configuration is there, and says nothing that is not known here."""
        return bool(self.config) and not lora_settings.not_understood(self.config)

    def modules(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Each adapted layer's name, A and B, where both are matrices that fit each other."""
        for name, a in self.tensors.items():
            b = self.tensors.get(name.removesuffix(A) + B)
            if name.endswith(A) and b is not None and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1]:
                yield name.removesuffix(A), a, b

    def scale(self, module: str) -> float | None:
        """What B A is multiplied by, as PEFT has it: alpha/r, or alpha/sqrt(r) with rank-stabilised LoRA.

        None where that, or that the base stays as it is, is not known: see lora_settings.not_understood.
        """
        rank = int(self.tensors[module + A].shape[0])
        if not rank or not self.is_understood:
            return None
        alpha = lora_settings.of_layer(self.config, "lora_alpha", module)
        return float(alpha) / (sqrt(rank) if self.config.get("use_rslora") else rank)

    def scaled(self, module: str) -> tuple[np.ndarray, np.ndarray] | None:
        """A [r, inputs] and the scaled B [outputs, r], float64, whose product is added to a layer's weights.

        None where that is not known, or not finite.
        """
        scale = self.scale(module)
        a, b = (self.tensors[module + name].astype(np.float64) for name in (A, B))
        return None if scale is None or not np.isfinite(a).all() or not np.isfinite(b).all() else (a, scale * b)

    def not_understood(self) -> list[str]:
        """Why what this adapter does to its base is not known here, or not in full; empty for plain LoRA."""
        if not self.config:
            return [f"{ADAPTER_CONFIG}, which says alpha, is not there or empty"]
        modules = {name: int(a.shape[0]) for name, a, _ in self.modules()}
        found = lora_settings.not_understood(self.config)
        if not found:
            ranks = {name: int(lora_settings.of_layer(self.config, "r", name)) for name in modules}
            found = [
                f"{name} has rank {rank}, the configuration says {ranks[name]}"
                for name, rank in modules.items()
                if rank != ranks[name]
            ]
        for key, plain in (("peft_type", "LORA"), ("bias", "none"), ("modules_to_save", None)):
            if (value := self.config.get(key) or plain) != plain:
                found.append(f"{key} = {lora_settings.brief(value)}")
        layers = sorted({name.removesuffix(A).removesuffix(B) for name in self.tensors if name.endswith((A, B))})
        found += [f"{said}, which fits no layer" for said in lora_settings.fits_nothing(self.config, layers)]
        paired = {module + name for module in modules for name in (A, B)}
        return found + [f"{name} is not of a pair of LoRA matrices" for name in self.tensors if name not in paired]


def parse_weights(content: bytes, path: Path) -> AnyAdapter:
    """The tensors in the bytes of a safetensors file. Raises Damaged, also for a type that no adapter has."""
    header = read_header(content, path)
    try:
        entries = _in_place(header, content) or safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise Damaged(f"{path.name} is not a sound safetensors file: {error}", where=path) from error
    tensors, dtypes = {}, {}
    for name, entry in sorted(entries):
        dtypes[name] = entry["dtype"]
        if entry["dtype"] == "BF16":
            flat = (np.frombuffer(entry["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in DTYPES:
            flat = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        else:
            raise Damaged(f"{path.name} holds {name} as {entry['dtype']}, which no adapter is", where=path)
        values = flat.astype(np.float32) if flat.dtype.itemsize < 4 else flat
        tensors[name] = values.reshape(entry["shape"])
    return AnyAdapter(tensors, dtypes, dict(header.get("__metadata__", {})))


def _in_place(header: dict[str, Any], content: bytes) -> list[tuple[str, dict[str, Any]]] | None:
    """What safetensors.deserialize returns, without a copy of the numbers; None where the library is to judge.

    That is wherever tensors do not lie one right after the other as the header names them, to the end of the file.
    """
    numbers, end = memoryview(content)[8 + int.from_bytes(content[:8], "little") :], 0
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    is_plain = all(isinstance(value, str) for value in header.get("__metadata__", {}).values())
    for _, entry in entries:
        start, size_bytes, shape = end, SIZES.get(str(entry["dtype"]), 0), entry["shape"]
        end += size_bytes * prod(shape)
        is_plain &= size_bytes > 0 and all(0 <= size <= len(content) for size in shape)
        if not is_plain or str(entry["data_offsets"]) != str([start, end]):  # 0.0 and false are no places
            return None
        entry["data"] = numbers[start:end]
    return entries if end == len(numbers) else None


NO_ADAPTER = {
    ENCRYPTED: "this is encrypted: whoever has the key can open the sum of all updates",
    MASKED_UPDATE: "this update is masked, in secure mode: nobody can read it, only the sum of all can be seen",
    SPARSE_UPDATE: "this update is sparse, by aggregation.keep: few numbers of an adapter, which is none by itself",
}
"""What a folder of an update may hold in the place of an adapter, and why that is not compared."""


def read_any(folder: Path) -> AnyAdapter:
    """An adapter folder, ours or any of PEFT's, with its configuration. Raises as read_weights does."""
    adapter, settings = read_weights(folder), folder / ADAPTER_CONFIG
    return replace(adapter, config=reading.read_json(settings)[0]) if settings.exists() else adapter


def read_weights(folder: Path) -> AnyAdapter:
    """Its tensors alone. Raises NotReady, Damaged, or UsageProblem for a masked or a sparse update."""
    weights = folder / ADAPTER_WEIGHTS
    if not folder.is_dir():
        raise NotReady("there is no such folder", where=folder, mend="name a folder that holds an adapter")
    for name, message in NO_ADAPTER.items():
        if not weights.exists() and (folder / name).exists():
            mend = "compare averages, private/server/round-t/aggregate; a client has its own in"
            raise UsageProblem(message, where=folder / name, mend=f"{mend} private/client-k/round-t/slm")
    if not weights.exists() and any(folder.glob("adapter_model.*")):
        found = sorted(folder.glob("adapter_model.*"))[0]
        mend = "save it again with PEFT, as safetensors"
        raise Damaged(f"{found.name} is never opened: only safetensors are", where=found, mend=mend)
    return parse_weights(reading.read(weights, limit_bytes=reading.LARGEST_ADAPTER_BYTES, look=check_head), weights)


def tensors_if_sound(folder: Path, scope: Scope) -> Tensors | None:
    """The tensors of a folder that an audit looks at; None where it is not there, not vouched for, or not sound."""
    content = open_folder(folder, scope).contents.get(ADAPTER_WEIGHTS)
    try:
        return parse_weights(content, folder / ADAPTER_WEIGHTS).tensors if content is not None else None
    except Problem:
        return None


def product_spectrum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The singular values of B A, descending, float64, without forming it: two QR and one SVD, [r, r].

    a: [r, inputs], b: [outputs, r]. B = Q_b R_b and A^T = Q_a R_a, so that B A = Q_b (R_b R_a^T) Q_a^T.
    """
    return np.linalg.svd(_triangle(b) @ _triangle(a.T).T, compute_uv=False)


def spectra_by_grams(grams_a: np.ndarray, grams_b: np.ndarray) -> list[np.ndarray | None]:
    """The singular values of each B A, descending, from every A A^T and B^T B, float64, [n, r, r].

    None where those do not tell.

    Their squares are the eigenvalues of H^T A A^T H where B^T B = H H^T, which is ten times faster than QR. They are
    exact to some roundings of |A|^2 |B|^2: what is no more than that is taken for zero, and where the largest is not
    far above it nothing is told. So each value is right to 1e-7 of |A| |B|, as much as float32 numbers tell.
    """
    with np.errstate(over="ignore"):
        bounds = np.sqrt((grams_a**2).sum(axis=(1, 2)) * (grams_b**2).sum(axis=(1, 2)))
    able = np.flatnonzero((bounds > 0) & (bounds < np.inf))
    values, vectors = np.linalg.eigh(grams_b[able])
    halves = vectors * np.sqrt(np.maximum(values, 0))[:, None]
    squares = np.linalg.eigvalsh(halves.transpose(0, 2, 1) @ grams_a[able] @ halves)[:, ::-1]
    found: list[np.ndarray | None] = [None] * len(bounds)
    for number, of_one, bound in zip(able, squares, bounds[able], strict=True):
        if of_one[0] >= LEAST_SQUARE * bound:
            found[number] = np.sqrt(np.where(of_one > ROUNDING * bound, of_one, 0))
    return found


def rank_of(spectrum: np.ndarray) -> float:
    """The effective rank: exp of the entropy of the singular values' shares (Roy and Vetterli, 2007). 0 of nothing."""
    total = spectrum.sum()
    if total <= 0:
        return 0.0
    shares = spectrum[spectrum > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def effective_rank(matrix: np.ndarray) -> float | None:
    """Of one matrix, by the QR of its long side; None for what is no matrix, and for NaN or infinity."""
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        return None
    tall = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    return rank_of(np.linalg.svd(_triangle(tall), compute_uv=False))


def _triangle(tall: np.ndarray) -> np.ndarray:
    """R of its QR decomposition."""
    triangle: np.ndarray = np.linalg.qr(tall.astype(np.float64), mode="r")  # type: ignore[assignment]  # an array in this mode
    return triangle
