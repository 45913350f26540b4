"""The command line: what starting costs, `status` on a large federation, `run` against the separate commands."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from builders import AGREEMENT, SHARED_DATA
from stages.artefacts import adapter_files
from stages.artefacts.draft import Draft
from stages.artefacts.manifest import BaseIdentity
from stages.artefacts.publishing import publish
from stages.audit.audit import audit
from stages.parties import names
from stages.parties.party import Party
from stages.workspace.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from stages.workspace.paths import Workspace
from tests.benchmarks.repeats import shown

FEDCOLLM = [sys.executable, "-m", "fedcollm_cli"]
ARC_SCRIPT = Path(__file__).parents[1] / "arc_easy.sh"
BARE = "import torch, transformers, peft"
TORCH = "import torch"
FIRST_STEP = f"""{TORCH}
parameter = torch.nn.Parameter(torch.ones(1))
parameter.sum().backward()
torch.optim.AdamW([parameter]).step()"""
"""With which torch imports its compiler, whatever is trained."""

START = """import fedcollm_cli.main
from stages.runtime import imports
imports.spare()
import stages.client_train, stages.models.adapters, stages.models.loading, stages.training.training
import stages.training.drafts, stages.training.update_norm, transformers.models.gpt2.modeling_gpt2"""
"""All that client-train imports."""

BASE = BaseIdentity(architecture="none", weights_sha256="0" * 64, tokenizer_sha256="0" * 64)


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    bare = [sys.executable, "-c", "import typer, rich.progress, pydantic"]
    ratios = [seconds([*FEDCOLLM, "--help"]) / seconds(bare) for _ in range(repeats)]
    rows = [("--help over importing typer, rich and pydantic", shown(ratios), "")]
    rows += start_over_torch(max(repeats, 5))
    with tempfile.TemporaryDirectory() as folder:
        make_large(Path(folder), clients=1000, rounds=10)
        took = [seconds([*FEDCOLLM, "status", "-w", folder]) for _ in range(repeats)]
        rows.append(("status, 1,000 clients x 10 rounds: seconds", shown(took, ".1f"), ""))
    rows += looking_back(repeats)
    if SHARED_DATA.is_dir():
        rows.append(
            ("run over the same separate commands, 2 rounds x 4 clients", f"{run_over_separate():.2f}", "<= 0.5")
        )
        what = "client-train over importing torch, transformers and PEFT, and training itself"
        rows.append((what, stage_over_bare(repeats), "<= 1.3"))
    return rows


def looking_back(repeats: int) -> list[tuple[str, str, str]]:
    """The commands that read all that a federation has left; comm-cost of a very large one too."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_large(Path(folder), clients=64, rounds=1, layers=96, width=4096)
        ratios = audit_over_reading(Path(folder), repeats)
        rows.append(
            (
                "audit, 64 updates of 3.1 M parameters, over reading and hashing the same files",
                shown(ratios, ".1f"),
                "<= 2",
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        make_large(Path(folder), clients=64, rounds=50)
        what = "audit, 64 clients x 50 rounds, over reading and hashing the same files"
        rows.append((what, shown(audit_over_reading(Path(folder), repeats), ".1f"), "<= 2"))
        goals = {"audit": "", "report": "<= 10", "comm-cost": "<= 2", "status": "", "verify": ""}
        for command, goal in goals.items():
            took = [seconds([*FEDCOLLM, command], Path(folder)) for _ in range(repeats)]
            rows.append((f"{command}, 64 clients x 50 rounds: seconds", shown(took, ".1f"), goal))
    took_of = {}
    for clients in (10_000, 20_000):
        with tempfile.TemporaryDirectory() as folder:
            make_large(Path(folder), clients=clients, rounds=1)
            took_of[clients] = median(seconds([*FEDCOLLM, "comm-cost"], Path(folder)) for _ in range(repeats))
    growth = f"{took_of[20_000]:.1f} s; {took_of[20_000] / took_of[10_000]:.2f}"
    rows.append(("comm-cost, 20,000 clients; the same over 10,000 clients", growth, "<= 2 times"))
    return rows


def audit_over_reading(folder: Path, repeats: int) -> list[float]:
    """The processor's time of an audit over that of reading and hashing the same files, in turns."""
    ratios = []
    for _ in range(repeats):
        start = time.process_time()
        read_and_hash(folder)
        middle = time.process_time()
        audit([folder])
        ratios.append((time.process_time() - middle) / (middle - start))
    return ratios


def read_and_hash(folder: Path) -> None:
    """The limit: every file below a folder read and hashed, and nothing else."""
    for path in folder.rglob("*"):
        if path.is_file():
            hashlib.sha256(path.read_bytes()).hexdigest()


def seconds(command: list[str], folder: Path | None = None) -> float:
    """How long a command takes."""
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def start_over_torch(repeats: int) -> list[tuple[str, str, str]]:
    """Rows on the start of client-train, in seconds of the processor: pairs, taken in turns."""
    codes = {"start": START, "start and a step": f"{START}\n{FIRST_STEP}", "torch": TORCH, "step": FIRST_STEP}
    taken = [{name: cpu_seconds(code) for name, code in codes.items()} for _ in range(repeats)]

    def row(what: str, name: str, peer: str, goal: str) -> tuple[str, str, str]:
        return what, shown([one[name] / one[peer] for one in taken]), goal

    return [
        row("all that client-train imports over importing torch", "start", "torch", "<= 1.5"),
        row("torch's first step of AdamW over importing torch", "step", "torch", ""),
        row("client-train's imports and such a step over torch and the step", "start and a step", "step", ""),
    ]


def cpu_seconds(code: str) -> float:
    """Of a fresh Python that runs this code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_large(folder: Path, *, clients: int, rounds: int, layers: int = 1, width: int = 8) -> None:
    """A finished and sound federation of many clients, with random adapters: by default the smallest, 64 numbers."""
    text = AGREEMENT.replace("clients = 3", f"clients = {clients}").replace("rounds = 2", f"rounds = {rounds}")
    (folder / "fedcollm.toml").write_text(text)
    workspace = Workspace(folder)
    lora = workspace.agreement.slm.lora
    config = adapter_files.config_bytes(lora, target_modules=["q_proj"], fan_in_fan_out=False)
    rng, modules = np.random.default_rng(1), [f"model.layers.{layer}.self_attn.q_proj" for layer in range(layers)]
    shapes = {f"base_model.model.{module}.lora_A.weight": (lora.r, width) for module in modules}
    shapes |= {f"base_model.model.{module}.lora_B.weight": (width, lora.r) for module in modules}

    def put(place: Path, parents: dict[str, str], stage: str, round: int, client: int | None = None) -> str:
        if stage == "broadcast" and round > 1:  # it sends what the round before has made
            weights = (workspace.slm(round - 1) / ADAPTER_WEIGHTS).read_bytes()
        else:
            weights = adapter_files.weights_bytes({name: rng.standard_normal(shape) for name, shape in shapes.items()})
        publish(
            place,
            {ADAPTER_CONFIG: config, ADAPTER_WEIGHTS: weights},
            Draft(
                stage=stage,
                role="llm" if place.name == "llm" else "slm",
                round=round,
                parents=parents,
                base=BASE,
                parameters=2 * layers * width * lora.r,
            ),
            by=Party(workspace, names.of(client)),
        )
        return hashlib.sha256((place / "manifest.json").read_bytes()).hexdigest()

    slm, llm = "", {}
    for t in range(1, rounds + 1):
        broadcast = {"broadcast": put(workspace.broadcast(t), {"slm": slm} if t > 1 else {}, "broadcast", t)}
        updates = {
            f"client-{k}": put(workspace.client_update(t, k), broadcast, "client-train", t, k)
            for k in workspace.clients
        }
        aggregate = {"aggregate": put(workspace.aggregate(t), broadcast | updates, "aggregate", t)} | llm
        llm = {"llm": put(workspace.llm(t), aggregate, "co-distill", t)}
        slm = put(workspace.slm(t), aggregate | {"llm-after": llm["llm"]}, "co-distill", t)


def run_over_separate() -> float:
    """`run` over the separate commands: two rounds of the stories pair on a slice of ARC-Easy, without scores."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepared(Path(temporary) / "study")
        other = shutil.copytree(folder, Path(temporary) / "other")
        separate = 0.0
        for t in ("1", "2"):
            commands = [
                ["broadcast"],
                *(["client-train", "--client", str(k)] for k in range(1, 5)),
                ["aggregate"],
                ["co-distill"],
            ]
            separate += sum(seconds([*FEDCOLLM, *command, "--round", t], folder) for command in commands)
        return seconds([*FEDCOLLM, "run", "--no-scores"], other) / separate


def prepared(folder: Path) -> Path:
    """A study of the stories pair on a slice of ARC-Easy, before its first round."""
    lines = ARC_SCRIPT.read_text().split("\nfedcollm prepare\n")[0] + "\nfedcollm prepare\n"
    subprocess.run(["bash", "-c", lines, "arc", str(SHARED_DATA), str(folder), "200"], check=True, capture_output=True)
    return folder


def stage_over_bare(repeats: int) -> str:
    """A separate client-train over what no program could do without: the imports, and the time in the training loop."""
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepared(Path(temporary) / "study")
        seconds([*FEDCOLLM, "broadcast", "--round", "1"], folder)
        for _ in range(repeats):
            bare = seconds([sys.executable, "-c", BARE])
            took = seconds([*FEDCOLLM, "client-train", "--round", "1", "--client", "1", "--overwrite"], folder)
            log = Workspace(folder).log("client-train", 1, 1).read_text().splitlines()
            ratios.append(took / (bare + json.loads(log[-1])["wall_s"]))
    return shown(ratios)
