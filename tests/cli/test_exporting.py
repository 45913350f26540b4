"""fedcollm export: interrupted, given again, to a place of its own or one that is taken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from builders import Outcome, drafts, scale

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("replacing", [False, True])
def test_an_interrupted_export_leaves_what_was_there(
    replacing: bool, finished: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export", "--round", 2, "--merged", "-w", finished)
    folder = finished / "exports/slm-round-0002-merged"
    if replacing:
        assert fedcollm(*words).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*")}

    save = PreTrainedModel.save_pretrained

    def interrupted(model: Any, draft: Path) -> None:
        save(model, draft)
        assert (draft / "model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupted)
    outcome = fedcollm(*words, "--overwrite")
    assert outcome.code == 75
    assert drafts(finished) == []
    assert folder.exists() == replacing
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*")} == before


def test_the_same_again_is_already_done_and_another_adapter_is_refused_until_overwrite(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    words = ("export", "--round", 2, "-w", finished)
    record = finished / "exports/slm-round-0002/export.json"
    first = fedcollm(*words, "--json")
    assert first.code == 0
    before = record.stat().st_mtime_ns
    again = fedcollm(*words, "--json")
    assert "already done" in again.err
    assert again.out == first.out
    assert record.stat().st_mtime_ns == before

    scale(finished / "private/server/round-0002/slm", 2)
    refused = fedcollm(*words)
    assert refused.code == 5
    assert "changed since: adapter, manifest, model_card" in refused.err
    assert "--overwrite" in refused.err
    assert fedcollm(*words, "--overwrite").out == "exports/slm-round-0002\n"
    weights = (finished / "private/server/round-0002/slm" / WEIGHTS).read_bytes()
    assert json.loads(record.read_text())["adapter_sha256"] == hashlib.sha256(weights).hexdigest()
    assert "already done" in fedcollm(*words).err


def test_scores_that_came_after_an_export_enter_its_card_by_overwrite(
    finished: Path, refused: Callable[..., str], fedcollm: Callable[..., Outcome]
) -> None:
    words = ("export", "--round", 2, "-w", finished)
    card = finished / "exports/slm-round-0002/README.md"
    assert fedcollm(*words).code == 0
    assert "Not evaluated" in card.read_text()
    assert fedcollm("evaluate", "--round", 2, "-w", finished).code == 0
    assert "changed since: model_card" in refused(finished, 5, "export", "--round", 2)
    assert fedcollm(*words, "--overwrite").code == 0
    assert "| colours | 12 | acc |" in card.read_text()


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"short")], ids=["removed", "cut short"])
def test_a_damaged_export_is_not_called_done(
    harm: Callable[[Path], object], finished: Path, refused: Callable[..., str], fedcollm: Callable[..., Outcome]
) -> None:
    assert fedcollm("export", "--round", 2, "-w", finished).code == 0
    weights = finished / "exports/slm-round-0002" / WEIGHTS
    whole = weights.read_bytes()
    harm(weights)
    said = refused(finished, 4, "export", "--round", 2)
    assert f"{WEIGHTS} of exports/slm-round-0002 is missing or was changed" in said
    assert "--overwrite" in said
    assert fedcollm("export", "--round", 2, "--overwrite", "-w", finished).code == 0
    assert weights.read_bytes() == whole


@pytest.mark.parametrize("words", [[], ["--overwrite"]], ids=" ".join)
def test_a_folder_that_is_not_an_export_is_never_replaced(
    words: list[str], finished: Path, refused: Callable[..., str]
) -> None:
    said = refused(finished, 5, "export", "--round", 2, "--to", finished / "private", *words)
    assert "private is there already and was not exported here" in said
    assert "name another folder with --to" in said


def test_an_export_goes_to_another_folder(
    finished: Path, tmp_path: Path, fedcollm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    outcome = fedcollm("export", "--round", 2, "--to", "out", "-w", finished)
    assert (outcome.code, outcome.out) == (0, "out\n")
    assert (tmp_path / "out" / WEIGHTS).exists()
    assert not (finished / "exports").exists()


def test_overwrite_never_replaces_a_folder_that_holds_more_than_an_export(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    words = ("export", "--round", 1, "--model", "slm", "-w", finished)
    assert fedcollm(*words).code == 0
    place = finished / "exports/slm-round-0001"
    (place / "notes.txt").write_text("mine")
    for again in (words, (*words, "--overwrite")):
        outcome = fedcollm(*again)
        assert outcome.code == 5
        assert "exports/slm-round-0001 holds notes.txt, which was not exported" in outcome.err
    project = finished.parent / "project"
    project.mkdir()
    (project / "export.json").write_text('{"mine": 1}')
    outcome = fedcollm(*words, "--to", project, "--overwrite")
    assert outcome.code == 5
    assert "is there already and was not exported here" in outcome.err
    assert [path.name for path in project.iterdir()] == ["export.json"]
