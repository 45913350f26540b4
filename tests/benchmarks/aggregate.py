"""aggregate: memory that does not grow with clients, time against reading and hashing the same files, and each rule's
against the mean's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from builders import AGREEMENT
from stages.aggregate import aggregate
from stages.artefacts import adapter_files
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import BaseIdentity
from stages.artefacts.publishing import publish
from stages.parties.party import Party
from stages.workspace.averaging import Aggregation
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from stages.workspace.paths import Workspace
from tests.benchmarks.repeats import shown

LAYERS, WIDTH, RANK = 24, 2048, 16  # OPT-1.3B's shape on q_proj and v_proj: 3,145,728 parameters
OUTLIERS = {"mean": None, "median": None, "trimmed-mean": 8, "clipped-mean": None, "krum": 8, "geometric-median": None}
"""Every rule, and how many of 64 updates it is told may be bad."""
BASE = BaseIdentity(architecture="opt", weights_sha256="0" * 64, tokenizer_sha256="0" * 64)


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    rows, peaks = [], {}
    for clients in (4, 256):
        with tempfile.TemporaryDirectory() as folder:
            workspace = make(Path(folder), clients)
            peaks[clients] = peak_bytes(Path(folder))
            ratios = []
            for _ in range(repeats):
                start = time.perf_counter()
                aggregate(workspace, round=1, overwrite=True)
                middle = time.perf_counter()
                read_and_hash(workspace)
                ratios.append((middle - start) / (time.perf_counter() - middle))
            rows.append((f"time over reading and hashing, {clients} clients", shown(ratios), "<= 2"))
    rows.append(("peak memory, 256 clients over 4", f"{peaks[256] / peaks[4]:.2f}", "<= 1.2"))
    rows.append(("peak memory, 256 clients", f"{peaks[256] / 2**20:.0f} MiB", ""))
    return rows + rules(repeats)


def rules(repeats: int) -> list[tuple[str, str, str]]:
    """Each rule against the mean, in turn on the same updates of 64 clients."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), 64)
        took: dict[str, list[float]] = {rule: [] for rule in OUTLIERS}
        for _ in range(repeats):
            for rule, times in took.items():
                start = time.perf_counter()
                aggregate(ruled(Path(folder), rule), round=1, overwrite=True)
                times.append(time.perf_counter() - start)
        for rule, times in took.items():
            ratios = [one / mean for one, mean in zip(times, took["mean"], strict=True)]
            peak = f"{peak_bytes(Path(folder), rule) / 2**20:.0f} MiB"
            rows.append((f"{rule}: time over the mean's, 64 clients", shown(ratios), "<= 2"))
            rows.append((f"{rule}: peak memory, 64 clients", peak, "<= 307 MiB"))
    return rows[1:]  # the mean over itself


def ruled(folder: Path, rule: str) -> Workspace:
    """The workspace as if this rule had been agreed on."""
    workspace = Workspace(folder)
    settings = Aggregation.model_validate({"rule": rule, "outliers": OUTLIERS[rule]})
    object.__setattr__(workspace.agreement, "aggregation", settings)
    return workspace


def make(folder: Path, clients: int) -> Workspace:
    """A workspace with one round's updates of that many clients, random numbers in the shape of OPT-1.3B's adapter."""
    text = AGREEMENT.replace("clients = 3", f"clients = {clients}").replace("r = 4", f"r = {RANK}")
    (folder / "fedcollm.toml").write_text(text)
    workspace = Workspace(folder)
    rng = np.random.default_rng(1)
    names = [f"model.decoder.layers.{i}.self_attn.{module}" for i in range(LAYERS) for module in ("q_proj", "v_proj")]

    def contents() -> dict[str, bytes]:
        tensors = {}
        for name in names:
            tensors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((RANK, WIDTH), dtype=np.float32)
            tensors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((WIDTH, RANK), dtype=np.float32)
        config = adapter_files.config_bytes(
            workspace.agreement.slm.lora, target_modules=["q_proj", "v_proj"], fan_in_fan_out=False
        )
        return {ADAPTER_CONFIG: config, ADAPTER_WEIGHTS: adapter_files.weights_bytes(tensors)}

    parameters = 2 * len(names) * RANK * WIDTH
    publish(
        workspace.broadcast(1),
        contents(),
        Draft(
            stage="broadcast",
            round=1,
            parents={},
            base=BASE,
            parameters=parameters,
        ),
        by=Party.server(workspace),
    )
    digest = hashlib.sha256((workspace.broadcast(1) / "manifest.json").read_bytes()).hexdigest()
    for client in range(1, clients + 1):
        publish(
            workspace.client_update(1, client),
            contents(),
            Draft(
                stage="client-train",
                round=1,
                parents={"broadcast": digest},
                base=BASE,
                parameters=parameters,
                examples=100,
            ),
            by=Party.client(workspace, client),
        )
    return workspace


def read_and_hash(workspace: Workspace) -> None:
    """The limit: the weights of the broadcast and of every update read and hashed, and nothing else."""
    for path in (workspace.broadcast(1), *workspace.client_updates(1).values()):
        hashlib.sha256((path / ADAPTER_WEIGHTS).read_bytes()).hexdigest()


def peak_bytes(folder: Path, rule: str = "mean") -> int:
    """The largest resident size of a process that aggregates once."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from stages.aggregate import aggregate; from tests.benchmarks.aggregate import ruled\n"
        "aggregate(ruled(Path(sys.argv[1]), sys.argv[2]), round=1, overwrite=True)\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    command = [sys.executable, "-c", code, str(folder), rule, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024
