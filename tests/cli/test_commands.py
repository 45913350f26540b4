"""The command line as a user meets it: help that teaches, workspaces found, results on stdout and talk on stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builders import ROOT, Outcome, edit, published, rows, write_rows
from command_line import command_line
from fedcollm_cli import __version__
from programs import forking_fedcollm
from stages.artefacts import records
from stages.workspace.paths import Workspace

COMMANDS = sorted(command_line().commands)
READS = set(COMMANDS) - {"init", "demo", "keys"}
WRITES = set(COMMANDS) - {"status", "demo", "compare", "plan", "comm-cost", "audit", "diff"}
STAGES = {
    "broadcast": ("broadcast --round 1", "exchange/round-0001/broadcast"),
    "client-train": ("client-train --client 2 --round 1", "exchange/round-0001/client-2"),
    "aggregate": ("aggregate --round 1", "private/server/round-0001/aggregate"),
    "co-distill": ("co-distill --round 1", "private/server/round-0001/slm"),
}


# --- help


def test_every_verb_of_the_issue_is_a_command() -> None:
    verbs = {"init", "prepare", "broadcast", "client-train", "aggregate", "co-distill", "evaluate", "run", "status"}
    assert verbs | {"export"} <= set(COMMANDS)


def test_the_list_of_commands_is_cut_nowhere_on_a_terminal_of_80_columns() -> None:
    program = command_line()
    context = program.context_class(program, info_name="fedcollm", terminal_width=80, **program.context_settings)
    listed = program.get_help(context).partition("Commands:")[2].split("\n")
    assert [line.split()[0] for line in listed if line.strip()] == program.list_commands(context)
    assert not [line for line in listed if line.endswith("...")]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_is_read_what_is_written_and_gives_an_example(
    command: str, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm(command, "--help")
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    assert f"Example: fedcollm {command}" in text
    assert "reads " in text.lower() or command not in READS
    assert "writes " in text.lower() or command not in WRITES


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_in_the_help_has_options_that_the_command_has(
    command: str, fedcollm: Callable[..., Outcome]
) -> None:
    text = " ".join(fedcollm(command, "--help").out.split())
    example = text.split(f"Example: fedcollm {command}")[1].split("Options:")[0].split("Arguments:")[0]
    for word in example.split():
        if word.startswith("--"):
            assert f"{word} " in text.split("Options:")[1]


def test_the_list_of_commands_shows_each_with_a_whole_sentence(fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("--help")
    assert outcome.code == 0
    listed = outcome.out.split("Commands:")[1]
    for command in COMMANDS:
        (line,) = [line for line in listed.splitlines() if line.split()[:1] == [command]]
        assert len(line.split()) > 3


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_h_is_short_for_help(command: str, fedcollm: Callable[..., Outcome]) -> None:
    words = [command] if command else []
    assert fedcollm(*words, "-h") == fedcollm(*words, "--help")


@pytest.mark.parametrize(
    ("words", "named"),
    [("agregate", "aggregate"), ("clent-train --round 1", "client-train"), ("status --jsn", "--json")],
)
def test_what_was_meant_is_named(words: str, named: str, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm(*words.split())
    assert outcome.code == 2
    assert named in outcome.err.split("Error: ")[1]


@pytest.mark.parametrize("words", [("--version",), ("-v",), ("-m",)])
def test_the_version_is_printed(words: tuple[str, ...], fedcollm: Callable[..., Outcome]) -> None:
    if words == ("-m",):
        command = [sys.executable, "-m", "fedcollm_cli", "--version"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"fedcollm {__version__}\n"
    else:
        assert fedcollm(*words) == Outcome(0, f"fedcollm {__version__}\n", "")


# --- where the workspace is


def test_the_workspace_is_found_upwards_from_a_folder_in_it(
    finished: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished / "private/client-1")
    outcome = fedcollm("broadcast", "--round", 1)
    assert outcome.code == 0
    assert outcome.out == "exchange/round-0001/broadcast\n"


def test_the_workspace_is_named_from_elsewhere(
    finished: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fedcollm("aggregate", "--round", 1, "--workspace", "study").code == 0
    assert fedcollm("aggregate", "--round", 1, "-w", finished / "exchange").code == 0
    assert fedcollm("aggregate", "--round", 1).code == 2


# --- what is printed


@pytest.mark.parametrize("stage", STAGES)
def test_the_plain_result_is_the_folder_and_nothing_else(
    stage: str, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    command, folder = STAGES[stage]
    outcome = fedcollm(*command.split(), "--overwrite", "-w", finished)
    assert outcome.out == f"{folder}\n"
    assert stage in outcome.err


@pytest.mark.parametrize("stage", STAGES)
def test_overwrite_makes_again_what_is_damaged(stage: str, finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    command, folder = STAGES[stage]
    (finished / folder / "manifest.json").write_text("{")
    assert fedcollm(*command.split(), "-w", finished).code == 4
    assert fedcollm(*command.split(), "--overwrite", "-w", finished).out == f"{folder}\n"


@pytest.mark.parametrize("stage", STAGES)
def test_json_is_the_manifest_and_the_path(stage: str, finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    command, folder = STAGES[stage]
    found = json.loads(fedcollm(*command.split(), "--json", "-w", finished).out)
    assert found.pop("path") == folder
    assert found == json.loads((finished / folder / "manifest.json").read_text())


def test_json_of_the_other_commands_names_what_was_written(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    made = json.loads(fedcollm("init", finished.parent / "new", "--json").out)
    assert Path(made["path"]) == finished.parent / "new"

    scores = json.loads(fedcollm("evaluate", "--round", 1, "--model", "llm", "--json", "-w", finished).out)
    assert scores.pop("path") == "results/round-0001/llm.json"
    assert records.stamped(scores) == json.loads((finished / "results/round-0001/llm.json").read_text())

    toml = finished / "fedcollm.toml"
    toml.write_text(toml.read_text() + '\n[data]\ntasks = ["colours"]\n')
    split = json.loads(fedcollm("prepare", "--overwrite", "--json", "-w", finished).out)
    assert split.pop("path") == "private/split.json"
    assert split == json.loads((finished / "private/split.json").read_text())


@pytest.mark.parametrize(
    "command", ["client-train --client 2 --round 1 --overwrite", "co-distill --round 1 --overwrite", "run --no-scores"]
)
def test_quiet_says_nothing_on_stderr(command: str, finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    (finished / "machine.toml").write_text("checkpoint_steps = 1\n")  # checkpoints are no reason to speak either
    outcome = fedcollm(*command.split(), "--quiet", "-w", finished)
    assert outcome.code == 0
    assert outcome.err == ""


def test_quiet_keeps_errors(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert "there is no round 9" in fedcollm("broadcast", "--round", 9, "--quiet", "-w", finished).err


def test_evaluate_prints_a_row_with_the_accuracy(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("evaluate", "--zero-shot", "-w", finished)
    assert outcome.code == 0
    written = json.loads((finished / "results/zero-shot/slm.json").read_text())
    accuracy = written["tasks"]["colours"]["metrics"]["acc"]
    (row,) = [line for line in outcome.out.splitlines() if "colours" in line]
    assert row.split()[:5] == ["slm", "colours", "base", "12", f"{accuracy:.4f}"]


# --- failures as JSON


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_that_takes_json_tells_its_failures_as_json(
    command: str, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    """Words that are no options, before any workspace is looked for."""
    outcome = fedcollm(command, "--json", "--no-such-option")
    assert outcome.code == 2
    error = json.loads(outcome.out)["error"]
    assert error["code"] == 2
    assert error["mend"].endswith(f" {command} --help")
    said = "No such option:? '?--no-such-option"  # in click's words, or in typer's own
    assert re.match(said, error["message"])
    assert re.search(f"Error: {said}", outcome.err)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("broadcast --round 9", 2, "there is no round 9"),
        ("reveal --client 1 --round 2", 2, "aggregation.mode"),
        ("aggregate --round 2", 4, "manifest"),
        ("verify", 4, "manifest"),
        ("no-command", 2, "No such command 'no-command'."),
        ("init . --template s11", 2, "no template 's11'"),
    ],
)
def test_a_failure_is_one_object_on_stdout_and_words_on_stderr(
    words: str,
    code: int,
    message: str,
    finished: Path,
    fedcollm: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (finished / "exchange/round-0002/client-1/manifest.json").write_text("{")
    monkeypatch.chdir(finished)
    outcome = fedcollm(*words.split(), "--json")
    assert outcome.code == code, outcome.err
    found = json.loads(outcome.out)
    assert found.keys() == {"error"}
    assert found["error"]["code"] == code
    assert message in found["error"]["message"] + found["error"].get("mend", "")
    assert found["error"]["message"].split("\n")[0] in outcome.err
    assert fedcollm(*words.split()).out == ""


def test_a_result_that_ends_with_a_code_of_its_own_is_the_result(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    (finished / "exchange/round-0002/client-1/manifest.json").write_text("{")
    outcome = fedcollm("status", "--verify", "--json", "-w", finished)
    assert outcome.code == 4
    assert "rounds" in json.loads(outcome.out)


# --- run


def test_a_range_of_rounds_is_run_and_no_other(answered: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert fedcollm("run", "--rounds", "1-1", "--no-scores", "-w", answered).code == 0
    workspace = Workspace(answered)
    assert workspace.slm(1).exists()
    assert not workspace.broadcast(2).exists()
    assert fedcollm("run", "--rounds", "2", "--no-scores", "-w", answered).code == 0
    assert workspace.slm(2).exists()


@pytest.mark.parametrize("rounds", ["two", "2-1", "1-", "-1", "", "1-2-3", "1,2", "²", "1.5", " 1"])
def test_a_range_that_is_none_is_refused(rounds: str, finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("run", f"--rounds={rounds}", "--no-scores", "-w", finished)
    assert outcome.code == 2
    assert f"--rounds {rounds!r} is not a round or a range of rounds" in outcome.err
    assert "--rounds 1-5" in outcome.err


@pytest.mark.parametrize("rounds", ["0", "3", "1-3", "0-1"])
def test_a_range_beyond_the_agreement_is_refused(rounds: str, finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("run", "--rounds", rounds, "--no-scores", "-w", finished)
    assert outcome.code == 2
    assert "the agreement has rounds 1 to 2" in outcome.err


@pytest.mark.parametrize(
    "words", ["broadcast", "broadcast --round x", "broadcast --round 0", "broadcast --round 1 --client 1", "no", "--no"]
)
def test_words_that_are_no_command_exit_2(words: str, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm(*words.split())
    assert outcome.code == 2
    assert outcome.err
    assert outcome.out == ""


# --- the shipped script, whose processes are forked from one that has the libraries


@pytest.fixture
def script() -> Iterator[Callable[[Path], str]]:
    """Run a workspace's run_rounds.sh to its end, which must be good. Returns what it says."""
    with forking_fedcollm() as program:
        environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}

        def go(folder: Path) -> str:
            command = ["bash", shutil.copy(ROOT / "workspace_template/run_rounds.sh", folder)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, done.stderr
            return done.stderr

        yield go


@pytest.mark.slow
def test_the_shipped_script_runs_a_federation_to_its_end_and_passes_over_it_the_second_time(
    workspace_folder: Path, script: Callable[[Path], str]
) -> None:
    edit(workspace_folder / "fedcollm.toml", "clients = 3", "clients = 1")
    edit(workspace_folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    write_rows(workspace_folder / "private/client-1/train.jsonl", rows(8))
    script(workspace_folder)
    made = published(workspace_folder)
    places = {str(Path(name).parent) for name in made}
    exchange, server = "exchange/round-0001", "private/server/round-0001"
    assert places >= {f"{exchange}/{one}" for one in ("broadcast", "client-1")}
    assert places >= {f"{server}/{one}" for one in ("aggregate", "llm", "slm")}
    assert {"results/round-0001/slm.json", "results/round-0001/llm.json"} <= set(made)
    assert script(workspace_folder).count("already done") == 6
    assert published(workspace_folder) == made


@pytest.mark.slow
def test_the_shipped_script_runs_a_secure_federation_too(
    workspace_folder: Path, own_secrets: Path, script: Callable[[Path], str]
) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "rounds = 2", "rounds = 1")
    edit(toml, "[distillation]", '[aggregation]\nmode = "secure"\n\n[distillation]')
    script(workspace_folder)
    assert len(list(own_secrets.glob("fedcollm/*/*"))) == 4
    assert (workspace_folder / "private/server/round-0001/slm/manifest.json").exists()


@pytest.mark.slow
def test_the_shipped_script_runs_an_encrypted_federation_too(
    workspace_folder: Path, own_secrets: Path, script: Callable[[Path], str]
) -> None:
    toml = workspace_folder / "fedcollm.toml"
    edit(toml, "rounds = 2", "rounds = 1")
    edit(toml, "clients = 3", "clients = 2")
    edit(toml, "[distillation]", '[aggregation]\nmode = "encrypted"\nopener = 2\n\n[distillation]')
    script(workspace_folder)
    assert [path.parent.name for path in own_secrets.rglob("ckks.json")] == ["client-2"]
    assert (workspace_folder / "exchange/round-0001/reveal-2/manifest.json").exists()
    assert (workspace_folder / "private/server/round-0001/slm/manifest.json").exists()


@pytest.mark.slow
def test_the_shipped_script_runs_fedmkt_and_leaves_what_run_leaves(
    unlike_folder: Path, unlike_once: Path, script: Callable[[Path], str]
) -> None:
    edit(unlike_folder / "fedcollm.toml", "rounds = 2", "rounds = 1")
    script(unlike_folder)
    for path in [
        *unlike_once.glob("*/round-0001/*/*.safetensors"),
        *unlike_once.glob("*/*/round-0001/*/*.safetensors"),
    ]:
        assert path.read_bytes() == (unlike_folder / path.relative_to(unlike_once)).read_bytes(), path
    scores = {path.stem for path in (unlike_folder / "results/round-0001").glob("*.json")}
    assert scores == {"llm", "client-1", "client-2", "client-3"}


@pytest.mark.slow
def test_the_shipped_script_averages_clients_of_one_model(
    equal_folder: Path, equal_once: Path, script: Callable[[Path], str]
) -> None:
    edit(equal_folder / "fedcollm.toml", 'tasks = ["colours"]', 'tasks = ["colours"]\nlimit = 2')
    script(equal_folder)
    average = "private/server/round-0002/aggregate/adapter_model.safetensors"
    assert (equal_folder / average).read_bytes() == (equal_once / average).read_bytes()
    assert (equal_folder / "results/round-0001/aggregate.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["llm2slm", "standalone-public"])
def test_the_shipped_script_runs_fedmkts_baselines(
    method: str, unlike_folder: Path, script: Callable[[Path], str]
) -> None:
    toml = unlike_folder / "fedcollm.toml"
    edit(toml, 'method = "fedmkt"', f'method = "{method}"')
    edit(toml, 'tasks = ["colours"]', 'tasks = ["colours"]\nlimit = 2')
    script(unlike_folder)
    assert (unlike_folder / "private/client-3/round-0002/slm/manifest.json").exists()
    told = {
        path.parent.relative_to(unlike_folder / "exchange").as_posix() for path in unlike_folder.rglob("knowledge.*")
    }
    assert told == ({"round-0001/server"} if method == "llm2slm" else set())
    assert not list(unlike_folder.glob("results/*/llm.json"))
