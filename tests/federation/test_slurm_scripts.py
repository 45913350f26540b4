"""slurm: the scripts that it writes, as bash and sbatch take them; a real cluster runs them in tests/slurm."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders import Outcome, edit
from federations import SECURE, agreement
from programs import forking_fedcollm
from stages.federation.slurm import slurm
from stages.runtime.errors import Refused, UsageProblem
from stages.workspace.paths import Workspace

FAKE_SBATCH = """#!/bin/sh
echo "$@" >> sbatch.log
if [ "$(wc -l < sbatch.log)" -gt "${SUBMIT_LIMIT:-99}" ]; then echo QOSMaxSubmitJobPerUserLimit >&2; exit 1; fi
expr 100 + "$(wc -l < sbatch.log)"
"""


def directives(path: Path) -> list[str]:
    """What sbatch reads: the lines of #SBATCH before the first command."""
    return re.findall(r"(?m)^#SBATCH (.*)$", path.read_text())


def write(folder: Path, **flags: object) -> dict[str, Path]:
    only, processes = flags.pop("only", None), flags.pop("processes", None)
    found = slurm(Workspace(folder), only=only, processes=processes, flags=flags)  # type: ignore[arg-type]
    return {path.name: path for path in found}


def with_machine(folder: Path, text: str) -> Path:
    (folder / "machine.toml").write_text(text)
    return folder


Submit = Callable[..., tuple[int, str, str, list[str]]]


@pytest.fixture(scope="module")
def submit() -> Iterator[Submit]:
    """Run submit.sh with a Slurm that writes down what it is asked: exit code, stdout, stderr, calls of sbatch."""
    with forking_fedcollm() as program:
        yield functools.partial(_submit, program)


def _submit(
    program: Path, folder: Path, queue: str = "", script: str = "submit.sh", **environment: object
) -> tuple[int, str, str, list[str]]:
    bin = folder.parent / "bin"
    bin.mkdir(exist_ok=True)
    programs = {
        "sbatch": FAKE_SBATCH,
        "squeue": f"#!/bin/sh\nprintf '{queue}'\n",
    }
    for name, text in programs.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    (folder / "sbatch.log").unlink(missing_ok=True)
    found = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    found |= {"PATH": f"{bin}:{program.parent}:{os.environ['PATH']}"}
    found |= {key: str(value) for key, value in environment.items()}
    command = [folder / "slurm" / script]
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
    opening = directives(found["broadcast.sbatch"])
    assert "--ntasks=1" in opening
    assert not [line for line in opening if "gpu:" in line or "90G" in line]
    assert "--requeue" in lines


@pytest.mark.parametrize(
    ("processes", "expected"), [(1, ["stage.sh", "submit.sh"]), (2, ["rank.sh", "stage.sh", "submit.sh"])]
)
def test_only_the_scripts_that_the_federation_needs_are_written(
    workspace_folder: Path, processes: int, expected: list[str]
) -> None:
    found = write(workspace_folder, processes=processes)
    assert sorted(found) == sorted([*expected, "broadcast.sbatch", "client.sbatch", "server.sbatch", "evaluate.sbatch"])
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
        flags = {"window": 2, "cpus_per_task": 4}
        found = slurm(Workspace(workspace_folder), processes=2, flags=flags, overwrite=True)
        for path in found:
            subprocess.run(["bash", "-n", path], check=True)
            assert str(workspace_folder) not in path.read_text()
            assert "/home" not in path.read_text()
            assert not re.search(r"{[{%#]|[}%#]}", path.read_text())
        names = {path.name for path in found}
        assert ("reveal.sbatch" in names) == ("close.sbatch" in names) == (aggregation == SECURE)
        assert ("server.sbatch" in names) == (method != "standalone")


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


def test_submit_chains_the_jobs_and_limits_the_array(workspace_folder: Path, submit: Submit) -> None:
    write(workspace_folder, parallel=2)
    code, out, _, calls = submit(workspace_folder)
    assert code == 0
    assert dependencies(calls) == ["", *(f"afterok:{number}" for number in range(101, 106))]
    assert all("--kill-on-invalid-dep=yes" in call for call in calls)
    assert calls[1].endswith("--array=1-3%2 --export=ALL,ROUND=1 slurm/client.sbatch")
    assert calls[-1].endswith("--export=ALL,ROUND=2 slurm/evaluate.sbatch")
    assert out.splitlines()[1] == "102 client round 1 clients 1-3"
    assert (workspace_folder / "slurm/jobs.txt").read_text().split() == [str(number) for number in range(101, 107)]


@pytest.mark.parametrize(
    ("printed", "number"),
    [
        (r"-----\n  Welcome to Lake3\n--> Verifying job 7 ...OK\n100\n", "100"),
        ("Submitted batch job 100\n", "100"),
        ("100;lake2\n", "100"),
        (r"100\n-----\nHours left of 5000: 57\n", "100"),
        (r"Submitted batch job 100 on cluster lake2\nHours left: 57\n", "100"),
        (r"Job 7 of 9 is taken\n  100;lake2\nThank you, user17\n", "100"),
        ("Welcome\n", None),
    ],
)
def test_a_jobs_number_is_found_in_whatever_a_sites_sbatch_prints(
    workspace_folder: Path, printed: str, number: str | None, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    write(workspace_folder)
    monkeypatch.setitem(globals(), "FAKE_SBATCH", f"#!/bin/sh\necho \"$@\" >> sbatch.log\nprintf -- '{printed}'\n")
    code, _, err, calls = submit(workspace_folder)
    if number is None:
        assert (code, len(calls)) == (1, 1)
        assert "told no number of a job" in err
        return
    assert code == 0
    assert dependencies(calls) == ["", *[f"afterok:{number}"] * 5]


def test_with_a_quorum_the_server_follows_the_clients_whichever_way_they_end(
    workspace_folder: Path, submit: Submit
) -> None:
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + "\n[aggregation]\nmin_clients = 2\n")
    write(workspace_folder)
    _, _, _, calls = submit(workspace_folder)
    chained = ["", "afterok:101", "afterok:101,afterany:102", "afterok:103", "afterok:103,afterany:104", "afterok:105"]
    assert dependencies(calls) == chained


def test_submit_refuses_while_its_jobs_are_queued_but_not_for_others_or_for_its_own(
    workspace_folder: Path, submit: Submit
) -> None:
    write(workspace_folder)
    assert submit(workspace_folder)[0] == 0
    code, _, err, calls = submit(workspace_folder, queue="104\\n105\\n105\\n9\\n")
    assert (code, calls) == (7, [])
    assert "in the queue: 104 105" in err
    assert submit(workspace_folder, queue="9\\n1030\\n")[0] == 0
    # A job at the end of a window is itself in the queue, and its settings are not for what it submits.
    code, _, _, calls = submit(workspace_folder, queue="104\\n", SLURM_JOB_ID=104, SLURM_ARRAY_TASK_ID=3)
    assert (code, len(calls)) == (0, 6)


def test_submit_stops_where_the_site_takes_no_more_jobs_and_says_how_to_go_on(
    workspace_folder: Path, submit: Submit
) -> None:
    write(workspace_folder)
    code, _, err, _ = submit(workspace_folder, SUBMIT_LIMIT=2)
    assert code == 1
    assert "submitted so far: 101 102;" in err
    assert "fedcollm slurm --window 5" in err


def test_submit_says_what_is_missing_and_submits_nothing(workspace_folder: Path, submit: Submit) -> None:
    write(workspace_folder)
    (workspace_folder / "models").unlink()
    code, out, err, calls = submit(workspace_folder)
    assert (code, out, calls) == (3, "", [])
    assert "missing here, and compute nodes fetch nothing" in err
    assert not (workspace_folder / "slurm/jobs.txt").read_text()


# --- a job, with an srun that ends as it is told


def job(folder: Path, script: str, codes: list[int], **environment: object) -> tuple[int, list[str], list[str]]:
    """Run a script of a job: its exit code, what srun was given, and what scontrol was."""
    bin = folder.parent / "bin"
    bin.mkdir(exist_ok=True)
    texts = {
        "srun": 'echo "$@" >> srun.log\nexit "$(echo $CODES | cut -d" " -f "$(wc -l < srun.log)")"\n',
        "scontrol": 'echo "$@" >> scontrol.log\nexit 1\n',  # and so the script goes on to its end
    }
    for name, text in texts.items():
        (bin / name).write_text(f"#!/bin/sh\n{text}")
        (bin / name).chmod(0o755)
    (folder / "slurm/logs").mkdir(exist_ok=True)
    found = os.environ | {
        "PATH": f"{bin}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "8",
        "CODES": " ".join(map(str, codes)),
    }
    found |= {key: str(value) for key, value in environment.items()}
    done = subprocess.run(["bash", f"slurm/{script}"], cwd=folder, env=found, check=False, timeout=60)
    logs = [folder / "srun.log", folder / "scontrol.log"]
    given = [log.read_text().splitlines() if log.exists() else [] for log in logs]
    for log in logs:
        log.unlink(missing_ok=True)
    return done.returncode, given[0], given[1]


def test_a_round_that_lacks_its_broadcast_alone_is_opened_without_a_gpu(workspace_folder: Path) -> None:
    write(with_machine(workspace_folder, 'device = "cuda"\n'), gpus_per_task=1)
    given = job(workspace_folder, "broadcast.sbatch", [0], ROUND=1)[1]
    assert given == ["--ntasks=1 fedcollm broadcast --round 1 --device cpu"]


def test_the_server_ends_a_round_and_opens_the_next(workspace_folder: Path) -> None:
    write(workspace_folder)
    steps = {
        number: [
            given.removeprefix("--ntasks=1 fedcollm ")
            for given in job(workspace_folder, "server.sbatch", [0] * 3, ROUND=number)[1]
        ]
        for number in (1, 2)
    }
    assert steps == {
        1: ["aggregate --round 1", "co-distill --round 1", "broadcast --round 2"],
        2: ["aggregate --round 2", "co-distill --round 2"],
    }


@pytest.mark.parametrize("code", [2, 4, 5, 6])
def test_what_would_fail_again_is_not_tried_again(workspace_folder: Path, code: int) -> None:
    write(workspace_folder)
    assert job(workspace_folder, "client.sbatch", [code], ROUND=1, SLURM_ARRAY_TASK_ID=2) == (
        code,
        ["--ntasks=1 fedcollm client-train --client 2 --round 1"],
        [],
    )


@pytest.mark.parametrize("code", [1, 3, 7, 8, 137, 138])
def test_what_may_pass_is_tried_again_so_many_times(workspace_folder: Path, code: int) -> None:
    write(workspace_folder, retries=2)
    requeued = []
    for _ in range(4):
        ended, _, given = job(workspace_folder, "server.sbatch", [0, code], ROUND=1)
        assert ended == code
        requeued.append(given)
    assert requeued == [["requeue 8"], ["requeue 8"], [], []]


def test_a_job_that_was_stopped_goes_back_into_the_queue_however_often(workspace_folder: Path) -> None:
    write(workspace_folder, retries=0)
    for _ in range(3):
        assert job(workspace_folder, "server.sbatch", [0, 75], ROUND=1)[::2] == (75, ["requeue 8"])


def test_what_has_no_checkpoint_is_not_begun_again_for_ever(workspace_folder: Path) -> None:
    write(workspace_folder, retries=1)
    found = [job(workspace_folder, "evaluate.sbatch", [0, 75], ROUND=2)[::2] for _ in range(2)]
    assert found == [(75, ["requeue 8"]), (75, [])]


def test_a_task_of_an_array_puts_itself_back_and_not_the_others(workspace_folder: Path) -> None:
    write(workspace_folder)
    last = {"SLURM_JOB_ID": 5, "SLURM_ARRAY_JOB_ID": 5, "SLURM_ARRAY_TASK_ID": 3}  # the last has the array's own number
    assert job(workspace_folder, "client.sbatch", [75], ROUND=1, **last)[2] == ["requeue 5_3"]


def test_scores_pass_over_a_client_whose_adapter_is_not_here(workspace_folder: Path) -> None:
    write(workspace_folder)
    code, given, requeued = job(workspace_folder, "evaluate.sbatch", [0, 0, 0, 0, 0, 3, 0], ROUND=2)
    assert (code, len(given), requeued) == (0, 7, [])
    assert given[-1].endswith("evaluate --round 2 --client 3")
    assert job(workspace_folder, "evaluate.sbatch", [0, 0, 3], ROUND=2)[::2] == (
        3,
        ["requeue 8"],
    )  # the server's is missed


def test_a_quorums_average_is_taken_once(workspace_folder: Path) -> None:
    toml = workspace_folder / "fedcollm.toml"
    toml.write_text(toml.read_text() + "\n[aggregation]\nmin_clients = 2\n")
    write(workspace_folder)
    assert len(job(workspace_folder, "server.sbatch", [0] * 3, ROUND=1)[1]) == 3
    Workspace(workspace_folder).aggregate(1).mkdir(parents=True)
    assert "aggregate" not in "".join(job(workspace_folder, "server.sbatch", [0] * 2, ROUND=1)[1])


def test_a_round_is_closed_only_where_the_close_is_there(workspace_folder: Path) -> None:
    (workspace_folder / "fedcollm.toml").write_text(agreement(aggregation=SECURE))
    write(workspace_folder)
    assert job(workspace_folder, "close.sbatch", [3], ROUND=1)[0] == 3  # too few updates
    Workspace(workspace_folder).close(1).mkdir(parents=True)
    assert job(workspace_folder, "close.sbatch", [3], ROUND=1)[::2] == (0, [])


def test_training_stages_run_on_the_processes_asked_for_and_others_on_one(workspace_folder: Path) -> None:
    write(with_machine(workspace_folder, "processes = 4\n"))
    _, (aggregate, co_distill, _), _ = job(workspace_folder, "server.sbatch", [0] * 3, ROUND=1)
    assert aggregate == "--ntasks=1 fedcollm aggregate --round 1"
    assert co_distill.startswith("--ntasks=4 ")
    assert co_distill.endswith(" slurm/rank.sh fedcollm co-distill --round 1 --processes 4")
    shown = "import os; print(*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')))"
    as_srun = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    rank = [workspace_folder / "slurm/rank.sh", sys.executable, "-c", shown]
    assert (
        subprocess.run(rank, env=os.environ | as_srun, capture_output=True, text=True, check=True).stdout == "3 1 4\n"
    )


@pytest.mark.parametrize("processes", [1, 4])
def test_in_two_phases_each_capture_is_for_one_process(workspace_folder: Path, processes: int) -> None:
    write(with_machine(workspace_folder, f"processes = {processes}\n[slurm]\ntwo_phases = true\n"))
    _, (_, llm, slm, train, _), _ = job(workspace_folder, "server.sbatch", [0] * 5, ROUND=1)
    assert llm == "--ntasks=1 fedcollm co-distill --round 1 --phase capture --model llm"
    assert slm == "--ntasks=1 fedcollm co-distill --round 1 --phase capture --model slm"
    assert train.startswith(f"--ntasks={processes} ")
    assert " fedcollm co-distill --round 1 --phase train" in train


def test_lines_that_bring_the_program_into_path_come_first_and_may_be_careless(
    workspace_folder: Path, submit: Submit
) -> None:
    careless = 'setup = ["export PLACE=$NOT_SET/bin", "false"]'
    write(with_machine(workspace_folder, f"[slurm]\n{careless}\n"))
    assert job(workspace_folder, "client.sbatch", [0], ROUND=1, SLURM_ARRAY_TASK_ID=2)[0] == 0
    assert submit(workspace_folder)[0] == 0


# --- FedMKT and its baselines


def with_method(folder: Path, method: str) -> Path:
    edit(folder / "fedcollm.toml", 'method = "fedmkt"', f'method = "{method}"')
    return folder


def steps(folder: Path, script: str, **environment: object) -> list[str]:
    """The commands that a script gives."""
    code, given, _ = job(folder, script, [0] * 9, **environment)
    assert code == 0
    return [line.rpartition(" fedcollm ")[2] for line in given]


IN_PUBLIC = {
    "fedmkt": {"client.sbatch", "distill.sbatch", "server.sbatch", "evaluate.sbatch"},
    "llm2slm": {"client.sbatch", "distill.sbatch", "server.sbatch", "evaluate.sbatch"},
    "standalone-public": {"client.sbatch", "distill.sbatch", "evaluate.sbatch"},
    "standalone": {"client.sbatch", "evaluate.sbatch"},
}


@pytest.mark.parametrize("method", IN_PUBLIC)
def test_models_of_their_own_have_the_scripts_of_their_method(method: str, unlike_folder: Path) -> None:
    found = write(with_method(unlike_folder, method), processes=2, window=2)
    for path in found.values():
        subprocess.run(["bash", "-n", path], check=True)
        assert not re.search(r"{[{%#]|[}%#]}", path.read_text())
    assert {name for name in found if name.endswith(".sbatch")} == IN_PUBLIC[method] | {"window.sbatch"}


def test_a_client_aligns_once_trains_and_tells_and_later_learns(unlike_folder: Path) -> None:
    write(unlike_folder)
    late = steps(unlike_folder, "client.sbatch", ROUND=2, SLURM_ARRAY_TASK_ID=3)
    assert late == ["align --client 3", "client-train --client 3 --round 2", "share-knowledge --client 3 --round 2"]
    first = steps(unlike_folder, "client.sbatch", ROUND=1, SLURM_ARRAY_TASK_ID=3)
    assert first == ["align --client 3", "client-train --client 3 --round 1", "share-knowledge --client 3 --round 1"]
    Workspace(unlike_folder).vocabulary(3).mkdir(parents=True)
    assert steps(unlike_folder, "client.sbatch", ROUND=2, SLURM_ARRAY_TASK_ID=3) == late[1:]
    learned = steps(unlike_folder, "distill.sbatch", ROUND=2, SLURM_ARRAY_TASK_ID=3)
    assert learned == ["client-distill --client 3 --round 2"]


def test_the_server_teaches_its_llm_and_tells(unlike_folder: Path) -> None:
    write(unlike_folder)
    told = "share-knowledge --server --round {}".format
    assert steps(unlike_folder, "server.sbatch", ROUND=1) == ["align --server", "co-distill --round 1", told(1)]
    assert steps(unlike_folder, "server.sbatch", ROUND=2) == ["co-distill --round 2", told(2)]


def test_what_a_method_of_one_teacher_or_of_none_leaves_out(unlike_folder: Path) -> None:
    write(with_method(unlike_folder, "llm2slm"))
    assert steps(unlike_folder, "server.sbatch", ROUND=1) == ["align --server", "share-knowledge --server --round 1"]
    assert len(steps(unlike_folder, "client.sbatch", ROUND=1, SLURM_ARRAY_TASK_ID=1)) == 2
    shutil.rmtree(unlike_folder / "slurm")
    edit(unlike_folder / "fedcollm.toml", "llm2slm", "standalone-public")
    write(unlike_folder)
    trained = ["client-train --client 1 --round 1"]
    assert steps(unlike_folder, "client.sbatch", ROUND=1, SLURM_ARRAY_TASK_ID=1) == trained


def test_an_llm_that_has_learned_from_a_quorum_is_not_taught_again(unlike_folder: Path) -> None:
    edit(unlike_folder / "fedcollm.toml", "[evaluation]", "[aggregation]\nmin_clients = 2\n[evaluation]")
    write(unlike_folder)
    assert "co-distill --round 2" in steps(unlike_folder, "server.sbatch", ROUND=2)
    Workspace(unlike_folder).llm(2).mkdir(parents=True)
    assert steps(unlike_folder, "server.sbatch", ROUND=2) == ["share-knowledge --server --round 2"]


def test_learning_goes_on_from_its_checkpoint_and_runs_on_the_processes_asked_for(unlike_folder: Path) -> None:
    write(unlike_folder, retries=0, processes=2)
    given = {"ROUND": 1, "SLURM_ARRAY_JOB_ID": 5, "SLURM_ARRAY_TASK_ID": 3}
    code, called, requeued = job(unlike_folder, "distill.sbatch", [75], **given)
    assert (code, requeued) == (75, ["requeue 5_3"])
    assert called[0].startswith("--ntasks=2 ")
    assert called[0].endswith(" fedcollm client-distill --client 3 --round 1 --processes 2")
    assert job(unlike_folder, "client.sbatch", [0, 0, 0], **given)[1][2].startswith("--ntasks=1 fedcollm share")


def test_each_party_scores_the_models_that_it_has(unlike_folder: Path) -> None:
    write(unlike_folder)
    bases = [f"evaluate --zero-shot {of}" for of in ("--model slm", "--client 2", "--client 3", "--model llm")]
    last = [f"evaluate --round 2 {of}" for of in ("--model llm", "--client 1", "--client 2", "--client 3")]
    assert steps(unlike_folder, "evaluate.sbatch", ROUND=2) == bases + last
    for only, of in (("server", "--model llm"), ("client-2", "--client 2")):
        shutil.rmtree(unlike_folder / "slurm")
        found = write(unlike_folder, only=only)
        scores = [f"evaluate --zero-shot {of}", f"evaluate --round 2 {of}"]
        assert steps(unlike_folder, "evaluate.sbatch", ROUND=2) == scores
        assert ("client.sbatch" in found) == ("distill.sbatch" in found) == (only == "client-2")
        assert ("server.sbatch" in found) == (only == "server")


def test_an_average_ends_a_round_opens_the_next_and_needs_a_gpu_for_its_gate_alone(equal_folder: Path) -> None:
    found = write(equal_folder, gpus_per_task=1)
    assert {name for name in found if name.endswith(".sbatch")} == IN_PUBLIC["fedmkt"] | {
        "broadcast.sbatch",
        "average.sbatch",
    }
    assert steps(equal_folder, "average.sbatch", ROUND=1) == ["aggregate --round 1", "broadcast --round 2"]
    assert steps(equal_folder, "average.sbatch", ROUND=2) == ["aggregate --round 2"]
    assert "gpu:" not in found["average.sbatch"].read_text()
    assert "gpu:" in found["server.sbatch"].read_text()
    shutil.rmtree(equal_folder / "slurm")
    edit(equal_folder / "fedcollm.toml", "average = true", "average = true\nmin_clients = 2\ngate = 0.1")
    assert "gpu:" in write(equal_folder, gpus_per_task=1)["average.sbatch"].read_text()
    Workspace(equal_folder).aggregate(1).mkdir(parents=True)
    assert steps(equal_folder, "average.sbatch", ROUND=1) == ["broadcast --round 2"]
    last = [f"evaluate --round 2 --model {model}" for model in ("aggregate", "llm")]
    assert steps(equal_folder, "evaluate.sbatch", ROUND=2)[2:4] == last


def test_phases_that_a_method_has_not_are_passed_over_with_a_word(unlike_folder: Path) -> None:
    with_machine(unlike_folder, '[slurm]\ntwo_phases = true\nclient_options = ["--mem=90G"]\n')
    said: list[str] = []
    found = slurm(Workspace(unlike_folder), report=lambda event: said.append(event.text))
    assert said == [
        "slurm.two_phases is passed over: with method fedmkt no job has two models in memory",
    ]
    assert "--phase" not in (unlike_folder / "slurm/server.sbatch").read_text()
    assert {path.name for path in found if "--mem=90G" in path.read_text()} == {"client.sbatch", "distill.sbatch"}


def test_submit_lets_each_client_wait_for_its_own_task_alone(unlike_folder: Path, submit: Submit) -> None:
    write(unlike_folder, parallel=2)
    code, out, _, calls = submit(unlike_folder)
    assert code == 0
    assert dependencies(calls) == [
        *("", "afterok:101", "aftercorr:101,afterok:102", "aftercorr:103"),
        *("afterok:102,afterok:104", "aftercorr:104,afterok:105", "afterok:105,afterok:104,afterok:106"),
    ]
    assert calls[2].endswith("--array=1-3%2 --export=ALL,ROUND=1 slurm/distill.sbatch")
    assert "--array" not in calls[1]
    assert out.splitlines()[1:3] == ["102 server round 1", "103 distill round 1 clients 1-3"]


# --- a study


def submitted(folder: Path) -> list[str]:
    """The calls of sbatch for one federation of a study, which are forgotten then."""
    log = folder / "sbatch.log"
    calls = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return calls


def test_a_sweep_over_slurm_is_a_chain_of_jobs_for_each_combination(
    workspace_folder: Path, fedcollm: Callable[..., Outcome], submit: Submit
) -> None:
    with_machine(workspace_folder, '[slurm]\npartition = "short"\n')
    words = ("sweep", "--set", "distillation.lambda_slm=0.0,0.5", "-w", workspace_folder)
    assert fedcollm(*words, "--collect").code == 3
    found = fedcollm(*words, "--slurm")
    assert (found.code, found.out) == (0, "slurm/sweep.sh\n"), found.err
    points = [workspace_folder / f"sweeps/lambda_slm={value}" for value in ("0.0", "0.5")]
    for point in points:
        assert "--partition=short" in directives(point / "slurm/client.sbatch")
        assert not (point / "exchange").exists()
    code, out, _, here = submit(workspace_folder, script="sweep.sh")
    assert (code, here) == (0, []), "of the workspace itself nothing is submitted"
    assert [line for line in out.splitlines() if line.startswith("sweeps/")] == [
        f"sweeps/{point.name}" for point in points
    ]
    for point in points:
        calls = submitted(point)
        assert [call.split()[-1] for call in calls] == [
            f"slurm/{script}.sbatch" for script in ("broadcast", *["client", "server"] * 2, "evaluate")
        ]
        assert dependencies(calls) == ["", *(f"afterok:{number}" for number in range(101, 106))]

    # Again: what is in the queue is passed over, what is not is submitted.
    (points[1] / "slurm/jobs.txt").unlink()
    code, _, err, _ = submit(workspace_folder, script="sweep.sh", queue="104\\n")
    assert (code, [len(submitted(point)) for point in points]) == (0, [0, 6])
    assert "jobs of this workspace are in the queue: 104" in err

    # Where the site takes no more jobs it stops.
    code, _, err, _ = submit(workspace_folder, script="sweep.sh", SUBMIT_LIMIT=2)
    assert (code, [len(submitted(point)) for point in points]) == (1, [3, 0])

    again = "fedcollm sweep --set distillation.lambda_slm=0.0,0.5 --collect"
    assert again in (workspace_folder / "slurm/sweep.sh").read_text()
    assert fedcollm(*words, "--slurm", "--collect").code == 2


def test_a_comparison_over_slurm_is_a_chain_of_jobs_for_each_method_and_seed(
    workspace_folder: Path, fedcollm: Callable[..., Outcome], submit: Submit
) -> None:
    write(workspace_folder, time="60")
    own = (workspace_folder / "slurm/submit.sh").stat().st_mtime_ns
    words = ("compare", "--seeds", "7,8", "--methods", "fedavg,fedcollm", "-w", workspace_folder)
    found = fedcollm(*words, "--slurm")
    assert (found.code, found.out) == (0, "slurm/compare.sh\n"), found.err
    assert "--time=60" in directives(workspace_folder / "slurm/client.sbatch"), "scripts that are there are left alone"
    told = "slurm/client.sbatch is there already, and differs: it is left alone, and may be of earlier settings"
    assert f"warning: {told}; `fedcollm slurm --overwrite` writes it anew" in found.err
    assert (workspace_folder / "slurm/submit.sh").stat().st_mtime_ns == own
    code, out, _, _ = submit(workspace_folder, script="compare.sh")
    assert code == 0
    places = [".", "baselines/fedavg", "seeds/seed-8", "seeds/seed-8/baselines/fedavg"]
    assert [line for line in out.splitlines() if " " not in line] == places
    trained = ["broadcast", *["client", "server"] * 2, "evaluate"]
    for place in places:
        calls = submitted(workspace_folder / place)
        assert [call.split("/")[-1].removesuffix(".sbatch") for call in calls] == trained
    assert "--collect" in (workspace_folder / "slurm/compare.sh").read_text()
    assert fedcollm("compare", "--slurm", "-w", workspace_folder).code == 2
