"""fork: a federation that goes on from a round of another with other settings, linked by manifests."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import Outcome, edit, make_workspace, rows, write_rows

Command = Callable[..., Outcome]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path from there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def forked(finished: Path, fedcollm: Command) -> Path:
    """A fork after round 1 of two, of which one setting of the server is another, and of which nothing has run."""
    folder = finished.parent / "other"
    outcome = fedcollm("fork", folder, "--round", 1, "--set", "distillation.temperature=2", "-w", finished)
    assert outcome.code == 0, outcome.err
    return folder


def test_it_goes_on_under_its_own_agreement_and_every_check_holds(
    forked: Path, finished: Path, fedcollm: Command
) -> None:
    before = contents(forked / "exchange/round-0001")
    assert before == contents(finished / "exchange/round-0001")
    status = json.loads(fedcollm("status", "--json", "-w", forked).out)
    assert [step["condition"] for step in status["rounds"][0]["steps"]] == ["done"] * len(status["rounds"][0]["steps"])
    assert status["edited"] == ""
    assert status["next_command"].startswith("fedcollm broadcast --round 2")

    assert fedcollm("run", "--no-scores", "-w", forked).code == 0
    assert contents(forked / "exchange/round-0001") == before
    agreed = tomllib.loads((forked / "fedcollm.toml").read_text())
    assert agreed["distillation"]["temperature"] == 2
    manifests = {
        number: json.loads((forked / f"private/server/round-000{number}/slm/manifest.json").read_text())
        for number in (1, 2)
    }
    assert manifests[1]["agreement_sha256"] == agreed["federation"]["fork"]["agreement_sha256"]
    assert manifests[2]["agreement_sha256"] != manifests[1]["agreement_sha256"]
    theirs = json.loads((finished / "private/server/round-0002/slm/manifest.json").read_text())
    assert manifests[2]["parents"]["aggregate"] != ""
    assert manifests[2]["files"] != theirs["files"]  # the setting did something

    audit = fedcollm("audit", "-w", forked)
    assert audit.code == 0, audit.out
    assert "FAIL" not in audit.out
    assert fedcollm("verify", "-w", forked).code == 0
    report = fedcollm("status", "--verify", "-w", forked)
    assert report.code == 0
    assert fedcollm("evaluate", "--round", 1, "-w", forked).code == 0
    assert not json.loads(fedcollm("status", "--json", "-w", forked).out)["stale"]


def test_with_nothing_changed_it_makes_the_same_adapters(finished: Path, fedcollm: Command) -> None:
    folder = finished.parent / "same"
    assert fedcollm("fork", folder, "--round", 1, "-w", finished).code == 0
    assert fedcollm("run", "--no-scores", "-w", folder).code == 0
    for place in ("exchange/round-0002/client-1", "private/server/round-0002/slm", "private/server/round-0002/llm"):
        name = f"{place}/adapter_model.safetensors"
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_a_round_of_before_is_audited_as_it_was_agreed_then(forked: Path, finished: Path, fedcollm: Command) -> None:
    victim = forked / "private/server/round-0001/slm/manifest.json"
    edit(victim, '"round": 1', '"round": 2')
    audit = fedcollm("audit", "-w", forked)
    assert audit.code != 0
    assert "private/server/round-0001/slm" in audit.out
    shutil.copy(finished / "private/server/round-0001/slm/manifest.json", victim)
    assert fedcollm("audit", "-w", forked).code == 0
    shutil.rmtree(forked / "private/agreements")
    assert "no copy is here of the agreement that held until the fork" in " ".join(
        fedcollm("audit", "-w", forked).out.split()
    )


def test_the_same_again_changes_nothing_and_other_settings_are_refused(
    forked: Path, finished: Path, fedcollm: Command
) -> None:
    before = contents(forked)
    words = ("fork", forked, "--round", 1, "-w", finished)
    assert fedcollm(*words, "--set", "distillation.temperature=2").code == 0
    assert contents(forked) == before
    outcome = fedcollm(*words, "--set", "distillation.temperature=3")
    assert outcome.code != 0
    assert "is of another agreement" in outcome.err
    assert contents(forked) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--round 1 --set slm.lora.r=2", "slm.lora.r cannot be another in a fork: the adapters of before belong to"),
        ("--round 1 --set federation.seed=2", "federation.seed cannot be another in a fork"),
        ("--round 1 --set data.split=iid", "data.split cannot be another in a fork"),
        (
            "--round 1 --set aggregation.keep=0.1",
            "aggregation.keep cannot be another in a fork: what clients keep for it",
        ),
        (
            "--round 1 --set aggregation.server=fedadam",
            "aggregation.server cannot be another in a fork: what the server",
        ),
        ("--round 1 --set evaluation.limit=5", "evaluation.toml changes it without a fork"),
        ("--round 1 --set privacy.epsilon=3", "privacy.epsilon cannot be another in a fork"),
        ("--round 1 --set distillation.temprature=2", "did you mean temperature"),
        ("--round 1 --set distillation.temperature=2,3", "distillation.temperature is to be one value"),
        ("--round 2", "leaves nothing to do of 2 rounds"),
        ("--round 3", "there is no round 3"),
    ],
)
def test_what_would_not_hold_is_refused(words: str, said: str, finished: Path, fedcollm: Command) -> None:
    folder = finished.parent / "other"
    outcome = fedcollm("fork", folder, *words.split(), "-w", finished)
    assert (outcome.code, "Traceback" in outcome.err) == (2, False)
    assert said in " ".join(outcome.err.split())
    assert not (folder / "fedcollm.toml").exists()


def test_a_round_that_has_not_ended_is_not_forked(finished: Path, fedcollm: Command) -> None:
    shutil.rmtree(finished / "private/server/round-0001/slm")
    outcome = fedcollm("fork", finished.parent / "other", "--round", 1, "-w", finished)
    assert "round 1 has not ended: private/server/round-0001/slm is not there" in " ".join(outcome.err.split())
    assert outcome.code != 0


def test_what_was_made_under_an_edited_agreement_is_not_forked(finished: Path, fedcollm: Command) -> None:
    edit(finished / "fedcollm.toml", "seed = 7", "seed = 8")
    outcome = fedcollm("fork", finished.parent / "other", "--round", 1, "-w", finished)
    assert outcome.code != 0
    assert "federation.seed was 7, is 8" in " ".join(outcome.err.split())


@pytest.mark.parametrize("setting", ["aggregation.gate=5.0", "aggregation.min_clients=3"])
def test_what_is_asked_of_an_average_is_asked_of_those_after_the_fork(
    setting: str, tmp_path: Path, base_models: Path, fedcollm: Command
) -> None:
    study, folder = make_workspace(tmp_path / "study", base_models), tmp_path / "other"
    write_rows(study / "private/server/held-out.jsonl", rows(6, start=60))
    toml = study / "fedcollm.toml"
    edit(toml, "seed = 7\n", 'seed = 7\nmethod = "fedavg"\n')
    toml.write_text(toml.read_text() + "\n[aggregation]\nmin_clients = 2\n")
    for words in (("broadcast",), ("client-train", "--client", 1), ("client-train", "--client", 2), ("aggregate",)):
        assert fedcollm(*words, "--round", 1, "-w", study).code == 0
    assert fedcollm("fork", folder, "--round", 1, "--set", setting, "-w", study).code == 0
    before = contents(folder / "private/server/round-0001/aggregate")
    refused = fedcollm("co-distill", "--round", 1, "-w", folder)
    assert "was edited" not in refused.err  # a fork has an agreement of its own
    outcome = fedcollm("run", "--no-scores", "-w", folder)
    assert outcome.code == 0, outcome.err
    assert contents(folder / "private/server/round-0001/aggregate") == before
    made = json.loads((folder / "private/server/round-0002/aggregate/manifest.json").read_text())
    assert {"client-1", "client-2", "client-3"} <= made["parents"].keys()
    assert made["metrics"].get("gate") == (5.0 if "gate" in setting else None)
    assert fedcollm("audit", "-w", folder).code == 0


def test_a_round_of_before_that_is_made_again_is_what_it_was(forked: Path, fedcollm: Command) -> None:
    before = contents(forked / "exchange/round-0001/client-1")
    assert fedcollm("client-train", "--client", 1, "--round", 1, "--overwrite", "-w", forked).code == 0
    assert contents(forked / "exchange/round-0001/client-1") == before
    assert json.loads(fedcollm("status", "--json", "-w", forked).out)["next_command"].startswith(
        "fedcollm broadcast --round 2"
    )


@pytest.mark.parametrize("words", ["run --method standalone", "sweep --set client_training.steps=1,2"])
def test_nothing_that_begins_at_round_1_is_run_beside_a_fork(words: str, forked: Path, fedcollm: Command) -> None:
    outcome = fedcollm(*words.split(), "--no-scores" if "run" in words else "--no-client-scores", "-w", forked)
    assert outcome.code == 2
    assert "this workspace is a fork, since round 1" in " ".join(outcome.err.split())
    assert not (forked / "baselines").exists()
    assert not (forked / "sweeps").exists()
