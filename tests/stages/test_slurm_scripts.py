"""slurm: the scripts that it writes, as bash and sbatch take them; a real cluster runs them in tests/slurm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import ROOT, Outcome, edit
from federations import SECURE, agreement
from stages.parts.errors import Refused, UsageProblem
from stages.parts.workspace import Workspace
from stages.slurm import slurm

FAKE_SBATCH = """#!/bin/sh
echo "$@" >> sbatch.log
if [ "$(wc -l < sbatch.log)" -gt "${SUBMIT_LIMIT:-99}" ]; then echo QOSMaxSubmitJobPerUserLimit >&2; exit 1; fi
expr 100 + "$(wc -l < sbatch.log)"
"""


def directives(path: Path) -> list[str]:
    """What sbatch reads: the lines of #SBATCH before the first command."""
    return re.findall(r"(?m)^#SBATCH (.*)$", path.read_text())


def write(folder: Path, **flags: object) -> dict[str, Path]:
    only = flags.pop("only", None)
    assert only is None or isinstance(only, str)
    return {path.name: path for path in slurm(Workspace(folder), only=only, flags=flags)}


def with_machine(folder: Path, text: str) -> Path:
    (folder / "machine.toml").write_text(text)
    return folder


def submit(folder: Path, queue: str = "", **environment: object) -> tuple[int, str, str, list[str]]:
    """Run submit.sh with a Slurm that writes down what it is asked: exit code, stdout, stderr, calls of sbatch."""
    bin = folder.parent / "bin"
    bin.mkdir(exist_ok=True)
    programs = {
        "sbatch": FAKE_SBATCH,
        "squeue": f"#!/bin/sh\nprintf '{queue}'\n",
        "fedcollm": f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m fedcollm_cli "$@"\n',
    }
    for name, text in programs.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    (folder / "sbatch.log").unlink(missing_ok=True)
    found = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    found |= {"PATH": f"{bin}:{os.environ['PATH']}"} | {key: str(value) for key, value in environment.items()}
    command = [folder / "slurm/submit.sh"]
    done = subprocess.run(command, capture_output=True, text=True, env=found, check=False, timeout=120)
    log = folder / "sbatch.log"
    return done.returncode, done.stdout, done.stderr, log.read_text().splitlines() if log.exists() else []


def test_options_win_over_the_table_and_become_lines_of_sbatch(workspace_folder: Path) -> None:
    table = '[slurm]\npartition = "gpu"\naccount = "project"\ngpus_per_task = 2\nserver_options = ["--mem=90G"]\n'
    found = write(with_machine(workspace_folder, table), partition="long", mem="32G", time="1-00:00:00", processes=2)
    lines = directives(found["client.sbatch"])
    expected = ["--nodes=1", "--ntasks=2", "--gres=gpu:4", "--mem=32G", "--time=1-00:00:00", "--partition=long"]
    assert lines[-8:] == [*expected, "--account=project", "--signal=USR1@120"]
    assert directives(found["server.sbatch"])[-1] == "--mem=90G"
    assert "--requeue" in lines


@pytest.mark.parametrize(
    ("processes", "expected"), [(1, ["stage.sh", "submit.sh"]), (2, ["rank.sh", "stage.sh", "submit.sh"])]
)
def test_only_the_scripts_that_the_federation_needs_are_written(
    workspace_folder: Path, processes: int, expected: list[str]
) -> None:
    found = write(workspace_folder, processes=processes)
    assert sorted(found) == sorted([*expected, "client.sbatch", "server.sbatch", "evaluate.sbatch"])
    assert {name for name, path in found.items() if os.access(path, os.X_OK)} == {
        n for n in expected if n.endswith(".sh")
    }


def test_each_way_of_running_gives_shell_that_bash_reads_and_no_path_of_this_machine(
    workspace_folder: Path,
) -> None:
    quorum = "min_clients = 2\n"
    ways = [("fedcollm", ""), ("fedavg", quorum), ("standalone", ""), ("fedcollm", SECURE)]
    for method, aggregation in ways:
        (workspace_folder / "fedcollm.toml").write_text(agreement(aggregation=aggregation, method=method))
        flags = {"processes": 2, "window": 2, "cpus_per_task": 4}
        found = slurm(Workspace(workspace_folder), flags=flags, overwrite=True)
        for path in found:
            subprocess.run(["bash", "-n", path], check=True)
            assert str(workspace_folder) not in path.read_text()
            assert "/home" not in path.read_text()
            assert not re.search(r"{[{%#]|[}%#]}", path.read_text())
        names = {path.name for path in found}
        assert ("reveal.sbatch" in names) == ("close.sbatch" in names) == (aggregation == SECURE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "gpu\n#SBATCH --wrap=id"),
        ("partition", "gpu --uid=root"),
        ("account", "$(id)"),
        ("mem", "32 G"),
        ("time", "04:00:00\n"),
        ("time", "tomorrow"),
        ("window", 0),
    ],
)
def test_a_directive_that_is_none_is_refused(workspace_folder: Path, key: str, value: object) -> None:
    with pytest.raises(UsageProblem, match=key):
        write(workspace_folder, **{key: value})
    assert not (workspace_folder / "slurm").exists()


@pytest.mark.parametrize(
    "line",
    [r'options = ["--qos=long\n#SBATCH --wrap=id"]', r'options = ["-p gpu"]', r'setup = ["module load\u2028x\ny"]'],
)
def test_a_line_of_the_table_that_is_two_is_refused(workspace_folder: Path, line: str) -> None:
    with pytest.raises(UsageProblem, match=r"slurm\.(options|setup)"):
        write(with_machine(workspace_folder, f"[slurm]\n{line}\n"))


def test_a_script_that_was_changed_by_hand_is_not_replaced(
    workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    script = write(workspace_folder)["client.sbatch"]
    write(workspace_folder)
    edit(script, "--requeue", "--no-requeue")
    with pytest.raises(Refused, match=r"client\.sbatch is there already"):
        write(workspace_folder)
    assert fedcollm("slurm", "--overwrite", "-w", workspace_folder).code == 0
    assert "--no-requeue" not in script.read_text()


def test_a_site_of_one_client_gets_its_own_scripts(workspace_folder: Path) -> None:
    found = write(workspace_folder, only="client-2")
    assert sorted(found) == ["client.sbatch", "stage.sh", "submit.sh"]
    assert "fedcollm slurm --jobs --only client-2)" in found["submit.sh"].read_text()
    with pytest.raises(UsageProblem, match="no party 'client-9'"):
        write(workspace_folder, only="client-9")


# --- submit.sh, with an sbatch that writes down what it is asked


def dependencies(calls: list[str]) -> list[str]:
    return [(re.findall(r"--dependency=(\S+)", call) or [""])[0] for call in calls]


def test_submit_chains_the_jobs_and_limits_the_array(workspace_folder: Path) -> None:
    write(workspace_folder, parallel=2)
    code, out, _, calls = submit(workspace_folder)
    assert code == 0
    assert dependencies(calls) == ["", *(f"afterok:{number}" for number in range(101, 106))]
    assert all("--kill-on-invalid-dep=yes" in call for call in calls)
    assert calls[1].endswith("--array=1-3%2 --export=ALL,ROUND=1 slurm/client.sbatch")
    assert calls[-1].endswith("--export=ALL,ROUND=2 slurm/evaluate.sbatch")
    assert out.splitlines()[1] == "102 client round 1 clients 1-3"
    assert (workspace_folder / "slurm/jobs.txt").read_text().split() == [str(number) for number in range(101, 107)]


def test_with_a_quorum_the_server_follows_the_clients_whichever_way_they_end(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + "\n[aggregation]\nmin_clients = 2\n")
    write(workspace_folder)
    _, _, _, calls = submit(workspace_folder)
    chained = ["", "afterok:101", "afterok:101,afterany:102", "afterok:103", "afterok:103,afterany:104", "afterok:105"]
    assert dependencies(calls) == chained


def test_submit_refuses_while_its_jobs_are_queued_but_not_for_others_or_for_its_own(workspace_folder: Path) -> None:
    write(workspace_folder)
    assert submit(workspace_folder)[0] == 0
    code, _, err, calls = submit(workspace_folder, queue="104\\n105\\n105\\n9\\n")
    assert (code, calls) == (7, [])
    assert "in the queue: 104 105" in err
    assert submit(workspace_folder, queue="9\\n1030\\n")[0] == 0
    # A job at the end of a window is itself in the queue, and its settings are not for what it submits.
    code, _, _, calls = submit(workspace_folder, queue="104\\n", SLURM_JOB_ID=104, SLURM_ARRAY_TASK_ID=3)
    assert (code, len(calls)) == (0, 6)


def test_submit_stops_where_the_site_takes_no_more_jobs_and_says_how_to_go_on(workspace_folder: Path) -> None:
    write(workspace_folder)
    code, _, err, _ = submit(workspace_folder, SUBMIT_LIMIT=2)
    assert code == 1
    assert "submitted so far: 101 102;" in err
    assert "fedcollm slurm --window 5" in err


def test_submit_says_what_is_missing_and_submits_nothing(workspace_folder: Path) -> None:
    write(workspace_folder)
    (workspace_folder / "models").unlink()
    code, out, err, calls = submit(workspace_folder)
    assert (code, out, calls) == (3, "", [])
    assert "missing here, and compute nodes fetch nothing" in err
    assert not (workspace_folder / "slurm/jobs.txt").read_text()
