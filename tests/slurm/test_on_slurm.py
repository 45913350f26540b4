"""Whole federations on a real Slurm of four nodes on this machine, by what `fedcollm slurm` writes, through faults."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders import ROOT, adapters, edit, make_study, make_workspace, rows, write_rows
from clusters import Cluster, absent, cluster
from federations import agreement, enrol, with_keys
from processes import SECONDS_FOR_A_STEP
from programs import forking_fedcollm
from stages.runtime.errors import INTERRUPTED_EXIT_CODE
from stages.workspace.paths import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(absent()), reason=f"no Slurm here: {absent()}")]
PATIENCE_S = 300.0
SLOW_STEP_S = 4

FEDCOLLM = f"""#!/bin/sh
# fedcollm; but, each once, client 2 is killed in round 1, and clients 1 and 4 are slow in round 2.
once() {{ mkdir "$FAULTS/$1" 2>/dev/null; }}
case "$*" in
    "client-train --client 2 --round 1") once killed && kill -9 $$ ;;
    "client-train --client 1 --round 2" | "client-train --client 4 --round 2")
        once "slow-$3" && export {SECONDS_FOR_A_STEP}={SLOW_STEP_S} ;;
esac
exec PROGRAM "$@"
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Cluster]:
    """Four nodes, and jobs that find this fedcollm, with faults to come."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "faults").mkdir()
    with forking_fedcollm() as program, cluster(nodes=4) as found:
        (tmp_path / "bin/fedcollm").write_text(FEDCOLLM.replace("PROGRAM", str(program)))
        (tmp_path / "bin/fedcollm").chmod(0o755)
        own = {"FAULTS": str(tmp_path / "faults"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        found.environment |= own | {"PATH": f"{tmp_path / 'bin'}:{found.environment['PATH']}"}
        yield found


def four_clients(folder: Path, base_models: Path, text: str) -> Path:
    make_workspace(folder, base_models)
    write_rows(folder / "private/client-4/train.jsonl", rows(12, start=48))
    (folder / "fedcollm.toml").write_text(text)
    edit(folder / "fedcollm.toml", 'tasks = ["colours"]', "tasks = []")
    return folder


def log(folder: Path, script: str, client: int) -> str:
    """What the tasks of one client have said, in all rounds."""
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"slurm/logs/*-{script}-*_{client}.log")))


def settled(slurm: Cluster, made: Path) -> Callable[[], bool]:
    """Whether something is made; the queue must not run empty before."""

    def look() -> bool:
        is_empty = not slurm.queue()
        assert made.exists() or not is_empty, f"the chain ended without {made}"
        return made.exists() and is_empty

    return look


def test_four_clients_and_three_rounds_survive_faults_and_end_in_the_bytes_of_run(
    slurm: Cluster, tmp_path: Path, base_models: Path
) -> None:
    text = agreement(aggregation="", clients=4, rounds=3).replace("steps = 6", "steps = 12")
    folder = four_clients(tmp_path / "study", base_models, text)
    (folder / "machine.toml").write_text("checkpoint_steps = 1\n")
    alone = shutil.copytree(folder, tmp_path / "alone", symlinks=True)
    slurm.call("fedcollm", "slurm", "--time", "10", "--mem", "2000", "--window", 2, "--gpus-per-task", 1, cwd=folder)
    slurm.call("slurm/submit.sh", cwd=folder)

    # Round 1: a client's process is killed, and the controller is away for a moment.
    slurm.wait_until((tmp_path / "faults/killed").exists, within_s=PATIENCE_S)
    slurm.stop_controller()
    slurm.start_controller()
    with pytest.raises(AssertionError, match=r": 7: not submitted twice"):
        slurm.call("slurm/submit.sh", cwd=folder)

    # Round 2: client 1's node is lost, and client 4's time is nearly over, while both train.
    checkpoints = [Workspace(folder).unfinished("client-train", 2, client) for client in (1, 4)]
    slurm.wait_until(lambda: all(any(place.rglob("checkpoint-*")) for place in checkpoints), within_s=PATIENCE_S)
    queue = "\n".join(slurm.queue("%i %M %N"))
    ((array, node),) = re.findall(r"(?m)^(\d+)_1 \S+ node(\d)$", queue)
    (minutes,) = re.findall(r"(?m)^\d+_4 (\d+):\d\d node\d$", queue)
    limit = int(minutes) + 2  # within the two minutes of which Slurm tells the job; it looks every half minute
    slurm.call("scontrol", "update", f"JobId={array}_4", f"TimeLimit={limit}")
    slurm.cut_power(int(node))
    slurm.wait_until(lambda: "back into the queue" in log(folder, "client", 4), within_s=PATIENCE_S)
    slurm.call("scontrol", "update", f"JobId={array}_4", "TimeLimit=10")
    command = ["fedcollm", "run", "--no-scores", "--quiet"]
    with subprocess.Popen(command, cwd=alone, env=slurm.environment) as expected:
        slurm.wait_until(settled(slurm, folder / "private/server/round-0003/slm"), within_s=PATIENCE_S)

    assert expected.returncode == 0
    assert adapters(folder) == adapters(alone)
    assert "exit code 137: back into the queue" in log(folder, "client", 2)
    assert "Restarts=1 " in slurm.call("scontrol", "show", "job", f"{array}_1", "--oneliner")
    assert "Restarts=0 " in slurm.call("scontrol", "show", "job", f"{array}_3", "--oneliner")
    stopped = log(folder, "client", 4)
    assert re.search(rf"Exited with exit code {INTERRUPTED_EXIT_CODE}|User defined signal 1", stopped)
    assert "back into the queue" not in log(folder, "client", 3)
    restarted = slurm.call("fedcollm", "slurm", "--jobs", cwd=folder)
    assert "nothing is left to do" in restarted


def test_secure_aggregation_closes_over_a_quorum_and_is_revealed_by_its_survivors(
    slurm: Cluster, tmp_path: Path, base_models: Path
) -> None:
    quorum = 'mode = "secure"\nmin_clients = 3\n'
    text = agreement(aggregation=quorum, clients=4, rounds=1, method="fedavg")
    folder = with_keys(four_clients(tmp_path / "study", base_models, text), tmp_path / "keys")
    enrol(Workspace(folder), clients=(1, 2, 3, 4))
    (folder / "private/client-4/train.jsonl").write_text("no JSON\n")
    slurm.call("fedcollm", "slurm", "--time", "10", "--mem", "2000", cwd=folder)
    slurm.call("slurm/submit.sh", cwd=folder)
    slurm.wait_until(settled(slurm, Workspace(folder).aggregate(1)), within_s=PATIENCE_S)
    for client in (1, 2, 3):
        assert Workspace(folder).reveal(1, client).exists()
    assert not Workspace(folder).client_update(1, 4).exists()
    assert "line 1 of train.jsonl: not JSON" in log(folder, "client", 4)
    assert "back into the queue" not in log(folder, "client", 4)
    slurm.call("fedcollm", "verify", cwd=folder)


def test_fedmkt_goes_on_without_a_client_that_cannot_and_cancels_that_ones_tasks_alone(
    slurm: Cluster, unlike_folder: Path, unlike_once: Path
) -> None:
    toml = unlike_folder / "fedcollm.toml"
    edit(toml, 'tasks = ["colours"]', "tasks = []")
    edit(toml, "[evaluation]", "[aggregation]\nmin_clients = 2\n[evaluation]")
    edit(toml, "rounds = 2", "rounds = 1")
    (unlike_folder / "private/client-3/train.jsonl").write_text("no JSON\n")
    slurm.call("fedcollm", "slurm", "--time", "10", "--mem", "2000", cwd=unlike_folder)
    submitted = slurm.call("slurm/submit.sh", cwd=unlike_folder)
    here = Workspace(unlike_folder)
    slurm.wait_until(settled(slurm, here.client_adapter(1, 1)), within_s=PATIENCE_S)
    assert here.client_adapter(1, 2).exists()
    told = "exchange/round-0001/client-2/knowledge.safetensors"
    assert (unlike_folder / told).read_bytes() == (unlike_once / told).read_bytes()
    assert not here.knowledge(1, 3).exists()
    assert "line 1 of train.jsonl: not JSON" in log(unlike_folder, "client", 3)
    ((array,),) = [re.findall(r"(?m)^(\d+) distill round 1 clients 1-3$", submitted)]
    ended = slurm.call("scontrol", "show", "job", f"{array}_3", "--oneliner")
    assert re.search(r"JobState=CANCELLED Reason=DependencyNeverSatisfied", ended)


def test_averaged_clients_of_fedmkt_wait_for_the_average_and_end_in_the_bytes_of_run(
    slurm: Cluster, equal_folder: Path, equal_once: Path
) -> None:
    edit(equal_folder / "fedcollm.toml", 'tasks = ["colours"]', "tasks = []")
    slurm.call("fedcollm", "slurm", "--time", "10", "--mem", "2000", cwd=equal_folder)
    submitted = slurm.call("slurm/submit.sh", cwd=equal_folder)
    assert [line.split()[1] for line in submitted.splitlines()] == [
        "broadcast",
        *["client", "server", "distill", "average"] * 2,
    ]
    here = Workspace(equal_folder)
    slurm.wait_until(settled(slurm, here.aggregate(2)), within_s=PATIENCE_S)
    for path in equal_once.glob("*/**/*.safetensors"):
        if "models" not in path.parts:
            assert path.read_bytes() == (equal_folder / path.relative_to(equal_once)).read_bytes(), path


def test_a_sweep_spread_over_a_cluster_gives_the_table_of_one_machine(
    slurm: Cluster, tmp_path: Path, base_models: Path
) -> None:
    (tmp_path / "faults/killed").mkdir()  # none here
    folder = make_study(tmp_path / "study", base_models)
    edit(folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    (folder / "machine.toml").write_text('[slurm]\ntime = "10"\nmem = "2000"\n')
    alone = shutil.copytree(folder, tmp_path / "alone", symlinks=True)
    words = ("fedcollm", "sweep", "--set", "distillation.lambda_slm=0.0,4.0", "--quiet")
    slurm.call(*words, "--slurm", cwd=folder)
    slurm.call("slurm/sweep.sh", cwd=folder)
    assert len({line.split()[0] for line in slurm.queue("%F %j") if "broadcast" in line}) == 2, "two chains at once"
    slurm.call(*words, cwd=alone)
    slurm.wait_until(lambda: not slurm.queue(), within_s=PATIENCE_S)
    there, here = (slurm.call(*words, "--json", "--collect", cwd=place) for place in (folder, alone))
    assert there == here
    assert json.loads(there)["axes"] == ["distillation.lambda_slm"]
