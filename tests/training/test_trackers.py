"""trackers: each step's losses also where machine.toml says, and nothing else changes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from builders import Outcome, adapters, drafts
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.runtime.events import Event
from stages.training import trackers
from stages.training.trackers import UNTRACKED, Tracking, tracking
from stages.workspace.paths import Workspace

CLIENT, SERVER = "private/client-2", "private/server"


def turn_on(folder: Path, *names: str, more: str = "") -> Workspace:
    (folder / "machine.toml").write_text(f"trackers = {json.dumps(names)}\n{more}")
    return Workspace(folder)


def logged(path: Path) -> list[dict[str, float]]:
    """The steps of a private log."""
    return [json.loads(line) for line in path.read_text().splitlines()][1:-1]


def seen(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of the losses: (step, value) by name."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.endswith(("_ft", "_kd"))]
    return {name.removeprefix("train/"): [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_tensorboard_gets_the_losses_of_the_private_log_and_no_published_byte_changes(finished: Path) -> None:
    before, folder = adapters(finished), finished
    untracked = {name: logged(folder / name) for name in (f"{CLIENT}/round-0002/client-train.jsonl",)}
    workspace = turn_on(folder, "tensorboard")
    client_train(workspace, client=2, round=2, overwrite=True)
    co_distill(workspace, round=2, overwrite=True)
    assert adapters(folder) == before
    assert {name: logged(folder / name) for name in untracked} == untracked
    for party, stage, losses in (
        (CLIENT, "client-train", {"slm_ft"}),
        (SERVER, "co-distill", {"slm_ft", "slm_kd", "llm_ft", "llm_kd"}),
    ):
        steps = logged(folder / party / "round-0002" / f"{stage}.jsonl")
        assert all(line.keys() == {"step"} | losses for line in steps)
        expected = {name: [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in steps] for name in losses}
        assert seen(folder / party / "tensorboard" / f"round-0002-{stage}") == expected
    assert drafts(folder) == []


def test_without_a_tracker_nothing_is_tracked(finished: Path) -> None:
    client_train(Workspace(finished), client=2, round=2, overwrite=True)
    assert not (finished / CLIENT / "tensorboard").exists()
    assert trackers.callbacks(UNTRACKED, after_step=0) == []


def test_a_run_that_was_stopped_and_went_on_is_one_curve(finished: Path) -> None:
    workspace = turn_on(finished, "tensorboard", more="checkpoint_steps = 2\n")

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client_train(workspace, client=2, round=2, overwrite=True, report=stop)
    folder = workspace.tensorboard("client-train", 2, 2)
    assert [step for step, _ in seen(folder)["slm_ft"]] == [1, 2, 3, 4, 5]
    # The update of the earlier run is still there; without it the same command goes on from step 4.
    shutil.rmtree(workspace.client_update(2, 2))
    client_train(workspace, client=2, round=2)
    assert [step for step, _ in seen(folder)["slm_ft"]] == [1, 2, 3, 4, 5, 6]
    steps = logged(workspace.log("client-train", 2, 2))
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    # Begun anew, nothing of it is left.
    with pytest.raises(KeyboardInterrupt):
        client_train(workspace, client=2, round=2, overwrite=True, report=stop)
    assert [step for step, _ in seen(folder)["slm_ft"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
@pytest.mark.parametrize("command", ["client-train --client 2", "co-distill"])
def test_a_tracker_that_is_not_installed_is_refused_before_a_model_is_loaded(
    name: str, command: str, finished: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # Python's own way to say that there is no such module
    turn_on(finished, name)
    (finished / "models").unlink()
    outcome = fedcollm(*command.split(), "--round", 2, "--overwrite", "-w", finished)
    assert outcome.code == 2
    assert f"the tracker {name} is not installed" in outcome.err
    assert f"mend  pip install {name}" in outcome.err
    assert str(finished / "machine.toml") in outcome.err


def test_a_run_of_wandb_ends_with_its_stage_however_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    stand_in = SimpleNamespace(finish=lambda: ended.append("run"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)  # type: ignore[arg-type]
    with trackers.named(Tracking(["wandb"], "run", Path())):
        assert ended == []
    with pytest.raises(BadNumbers), trackers.named(Tracking(["wandb"], "run", Path())):
        raise BadNumbers("slm_ft became nan")
    assert ended == ["run", "run"]
    with trackers.named(Tracking(["tensorboard"], "run", Path())):
        pass
    assert ended == ["run", "run"]


def test_an_unknown_tracker_is_refused_naming_those_there_are(finished: Path) -> None:
    with pytest.raises(UsageProblem, match=r"trackers.*'tensorboard', 'wandb' or 'mlflow', found 'tensorbord'"):
        turn_on(finished, "tensorbord").machine  # noqa: B018


def test_each_run_of_each_stage_has_a_name_and_a_folder_of_its_own(finished: Path) -> None:
    workspace = turn_on(finished, "tensorboard")
    assert tracking(workspace, "client-train", 2, 1) == Tracking(
        ["tensorboard"],
        "tiny client-train round 2 client 1",
        finished / "private/client-1/tensorboard/round-0002-client-train",
    )
    assert tracking(workspace, "co-distill", 1) == Tracking(
        ["tensorboard"], "tiny co-distill round 1", finished / "private/server/tensorboard/round-0001-co-distill"
    )


def test_what_a_tracker_raises_is_named_and_what_else_is_raised_goes_through() -> None:
    broken = type("ServiceError", (Exception,), {"__module__": "mlflow.exceptions"})
    with (
        pytest.raises(UsageProblem, match="the tracker mlflow failed: no server") as caught,
        trackers.named(Tracking(["mlflow"], "run", Path())),
    ):
        raise broken("no server")
    assert "machine.toml" in str(caught.value.mend)
    with pytest.raises(broken), trackers.named(UNTRACKED):
        raise broken("no server")
