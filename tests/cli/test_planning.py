"""plan, prefetch and comm-cost as a user meets them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from builders import ROOT, Outcome, edit, published
from fedcollm_cli.views.plans import shown


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_182_680, "1.18 MB"), (999_600, "1 MB"), (26_953_662_464, "27 GB")],
)
def test_bytes_are_shown_in_decimal_units(size: int, text: str) -> None:
    assert shown(size) == text


def cells(text: str, label: str) -> list[str]:
    """The cells of the one row of a table that begins with this label."""
    (line,) = [line for line in text.splitlines() if line.strip("│ ").startswith(label)]
    return [cell.strip() for cell in line.strip().strip("│").split("│")][1:]


def test_plan_tells_steps_memory_bytes_and_what_is_missing(
    workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    (workspace_folder / "data/test.jsonl").unlink()
    before = published(workspace_folder)
    outcome = fedcollm("plan", "-w", workspace_folder)
    assert outcome.code == 0
    said = ["the shape of the SLM", "the shape of the LLM", "rows and questions", "memory of each stage"]
    assert [line.strip().partition("  ")[0] for line in outcome.err.splitlines()] == said
    assert fedcollm("plan", "--quiet", "-w", workspace_folder).err == ""
    assert cells(outcome.out, "client-train")[:3] == ["each client", "12", "6"]
    assert len(cells(outcome.out, "activations")) == 5
    size = json.loads(fedcollm("plan", "--json", "-w", workspace_folder).out)["sent"]["client"]
    assert f"each client receives {shown(size)} and sends {shown(size)}" in outcome.out
    assert "missing here: the data of task colours is not there" in " ".join(outcome.out.split())
    assert "mend  put it there, or check data_files in its task file" in outcome.out
    assert "not counted: the libraries" in outcome.out
    assert "in two phases, with the LLM alone in memory: capture " in " ".join(outcome.out.split())
    assert published(workspace_folder) == before


def test_plan_as_json_has_the_same_in_numbers(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    found = json.loads(fedcollm("plan", "--json", "--dtype", "bfloat16", "--length", 20, "-w", workspace_folder).out)
    assert found["missing"] == []
    assert [one["dtype"] for one in found["models"]] == ["bfloat16", "bfloat16"]
    assert found["stages"][0]["length"] == 20
    assert set(found["stages"][0]["memory"]) >= {"weights", "adapters", "optimiser", "activations", "logits"}


def test_plan_names_each_model_whole(
    workspace_folder: Path, base_models: Path, tmp_path: Path, fedcollm: Callable[..., Outcome]
) -> None:
    deep = tmp_path / ("models-that-were-copied-from-another-machine-" * 3)
    deep.symlink_to(base_models)
    for role in ("slm", "llm"):
        edit(workspace_folder / "fedcollm.toml", f'"models/{role}"', f'"{deep}/{role}"')
    out = fedcollm("plan", "-w", workspace_folder).out.replace("\n", "").replace(" ", "")
    for role in ("slm", "llm"):
        assert f"{role}:{deep}/{role};itsadapterisonc_attn" in out


def test_plan_says_that_nothing_is_missing(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert "nothing is missing here" in fedcollm("plan", "-w", workspace_folder).out


def test_prefetch_says_what_was_here(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("prefetch", "-w", workspace_folder)
    assert outcome.out.splitlines() == [f"{name}: was here already" for name in ("models/slm", "models/llm", "colours")]
    assert json.loads(fedcollm("prefetch", "--model", "slm", "--no-tasks", "--json", "-w", workspace_folder).out) == [
        {"name": "models/slm", "was_here": True, "where": "models/slm"}
    ]


def test_prefetch_without_a_network_exits_3(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    edit(workspace_folder / "fedcollm.toml", '"models/slm"', '"nobody/nothing"')
    outcome = fedcollm("prefetch", "-w", workspace_folder)
    assert outcome.code == 3
    assert "the SLM nobody/nothing is neither here nor on the hub" in outcome.err
    assert "mend  `fedcollm prefetch --model slm` where there is a network" in outcome.err


def test_comm_cost_has_a_row_for_each_round_and_party_and_their_sums(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("comm-cost", "-w", finished)
    assert outcome.code == 0
    lines = [line.strip("│ ").split() for line in outcome.out.splitlines() if "client-2" in line]
    assert [line[0] for line in lines] == ["1", "2", "all"]
    found = json.loads(fedcollm("comm-cost", "--json", "-w", finished).out)
    total = next(one for one in found["totals"] if one["party"] == "client-2")
    assert f"{total['sent_bytes']:,}" in lines[2]
    assert total["sent_bytes"] == sum(
        path.stat().st_size for path in (finished / "exchange").glob("round-*/client-2/*")
    )


def test_many_clients_are_summed_up(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    edit(finished / "fedcollm.toml", "clients = 3", "clients = 9")
    outcome = fedcollm("comm-cost", "-w", finished)
    broadcast = sum(path.stat().st_size for path in (finished / "exchange/round-0001/broadcast").iterdir())
    assert "client-2" not in outcome.out
    (line,) = [line for line in outcome.out.splitlines() if "9 clients" in line and line.strip("│ ").startswith("1")]
    assert f"{9 * broadcast:,}" in line


def test_before_the_first_round_comm_cost_says_what_a_round_will_send(
    workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("comm-cost", "-w", workspace_folder)
    assert outcome.code == 0
    assert "nothing has travelled yet" in outcome.out
    assert cells(outcome.out, "sent, parameters") == ["256"]
    one_way, both = (cells(outcome.out, f"{way}, bytes")[0].replace(",", "") for way in ("one way", "there and back"))
    assert int(both) == 2 * int(one_way)


def test_table_3_needs_no_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedcollm: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = fedcollm("comm-cost", "--preset", "all")
    assert outcome.code == 0
    assert cells(outcome.out, "sent, parameters") == ["294,912", "3,145,728", "3,145,728"]
    assert cells(outcome.out, "sent, %") == ["0.24", "0.24", "0.23"]
    (one,) = json.loads(fedcollm("comm-cost", "--preset", "s3", "--json").out)
    assert one["paper"]["percent"] == round(one["percent"], 2) == 0.23
    assert fedcollm("comm-cost").code == 2


def test_a_preset_and_a_workspace_exclude_each_other(workspace_folder: Path, fedcollm: Callable[..., Outcome]) -> None:
    outcome = fedcollm("comm-cost", "--preset", "s1", "-w", workspace_folder)
    assert outcome.code == 2
    assert "leave --preset out" in outcome.err


def test_a_damaged_manifest_is_named(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    (finished / "exchange/round-0001/client-1/manifest.json").write_text("{")
    outcome = fedcollm("comm-cost", "-w", finished)
    assert outcome.code == 4
    assert "manifest.json is not valid JSON" in outcome.err


def test_comm_cost_of_a_client_needs_no_data_and_no_weights(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    shutil.rmtree(finished / "private")
    models = finished / "models"
    config = (models / "slm" / "config.json").read_text()
    models.unlink()
    (models / "slm").mkdir(parents=True)
    (models / "slm" / "config.json").write_text(config)
    assert fedcollm("comm-cost", "-w", finished).code == 0


# --- a hub of one model, on this machine

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """The four answers of a hub that fetching a model asks for."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], sorted(self.folder.iterdir())
        self.asked.append(path)
        headers, status, content = {}, 200, b""
        wanted = self.folder / path.rpartition("/")[2]
        if path.startswith("/api/models/somebody/tiny/tree"):
            entries = [{"type": "file", "path": one.name, "size": one.stat().st_size, "oid": one.name} for one in files]
            content = json.dumps(entries).encode()
        elif path.startswith("/api/models/somebody/tiny"):
            siblings = [{"rfilename": one.name} for one in files]
            content = json.dumps({"id": "somebody/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/somebody/tiny/resolve/") and wanted in files:
            content = wanted.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        else:
            status = 404
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(base_models: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub that has the tests' SLM as somebody/tiny, and what it has been asked for."""
    asked: list[str] = []
    handler = type("Handler", (_Hub,), {"folder": base_models / "slm", "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


ONE_AFTER_THE_OTHER = """
import json, os, sys
from command_line import give
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    for stream, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    code = give(*json.loads(line))
    sys.stdout.flush()
    print(code, file=answers, flush=True)
"""


@contextlib.contextmanager
def fresh_python(folder: Path, hub: str, home: Path, *, offline: bool = False) -> Iterator[Callable[..., Outcome]]:
    """A Python that reads its settings of the hub anew, as a command does, and gives commands in a folder."""
    places = {"HF_HOME": str(home), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | places | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", ONE_AFTER_THE_OTHER]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipe) as process:  # type: ignore[call-overload]

        def call(*words: str) -> Outcome:
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            return Outcome(code, *((folder / name).read_text() for name in ("out", "err")))

        yield call


@pytest.mark.slow
def test_a_hub_is_asked_for_what_is_fetched_alone_once_and_then_no_more(
    workspace_folder: Path, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = hub
    with fresh_python(workspace_folder, address, tmp_path / "home") as call:
        assert (call("evaluate", "--zero-shot", "--model", "slm", "-q").code, asked) == (0, [])
        assert (workspace_folder / "err").read_text() == ""
        edit(workspace_folder / "fedcollm.toml", '"models/slm"', '"somebody/tiny"')
        task = workspace_folder / "tasks/colours.yaml"
        local = task.read_text()
        edit(task, "dataset_path: json", "dataset_path: somebody/questions")
        planned = call("plan")
        assert planned.code == 0, planned.err
        assert "fedcollm prefetch --model slm" in planned.out
        assert "the dataset of task colours cannot be loaded" in planned.out
        assert asked == []
        task.write_text(local)
        fetched = call("prefetch", "--model", "slm", "--no-tasks")
        assert (fetched.code, fetched.out) == (0, "somebody/tiny: fetched\n"), fetched.err
        assert asked
    with fresh_python(workspace_folder, address, tmp_path / "home", offline=True) as call:
        found = call("prefetch", "--model", "slm")
        assert (found.code, found.out) == (0, "somebody/tiny: was here already\ncolours: was here already\n"), found.err
        planned = call("plan")
        assert planned.code == 0, planned.err
        assert "nothing is missing here" in planned.out


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_told_as_such(
    workspace_folder: Path, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    edit(workspace_folder / "fedcollm.toml", '"models/slm"', '"somebody/tiny"')
    with fresh_python(workspace_folder, hub[0], tmp_path / "file/home") as call:
        failed = call("prefetch", "--model", "slm", "--no-tasks", "-q")
    assert failed.code == 8
    assert "the SLM cannot be put into the hub's cache" in failed.err
    assert "set HF_HOME, or whichever variable names that folder" in failed.err
