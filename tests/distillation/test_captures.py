"""captures: a teacher as a file, read strictly; and what a student learns from it, against both models at once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from builders import examples, tuned
from stages.data.examples import Example
from stages.distillation import captures, top_k_logits
from stages.distillation.top_k_logits import Captured, Source, capture_bytes, parse_capture
from stages.models.tuned import Tuned
from stages.runtime.errors import BadNumbers, Damaged, Problem, UsageProblem
from stages.training.objective import Objective, Tokens, mutual_losses
from stages.workspace.budgets import Distillation
from stages.workspace.settings import Role

VOCABULARY = 40
WEIGHTS = {"slm_ft": 1.0, "slm_kd": 1.0, "llm_ft": 1.0, "llm_kd": 1.0, "slm_taught": 0.0, "llm_taught": 0.0}
# Answers of unequal length, and an unlabelled row.
ROWS = [*examples([(5, 2), (1, 1), (9, 4), (3, 1), (2, 6), (4, 3)], vocabulary=VOCABULARY), Example([7, 3, 9], 3)]
POSITIONS = 2 + 1 + 4 + 1 + 6 + 3 + 1
WHERE = Path("capture.safetensors")


@pytest.fixture(scope="module")
def pair() -> dict[Role, Tuned]:
    found: dict[Role, Tuned] = {"slm": tuned("slm", width=16), "llm": tuned("llm", width=32, family="llama")}
    for one in found.values():
        one.model.train()
    return found


def captured(teacher: Tuned, folder: Path, *, k: int = VOCABULARY, rows: int = 3, **settings: Any) -> Captured:
    return captures.capture(
        teacher,
        ROWS,
        Source("d" * 64, top_k_logits.rows_sha256(ROWS), settings.get("temperature", 1.0), VOCABULARY, k),
        rows=rows,
        every=2,
        folder=folder,
        inputs={},
        also=settings.get("also", ()),
        report=lambda event: None,
    )


def gradients(objective: Objective, batch: dict[str, Tensor], role: Role) -> Tensor:
    objective.zero_grad()
    objective(**batch)["loss"].backward()
    return torch.cat([parameter.grad.flatten() for parameter in objective.adapter_parameters(role)])


@pytest.mark.parametrize("select", ["all", "min-ce"])
@pytest.mark.parametrize("min_confidence", [None, 0.2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen-shannon"])
@pytest.mark.parametrize("role", ["slm", "llm"])
def test_with_the_whole_vocabulary_the_gradient_is_that_of_one_phase(
    role: Role,
    divergence: Any,
    temperature: float,
    min_confidence: float | None,
    select: Any,
    pair: Any,
    tmp_path: Path,
) -> None:
    told = {"divergence": divergence, "temperature": temperature, "min_confidence": min_confidence, "select": select}
    settings = Distillation(steps=1, **told)
    selects = select == "min-ce"
    teacher = captured(
        pair["llm" if role == "slm" else "slm"], tmp_path, temperature=temperature, also=("losses",) if selects else ()
    )
    if min_confidence:
        assert 0 < (teacher.confidence >= min_confidence).sum() < POSITIONS
    both = Objective(list(pair.values()), mutual_losses(settings), WEIGHTS)
    expected = gradients(both, both.collate(ROWS), role)
    alone = captures.TaughtObjective(pair[role], teacher, settings, WEIGHTS)
    found = gradients(alone, alone.collate(captures.taught(ROWS, teacher)), role)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    names = {f"{role}_ft", f"{role}_kd", *([f"{role}_taught"] if selects else [])}
    for name in names:
        assert math.isclose(alone.last[name], both.last[name], rel_tol=1e-6)
    assert set(alone.last) == names
    assert not selects or 0 < alone.last[f"{role}_taught"] < 1
    both.last.clear()


def test_a_capture_says_how_well_its_model_knows_each_row_and_is_read_back(pair: Any, tmp_path: Path) -> None:
    found = captured(pair["llm"], tmp_path, also=("losses",))
    assert found.losses is not None
    objective = Objective([pair["slm"], pair["llm"]], mutual_losses(Distillation(steps=1)), WEIGHTS)
    for row, loss in zip(ROWS, found.losses, strict=True):
        if row.answer_tokens:  # its mean, times how many they are
            mean = objective.parts(objective.collate([row]), Tokens.of([row]))["llm_ft"].detach()
            expected = float(mean) * row.answer_tokens
            assert loss == pytest.approx(expected, rel=1e-5)
        else:
            assert math.isnan(loss)
    again = parse_capture(capture_bytes(found), WHERE)
    np.testing.assert_array_equal(again.losses, found.losses)
    with pytest.raises(Damaged, match="no -log p"):
        parse_capture(capture_bytes(replace(found, losses=-found.losses)), WHERE)


def test_a_capture_without_losses_teaches_no_selected_rows(pair: Any, tmp_path: Path) -> None:
    teacher = captured(pair["llm"], tmp_path)
    assert teacher.losses is None
    with pytest.raises(Damaged, match="how well its model knows each row"):
        captures.TaughtObjective(pair["slm"], teacher, Distillation(steps=1, select="min-ce"), WEIGHTS)


def test_with_fewer_tokens_the_gradient_comes_nearer_with_each_and_the_loss_never_exceeds(
    pair: Any, tmp_path: Path
) -> None:
    settings = Distillation(steps=1)
    both = Objective(list(pair.values()), mutual_losses(settings), WEIGHTS | {"slm_ft": 0.0})
    expected = gradients(both, both.collate(ROWS), "slm")
    off, losses = [], []
    for k in (1, 4, 16, 39, 40):
        teacher = captured(pair["llm"], tmp_path / str(k), k=k)
        alone = captures.TaughtObjective(pair["slm"], teacher, settings, WEIGHTS | {"slm_ft": 0.0})
        found = gradients(alone, alone.collate(captures.taught(ROWS, teacher)), "slm")
        off.append(float((found - expected).norm() / expected.norm()))
        losses.append(float(alone.last["slm_kd"]))
    assert off == sorted(off, reverse=True)
    assert off[0] > 0.1
    assert all(after >= before * (1 - 1e-6) for before, after in pairwise(losses))
    assert losses[-1] == pytest.approx(float(both.last["slm_kd"]), rel=1e-6)
    both.last.clear()


def test_any_cut_of_the_rows_into_batches_finds_its_own_place_in_the_capture(pair: Any, tmp_path: Path) -> None:
    teacher = captured(pair["llm"], tmp_path, k=5)
    rows = captures.taught(ROWS, teacher)
    alone = captures.TaughtObjective(pair["slm"], teacher, Distillation(steps=1), WEIGHTS)
    order = [6, 2, 0, 5, 3, 1, 4]
    whole = alone.parts(alone.collate(rows), Tokens.of(ROWS))
    apart = [alone.parts(alone.collate([rows[i] for i in some]), Tokens.of(ROWS)) for some in (order[:3], order[3:])]
    for name, loss in whole.items():
        torch.testing.assert_close(sum(one[name] for one in apart), loss, rtol=1e-5, atol=1e-6)


def test_a_capture_is_what_the_teacher_says_without_dropout(tmp_path: Path) -> None:
    teacher = tuned("llm", dropout=0.5)
    teacher.model.train()
    found = captured(teacher, tmp_path, k=4, temperature=2.0)
    assert teacher.model.training
    teacher.model.eval()
    with torch.no_grad():
        logits = torch.cat(
            [
                teacher.model(input_ids=torch.tensor([row.input_ids])).logits[0, row.prompt_tokens - 1 :][
                    : row.distilled_positions
                ]
                for row in ROWS
            ]
        )
    best = F.log_softmax(logits / 2, -1).sort(dim=-1, descending=True)
    assert found.positions.tolist() == [2, 1, 4, 1, 6, 3, 1]
    for at in range(POSITIONS):
        expected = dict(zip(best.indices[at, :4].tolist(), best.values[at, :4].tolist(), strict=True))
        assert found.tokens[at].tolist() == sorted(expected)
        assert found.log_probabilities[at, :4].tolist() == pytest.approx([expected[i] for i in sorted(expected)], 1e-4)
        rest = float(best.values[at, 4:].exp().sum())
        assert math.exp(found.log_probabilities[at, 4]) == pytest.approx(rest, rel=1e-4)
    assert found.confidence.tolist() == pytest.approx(F.softmax(logits, -1).amax(-1).tolist(), rel=1e-4)
    assert found.kept.tolist() == pytest.approx(best.values[:, :4].exp().sum(-1).tolist(), rel=1e-4)


def test_a_capture_that_was_stopped_goes_on_and_is_the_same_to_the_last_bit(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = captured(pair["llm"], tmp_path / "whole", k=5, rows=1)
    done: list[int] = []

    def stop(event: Any) -> None:
        done.append(event.step)
        if event.step == 6:
            raise KeyboardInterrupt

    settings = {"rows": 1, "every": 2, "folder": tmp_path / "part", "inputs": {"a": "b"}}
    source = whole.source
    with pytest.raises(KeyboardInterrupt):
        captures.capture(pair["llm"], ROWS, source, report=stop, **settings)  # type: ignore[arg-type]
    done.clear()
    again = captures.capture(pair["llm"], ROWS, source, report=stop_never(done), **settings)  # type: ignore[arg-type]
    assert done == [5, 6, 7]  # four batches were on disk
    assert capture_bytes(again) == capture_bytes(whole)
    settings["inputs"] = {"a": "c"}  # another run: nothing of it is taken over
    done.clear()
    captures.capture(pair["llm"], ROWS, source, report=stop_never(done), **settings)  # type: ignore[arg-type]
    assert done == [1, 2, 3, 4, 5, 6, 7]


def stop_never(done: list[int]) -> Callable[[Any], None]:
    return lambda event: done.append(event.step)


def test_a_capture_holds_no_row_of_the_whole_vocabulary_longer_than_its_batch(pair: Any, tmp_path: Path) -> None:
    content = capture_bytes(captured(pair["llm"], tmp_path, k=3))
    size = top_k_logits.largest_bytes(len(ROWS), POSITIONS, 3)
    assert size - 4096 < len(content) <= size


def test_a_capture_that_would_be_too_large_is_refused_with_a_number_that_fits(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.files.reading.LARGEST_ADAPTER_BYTES", top_k_logits.largest_bytes(7, POSITIONS, 10))
    with pytest.raises(UsageProblem, match=f"{POSITIONS} positions with --top-k 11 would have") as caught:
        captured(pair["llm"], tmp_path, k=11)
    assert caught.value.mend == "give --top-k 10 or less"
    captured(pair["llm"], tmp_path, k=10)


# --- the file


@pytest.fixture(scope="module")
def sound(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    return captured(pair["llm"], tmp_path_factory.mktemp("sound"), k=5)


def test_what_is_written_is_what_is_read_and_always_the_same_bytes(sound: Captured) -> None:
    content = capture_bytes(sound)
    found = parse_capture(content, WHERE)
    assert found.source == sound.source
    for name in ("positions", "tokens", "log_probabilities", "confidence"):
        assert np.array_equal(getattr(found, name), getattr(sound, name))
    assert capture_bytes(found) == content


def altered(name: str, change: Callable[[Any], Any]) -> Callable[[Captured], Captured]:
    return lambda sound: replace(sound, **{name: change(getattr(sound, name).copy())})


def set_at(place: Any, value: float) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[place] = value
        return array

    return change


WRONG: dict[str, tuple[Callable[[Captured], Captured], str]] = {
    "a row without a position": (altered("positions", set_at(0, 0)), "its rows have 16 positions, 18 are there"),
    "a position too many": (altered("positions", set_at(0, 3)), "its rows have 19 positions, 18 are there"),
    "a token that the models do not share": (altered("tokens", set_at((2, 4), 40)), "outside the vocabulary of 40"),
    "a negative token": (altered("tokens", set_at((2, 0), -1)), "outside the vocabulary of 40"),
    "a token twice": (altered("tokens", lambda a: set_at((2, 1), a[2, 0])(a)), "not in rising order"),
    "too much probability": (altered("log_probabilities", set_at((3, 0), 0.7)), "of a position add up to"),
    "too little": (altered("log_probabilities", lambda a: a - 0.1), "of a position add up to 0.9048"),
    "a confidence above one": (altered("confidence", set_at(1, 1.5)), "a confidence is no probability"),
    "no confidence": (altered("confidence", set_at(1, 0.0)), "a confidence is no probability"),
    "too few confidences": (altered("confidence", lambda a: a[:-1]), r"log_probabilities is F32 \[18, 6\], expected"),
    "no tail": (altered("log_probabilities", lambda a: a[:, :5]), r"F32 \[18, 5\], expected F32 \[18, 6\]"),
    "another k than it says": (altered("tokens", lambda a: a[:, :4]), r"I32 \[18, 4\], expected I32 \[18, 5\]"),
    "no temperature": (lambda sound: replace(sound, source=replace(sound.source, temperature=0.0)), "does not say"),
    "no vocabulary": (lambda sound: replace(sound, source=replace(sound.source, vocabulary=0)), "does not say"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_model_can_have_said_is_refused(wrong: str, sound: Captured) -> None:
    change, message = WRONG[wrong]
    with pytest.raises(Damaged, match=message) as caught:
        parse_capture(capture_bytes(change(sound)), WHERE)
    assert "--overwrite" in str(caught.value.mend)


@pytest.mark.parametrize("name", ["log_probabilities", "confidence"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_capture_with_nan_is_bad_numbers(name: str, value: float, sound: Captured) -> None:
    place = (0, 0) if name == "log_probabilities" else 0
    with pytest.raises(BadNumbers, match="NaN or infinity"):
        parse_capture(capture_bytes(altered(name, set_at(place, value))(sound)), WHERE)


def forged(sound: Captured, metadata: dict[str, str] | None, **tensors: Any) -> bytes:
    whole = {name: getattr(sound, name) for name in ("positions", "tokens", "log_probabilities", "confidence")}
    kept = {name: tensor for name, tensor in (whole | tensors).items() if tensor is not None}
    return safetensors.numpy.save(kept, metadata=metadata)


def test_a_file_of_another_form_is_damaged(sound: Captured) -> None:
    told = {"capture": parse_metadata(capture_bytes(sound))["capture"]}
    assert parse_capture(forged(sound, told), WHERE).source == sound.source
    claims = json.loads(told["capture"])
    files_of_another_form = [
        b"",
        b"\x80\x04pickle",
        capture_bytes(sound)[:-1],
        capture_bytes(sound) + b"\0",
        forged(sound, None),
        forged(sound, {"format": "pt"}),
        forged(sound, {"capture": "not json"}),
        forged(sound, told | {"more": "x"}),
        forged(sound, {"capture": json.dumps(claims | {"format": "fedcollm-capture/2"})}),
        forged(sound, {"capture": json.dumps(claims | {"more": 1})}),
        forged(sound, {"capture": json.dumps(claims | {"top_k": "5"})}),
        forged(sound, told, more=np.zeros(3, np.float32)),
        forged(sound, told, confidence=None),
        forged(sound, told, confidence=sound.confidence.astype(np.float64)),
        forged(sound, told, tokens=sound.tokens.astype(np.int64)),
        forged(sound, told, positions=np.zeros(0, np.int32)),
    ]
    for content in files_of_another_form:
        with pytest.raises(Damaged):
            parse_capture(content, WHERE)


def parse_metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def test_any_changed_bit_of_the_header_is_noticed_or_changes_nothing(sound: Captured) -> None:
    content = capture_bytes(sound)
    length = int.from_bytes(content[:8], "little")
    for at in range(0, 8 + length, 3):
        spoilt = bytearray(content)
        spoilt[at] ^= 4
        try:
            found = parse_capture(bytes(spoilt), WHERE)
        except Problem:
            continue
        assert found.source != sound.source or capture_bytes(found) == content
