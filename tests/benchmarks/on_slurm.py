"""A cluster: what Slurm's queue adds to a federation's longest chain, and how long submit.sh looks at a large one."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from builders import AGREEMENT, ROOT, TASK, make_base_models, make_workspace, questions, rows, write_rows
from clusters import Cluster, absent, cluster
from tests.benchmarks.commands import FEDCOLLM, make_large, seconds
from tests.benchmarks.repeats import shown

CLIENTS, ROUNDS = 4, 3
ONE_CORE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def measure(repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table: what, measured, goal."""
    found = large(repeats)
    if reason := absent():
        return [*found, (f"submit.sh on a cluster: {reason}", "", "")]
    took, as_it_ran, alone = queued()
    what = f"submit.sh, {ROUNDS} rounds x {CLIENTS} clients on {CLIENTS} nodes of this machine, over the longest chain"
    found.append((f"{what}, as its jobs took", f"{took / as_it_ran:.2f} ({took:.0f} s)", "<= 1.5"))
    found.append((f"{what}, its commands given one by one", f"{took / alone:.2f}", "<= 1.5"))
    return found


def large(repeats: int) -> list[tuple[str, str, str]]:
    """A federation of 64 clients x 50 rounds, of which half are done."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "large"
        folder.mkdir()
        make_large(folder, clients=64, rounds=50)
        for number in range(26, 51):
            shutil.rmtree(folder / f"exchange/round-{number:04d}")
            shutil.rmtree(folder / f"private/server/round-{number:04d}")
        for client in range(1, 65):
            write_rows(folder / f"private/client-{client}/train.jsonl", rows(1))
        write_rows(folder / "private/server/auxiliary.jsonl", rows(1))
        for role in ("slm", "llm"):  # as far as anybody looks before a job runs
            (folder / "models" / role).mkdir(parents=True)
            for name in ("config.json", "model.safetensors"):
                (folder / "models" / role / name).write_text("{}")
        _add_task(folder)
        bin = _programs(Path(temporary) / "bin")
        (bin / "sbatch").write_text("#!/bin/sh\necho 1\n")
        (bin / "squeue").write_text("#!/bin/sh\n")
        for path in bin.iterdir():
            path.chmod(0o755)
        seconds([*FEDCOLLM, "slurm", "--quiet"], folder)
        submit = ["env", f"PATH={bin}:/usr/bin:/bin", "slurm/submit.sh"]
        asked = {
            "status": [*FEDCOLLM, "status"],
            "slurm --jobs": [*FEDCOLLM, "slurm", "--jobs"],
            "submit.sh with an sbatch that does nothing": submit,
        }
        found = {what: [seconds(command, folder) for _ in range(repeats)] for what, command in asked.items()}
        return [(f"{what}, 64 clients x 50 rounds: seconds", shown(took, ".1f"), "") for what, took in found.items()]


def queued() -> tuple[float, float, float]:
    """Seconds of a federation by submit.sh, of its longest chain as its jobs took, and of that by single commands."""
    with tempfile.TemporaryDirectory() as temporary, cluster(nodes=CLIENTS) as slurm:
        folder = _federation(Path(temporary))
        slurm.environment |= ONE_CORE | {"PATH": f"{_programs(Path(temporary) / 'bin')}:{slurm.environment['PATH']}"}
        alone = shutil.copytree(folder, Path(temporary) / "alone", symlinks=True)
        slurm.call("fedcollm", "slurm", "--time", "30", "--mem", "2000", cwd=folder)
        start = time.perf_counter()
        slurm.call("slurm/submit.sh", cwd=folder)
        slurm.wait_until(lambda: not slurm.queue(), within_s=1200)
        took = time.perf_counter() - start
        assert (folder / f"private/server/round-{ROUNDS:04d}/slm").exists()
        as_it_ran = sum(_durations(slurm).values())
        return took, as_it_ran, _longest_chain(slurm, alone)


def _durations(slurm: Cluster) -> dict[int, float]:
    """Seconds of each job, of an array those of its longest task."""
    found: dict[int, float] = {}
    for line in slurm.call("scontrol", "show", "jobs", "--oneliner").splitlines():
        fields = dict(re.findall(r"(\w+)=(\S+)", line))
        began, ended = (datetime.fromisoformat(fields[name]) for name in ("StartTime", "EndTime"))
        number = int(fields.get("ArrayJobId", fields["JobId"]))
        found[number] = max(found.get(number, 0.0), (ended - began).total_seconds())
    return found


def _longest_chain(slurm: Cluster, folder: Path) -> float:
    """The same commands one after another on this machine, of each round's clients the slowest."""

    def one(*words: object) -> float:
        start = time.perf_counter()
        slurm.call("fedcollm", *words, cwd=folder)
        return time.perf_counter() - start

    took = 0.0
    for number in range(1, ROUNDS + 1):
        took += one("broadcast", "--round", number)
        took += max(one("client-train", "--client", k, "--round", number) for k in range(1, CLIENTS + 1))
        took += one("aggregate", "--round", number) + one("co-distill", "--round", number)
    return took


def _federation(top: Path) -> Path:
    """Tiny models: a stage is mostly what Python and torch take to start, which is the worst case for a queue."""
    (top / "base").mkdir()
    folder = make_workspace(top / "study", make_base_models(top / "base"))
    write_rows(folder / "private/client-4/train.jsonl", rows(12, start=48))
    text = AGREEMENT.replace("clients = 3", f"clients = {CLIENTS}").replace("rounds = 2", f"rounds = {ROUNDS}")
    (folder / "fedcollm.toml").write_text(text.replace('tasks = ["colours"]', "tasks = []"))
    return folder


def _add_task(folder: Path) -> None:
    (folder / "tasks").mkdir()
    (folder / "tasks/colours.yaml").write_text(TASK)
    for part in ("train", "test"):
        write_rows(folder / f"data/{part}.jsonl", questions(12))  # type: ignore[arg-type]


def _programs(bin: Path) -> Path:
    """A folder for PATH in which fedcollm is this one."""
    bin.mkdir()
    (bin / "fedcollm").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m fedcollm_cli "$@"\n')
    (bin / "fedcollm").chmod(0o755)
    return bin
