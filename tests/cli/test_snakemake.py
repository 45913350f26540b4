"""The template's Snakefile: the same files as all other ways to chain the commands, switched between in the middle.

Snakemake is looked for in FEDCOLLM_SNAKEMAKE, then on PATH; where there is none, what needs it is skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builders import ROOT, adapters, drafts, edit
from federations import secrets_of
from programs import forking_fedcollm
from stages.federation.run import run
from stages.workspace.init import init
from stages.workspace.paths import Workspace

MARKERS = ".snakemake/fedcollm"
SNAKEFILE = ROOT / "workspace_template/Snakefile"
SNAKEMAKE = os.environ.get("FEDCOLLM_SNAKEMAKE") or shutil.which("snakemake")
needs_snakemake = pytest.mark.skipif(SNAKEMAKE is None, reason="no snakemake in FEDCOLLM_SNAKEMAKE or on PATH")


@pytest.fixture
def fedcollm_here() -> Iterator[Path]:
    with forking_fedcollm() as program:
        yield program


@dataclass(frozen=True)
class Snakemake:
    """Snakemake in a workspace that has the template's files."""

    program: Path

    def __call__(self, folder: Path, *words: str, scores: bool = False, code: int = 0) -> str:
        """Run it; returns what it says."""
        assert SNAKEMAKE
        shutil.copy(SNAKEFILE, folder)
        shutil.copytree(SNAKEFILE.with_name("profiles"), folder / "profiles", dirs_exist_ok=True)
        command = [SNAKEMAKE, *words, "--config", f"fedcollm={self.program}", f"scores={str(scores).lower()}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def left(self, folder: Path, **more: Any) -> dict[str, int]:
        """How many jobs of each rule are left to do, by a dry run."""
        said = self(folder, "-n", **more).split("Job stats:")[1]
        found = dict(re.findall(r"^(\w+) +([0-9]+)$", said.split("\n\n")[0], re.MULTILINE))
        return {rule: int(count) for rule, count in found.items() if rule not in ("all", "total")}


@pytest.fixture
def snakemake(fedcollm_here: Path) -> Snakemake:
    return Snakemake(fedcollm_here)


def times(folder: Path) -> dict[str, int]:
    """When each artefact was published."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


# --- without Snakemake


def places_in_the_snakefile() -> dict[str, Any]:
    """What the Snakefile knows of the workspace around: its settings, and where results are."""
    text = SNAKEFILE.read_text().split("# --- what is left to do")[0].replace("from snakemake", "# from snakemake")
    names: dict[str, Any] = {"config": {}}
    exec(compile(text, str(SNAKEFILE), "exec"), names)
    return names


@pytest.mark.parametrize("mode", ["plain", "secure", "encrypted"])
def test_the_snakefile_looks_where_the_commands_write(
    mode: str, workspace_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode != "plain":
        edit(workspace_folder / "fedcollm.toml", "[evaluation]", f'[aggregation]\nmode = "{mode}"\n\n[evaluation]')
    monkeypatch.chdir(workspace_folder)
    names = places_in_the_snakefile()
    workspace = Workspace(workspace_folder)
    for round, client in ((1, 1), (2, 3), (12, 34)):
        places = {
            "broadcast": workspace.broadcast(round),
            "client_update": workspace.client_update(round, client),
            "close": workspace.close(round),
            "reveal": workspace.reveal(round, client),
            "aggregate": workspace.aggregate(round),
            "slm": workspace.slm(round),
            "llm": workspace.llm(round),
        }
        for name, place in places.items():
            named = names[name](round, client) if name in ("client_update", "reveal") else names[name](round)
            assert Path(named) == (place / "manifest.json").relative_to(workspace.root)
        assert Path(names["result"](round, "llm")) == workspace.result(round, "llm").relative_to(workspace.root)
    assert Path(names["result"](None, "slm")) == workspace.result(None, "slm").relative_to(workspace.root)
    federation = workspace.agreement.federation
    assert (names["clients"], names["rounds"]) == (workspace.clients, range(1, federation.rounds + 1))
    assert (names["averages"], names["distils"]) == (federation.averages, federation.distils)
    assert (names["hidden"], names["opener"]) == (mode != "plain", [1] if mode == "encrypted" else [])
    assert names["tasks"] == ["colours"]


@pytest.mark.parametrize("method", ["fedmkt", "llm2slm", "standalone-public", "standalone"])
def test_the_snakefile_looks_where_fedmkt_writes(
    method: str, unlike_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_method(unlike_folder, method)
    monkeypatch.chdir(unlike_folder)
    names, workspace = places_in_the_snakefile(), Workspace(unlike_folder)
    federation = workspace.agreement.federation
    for name in ("averages", "distils", "learns_in_public", "server_tells", "clients_tell"):
        assert names[name] == getattr(federation, name), name
    assert names["own_models"] == {2, 3}
    for round, client in ((1, 1), (2, 3), (12, 34)):
        expected = {
            names["vocabulary"]("server"): workspace.vocabulary(None),
            names["vocabulary"](f"client-{client}"): workspace.vocabulary(client),
            names["knowledge"](round, "server"): workspace.knowledge(round, None),
            names["knowledge"](round, f"client-{client}"): workspace.knowledge(round, client),
            names["trained"](round, client): workspace.client_trained(round, client),
            names["llm"](round): workspace.llm(round),
        }
        if federation.learns_in_public:
            expected |= {names["distilled"](round, client): workspace.client_adapter(round, client)}
        for named, place in expected.items():
            assert Path(named) == (place / "manifest.json").relative_to(workspace.root)


def test_the_snakefile_looks_where_averaged_clients_of_fedmkt_write(
    equal_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(equal_folder)
    names, workspace = places_in_the_snakefile(), Workspace(equal_folder)
    assert names["averages"]
    for named, place in (
        (names["trained"](2, 3), workspace.client_trained(2, 3)),
        (names["distilled"](2, 3), workspace.client_adapter(2, 3)),
        (names["knowledge"](2, "client-3"), workspace.knowledge(2, 3)),
    ):
        assert Path(named) == (place / "manifest.json").relative_to(workspace.root)


@pytest.mark.parametrize("template", ["demo", "blank"])
def test_every_workspace_has_it_with_its_profiles(template: str, tmp_path: Path) -> None:
    folder = init(tmp_path / "study", template=template).root
    for name in ("Snakefile", "profiles/local/config.yaml", "profiles/slurm/config.yaml"):
        assert (folder / name).read_bytes() == (ROOT / "workspace_template" / name).read_bytes()


# --- with it


@pytest.mark.slow
@needs_snakemake
def test_it_goes_on_where_run_stopped_and_run_where_it_did(
    workspace_folder: Path, finished_once: Path, snakemake: Snakemake
) -> None:
    rounds = {"broadcast": 2, "client_train": 6, "aggregate": 2, "co_distill": 2}
    assert snakemake.left(workspace_folder) == rounds
    scores = {"evaluate_base": 2, "evaluate": 4, "evaluate_client": 3}
    assert snakemake.left(workspace_folder, scores=True) == rounds | scores
    run(Workspace(workspace_folder), rounds=range(1, 2), scores=False)
    first = times(workspace_folder)
    assert snakemake.left(workspace_folder) == {rule: count // 2 for rule, count in rounds.items()}
    snakemake(workspace_folder, "--cores", "2", scores=True)
    assert first.items() <= times(workspace_folder).items()
    expected = {name: digest for name, digest in adapters(finished_once).items() if "/round-" in name}
    assert expected.items() <= adapters(workspace_folder).items()
    made = times(workspace_folder)
    said: list[str] = []
    results = run(Workspace(workspace_folder), report=lambda event: said.append(event.text))
    assert len(results) == 9
    assert said.count("already done") == 12 + 9
    assert snakemake.left(workspace_folder, scores=True) == {}
    for path in (workspace_folder / "fedcollm.toml", *workspace_folder.rglob("manifest.json")):
        path.touch()  # times tell it nothing
    shutil.rmtree(workspace_folder / ".snakemake")
    assert snakemake.left(workspace_folder, scores=True) == {}
    snakemake(workspace_folder, "--cores", "2", scores=True)
    assert times(workspace_folder).keys() == made.keys()
    assert drafts(workspace_folder) == []


@pytest.mark.slow
@needs_snakemake
def test_a_command_that_fails_costs_nothing_that_is_there_and_is_done_the_next_time(
    answered: Path, snakemake: Snakemake
) -> None:
    shutil.rmtree(answered / "exchange/round-0001/client-2")
    data, before = answered / "private/client-2/train.jsonl", times(answered)
    content = data.read_text()
    data.write_text("no JSON\n")
    assert "line 1 of train.jsonl: not JSON" in snakemake(answered, "--cores", "2", "--keep-going", code=1)
    assert times(answered) == before
    data.write_text(content)
    left = {"client_train": 4, "aggregate": 2, "co_distill": 2, "broadcast": 1}
    assert snakemake.left(answered) == left
    (answered / MARKERS).mkdir(exist_ok=True)
    (answered / MARKERS / "client-2-1").touch()  # of a run that was killed: tells nothing
    assert snakemake.left(answered) == left
    snakemake(answered, "--cores", "2")
    assert before.items() <= times(answered).items()
    assert snakemake.left(answered) == {}


@pytest.mark.slow
@needs_snakemake
def test_a_quorum_does_without_a_client_that_lacks_its_data(answered: Path, snakemake: Snakemake) -> None:
    toml = answered / "fedcollm.toml"
    edit(toml, "[evaluation]", "[aggregation]\nmin_clients = 2\n\n[evaluation]")
    edit(toml, "rounds = 2", "rounds = 1")
    shutil.rmtree(answered / "exchange/round-0001")
    (answered / "private/client-3/train.jsonl").unlink()
    snakemake(answered, "--cores", "2", scores=True)
    manifest = json.loads((answered / "private/server/round-0001/aggregate/manifest.json").read_text())
    assert sorted(manifest["parents"]) == ["broadcast", "client-1", "client-2"]
    assert sorted(path.stem for path in (answered / "results/round-0001").glob("*.json")) == [
        "client-1",
        "client-2",
        "llm",
        "slm",
    ]


METHODS = {
    "fedavg": ({"broadcast": 2, "client_train": 6, "aggregate": 2}, {"evaluate": 2, "evaluate_client": 3}),
    "fedavg-aux": (
        {"broadcast": 2, "client_train": 6, "aggregate": 2, "co_distill": 2},
        {"evaluate": 4, "evaluate_client": 3},
    ),
    "standalone": ({"broadcast": 1, "client_train": 6}, {"evaluate_client": 6}),
}


UNLIKE_METHODS = {
    "fedmkt": (
        {"align": 1, "align_client": 3, "client_train": 6, "share_knowledge": 6, "co_distill": 2}
        | {"share_knowledge_of_llm": 2, "client_distill": 6},
        {"evaluate": 2, "evaluate_client": 6},
    ),
    "llm2slm": (
        {"align": 1, "align_client": 3, "client_train": 6, "share_knowledge_of_llm": 1, "client_distill": 6},
        {"evaluate_client": 6},
    ),
    "standalone-public": ({"client_train": 6, "client_distill": 6}, {"evaluate_client": 6}),
    "standalone": ({"client_train": 6}, {"evaluate_client": 6}),
}


def with_method(folder: Path, method: str) -> None:
    toml = folder / "fedcollm.toml"
    toml.write_text(toml.read_text().replace('method = "fedmkt"', f'method = "{method}"'))


@needs_snakemake
@pytest.mark.parametrize("method", UNLIKE_METHODS)
def test_models_of_their_own_have_their_steps_and_their_scores(
    method: str, unlike_folder: Path, snakemake: Snakemake
) -> None:
    with_method(unlike_folder, method)
    steps, scores = UNLIKE_METHODS[method]
    bases = {"evaluate_base": 2, "evaluate_base_of_client": 2}
    assert snakemake.left(unlike_folder, scores=True) == steps | scores | bases


@needs_snakemake
def test_one_model_for_all_is_broadcast_once(workspace_folder: Path, snakemake: Snakemake) -> None:
    edit(workspace_folder / "fedcollm.toml", "rounds = 2", 'rounds = 2\nmethod = "standalone-public"')
    assert snakemake.left(workspace_folder) == {"broadcast": 1, "client_train": 6, "client_distill": 6}


@pytest.mark.slow
@needs_snakemake
def test_fedmkt_goes_on_from_what_is_there_and_leaves_what_run_leaves(
    unlike: Path, unlike_once: Path, snakemake: Snakemake
) -> None:
    for path in ("exchange/round-0002/server", "exchange/round-0002/client-3", "private/server/round-0002/llm"):
        shutil.rmtree(unlike / path)
    for client in (1, 2):
        shutil.rmtree(unlike / f"private/client-{client}/round-0002/slm")
    made = times(unlike)
    left = {"share_knowledge": 1, "co_distill": 1, "share_knowledge_of_llm": 1, "client_distill": 2}
    assert snakemake.left(unlike) == left
    snakemake(unlike, "--cores", "2")
    assert made.items() <= times(unlike).items()
    assert snakemake.left(unlike) == {}
    assert adapters(unlike) == adapters(unlike_once)


@pytest.mark.slow
@needs_snakemake
def test_averaged_clients_of_fedmkt_have_their_steps_and_end_where_run_does(
    equal_folder: Path, equal_once: Path, snakemake: Snakemake
) -> None:
    steps = {"align": 1, "align_client": 3, "broadcast": 2, "client_train": 6, "share_knowledge": 6, "co_distill": 2}
    steps |= {"share_knowledge_of_llm": 2, "client_distill": 6, "aggregate": 2}
    assert snakemake.left(equal_folder) == steps
    scores = {"evaluate": 4, "evaluate_client": 3, "evaluate_base": 2}
    assert snakemake.left(equal_folder, scores=True) == steps | scores
    snakemake(equal_folder, "--cores", "2")
    assert snakemake.left(equal_folder) == {}
    assert adapters(equal_folder) == adapters(equal_once)


@needs_snakemake
@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_its_steps_and_its_scores(method: str, workspace_folder: Path, snakemake: Snakemake) -> None:
    edit(workspace_folder / "fedcollm.toml", "rounds = 2", f'rounds = 2\nmethod = "{method}"')
    steps, scores = METHODS[method]
    assert snakemake.left(workspace_folder, scores=True) == steps | scores | {"evaluate_base": 2}


@pytest.mark.slow
@needs_snakemake
def test_it_plays_all_parties_of_secure_aggregation_once_they_have_enrolled(
    enrolled: Path, snakemake: Snakemake
) -> None:
    steps = {"broadcast": 2, "client_train": 6, "close_round": 2, "reveal": 6, "aggregate": 2, "co_distill": 2}
    assert snakemake.left(enrolled) == steps
    snakemake(enrolled, "--cores", "2", f"{MARKERS}/broadcast-2")
    assert (enrolled / "private/server/round-0001/slm/manifest.json").exists()
    made = times(enrolled)
    assert {rule: steps[rule] - count for rule, count in snakemake.left(enrolled).items()} == {
        "client_train": 3,
        "close_round": 1,
        "reveal": 3,
        "aggregate": 1,
        "co_distill": 1,
    }
    run(Workspace(enrolled), scores=False)
    assert made.items() <= times(enrolled).items()
    assert snakemake.left(enrolled) == {}
    assert drafts(secrets_of(enrolled)) == []


@needs_snakemake
def test_before_they_have_enrolled_it_says_so(enrolled: Path, snakemake: Snakemake) -> None:
    (enrolled / "exchange/federation.json").unlink()
    assert "updates are hidden: enrol first (fedcollm keys, enroll, join)" in snakemake(enrolled, "-n", code=1)


@needs_snakemake
@pytest.mark.parametrize("kind", ["--dag", "--rulegraph"])
def test_what_is_left_can_be_drawn(kind: str, answered: Path, snakemake: Snakemake) -> None:
    said = snakemake(answered, kind, "mermaid-js")
    assert "flowchart" in said
    assert {"aggregate", "co_distill", "client_train"} <= set(re.findall(r"\[\"?(\w+)", said))


@needs_snakemake
def test_the_local_profile_is_one(answered: Path, snakemake: Snakemake) -> None:
    assert "Job stats" in snakemake(answered, "-n", "--profile", "profiles/local")
