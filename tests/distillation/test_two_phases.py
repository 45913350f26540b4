"""co-distill in two phases: one model in memory at a time, bound to what each phase was made from, as files alone."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import SHARED_DATA, WORDS, Outcome, adapters, edit, published, sign, write_rows
from stages.aggregate import aggregate
from stages.artefacts.manifest import Manifest
from stages.artefacts.reading import read_manifest
from stages.audit.audit import audit
from stages.audit.verify import verify
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.co_distill import co_distill
from stages.distillation import top_k_logits
from stages.federation.next import next as next_step
from stages.federation.run import run
from stages.files import reading
from stages.models.loading import Models
from stages.progress.status import status
from stages.runtime.errors import Damaged, NotReady, Refused, UsageProblem
from stages.runtime.events import Event
from stages.workspace.paths import Workspace
from stages.workspace.settings import Role

STEPS = 5  # builders.AGREEMENT
LOSSES = ("slm_ft", "slm_kd", "llm_ft", "llm_kd")
VOCABULARY = 2 + len(set(WORDS))  # with the two special tokens
ROUND = "private/server/round-0001"


def capture(folder: Path, model: Role, *, top_k: int = 8, overwrite: bool = False) -> Manifest:
    return co_distill(Workspace(folder), round=1, phase="capture", model=model, top_k=top_k, overwrite=overwrite)


def train(folder: Path, model: Role | None = None, **options: Any) -> Manifest:
    return co_distill(Workspace(folder), round=1, phase="train", model=model, **options)


def stripped(finished: Path, folder: Path) -> Path:
    """A copy of a finished workspace in which round 1 has its aggregate, and co-distill is what comes next."""
    shutil.copytree(finished, folder, symlinks=True)
    for path in ("private/server/round-0002", f"{ROUND}/slm", f"{ROUND}/llm", "exchange/round-0002"):
        shutil.rmtree(folder / path)
    (folder / f"{ROUND}/co-distill.jsonl").unlink()
    return folder


@pytest.fixture
def aggregated(finished_once: Path, tmp_path: Path) -> Path:
    return stripped(finished_once, tmp_path / "aggregated")


@pytest.fixture(scope="module")
def captured_once(finished_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with both models captured, eight tokens of each position."""
    folder = stripped(finished_once, tmp_path_factory.mktemp("captured") / "study")
    for model in ("llm", "slm"):
        capture(folder, model)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def captured(captured_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(captured_once, tmp_path / "captured", symlinks=True)


@pytest.fixture(scope="module")
def taught_once(captured_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """And with both trained."""
    folder = shutil.copytree(captured_once, tmp_path_factory.mktemp("taught") / "study", symlinks=True)
    train(folder)
    return folder


@pytest.fixture
def taught(taught_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(taught_once, tmp_path / "taught", symlinks=True)


def manifest_of(folder: Path, name: str) -> tuple[Manifest, str]:
    return read_manifest(folder / ROUND / name)


# --- the numbers


def test_a_capture_is_what_transformers_and_peft_say(captured_once: Path) -> None:
    rows = [json.loads(line) for line in (captured_once / "private/server/auxiliary.jsonl").read_text().splitlines()]
    path = captured_once / ROUND / "captured-slm/capture.safetensors"
    found = top_k_logits.parse_capture(path.read_bytes(), path)
    base = captured_once / "models/slm"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), captured_once / ROUND / "aggregate"
    )
    with torch.no_grad():
        for at, row in enumerate(rows):  # every completion is one token
            ids = tokenizer.encode(row["prompt"] + row["completion"])
            said = model.eval()(torch.tensor([ids])).logits[0, -2].log_softmax(-1)
            assert found.tokens[at].tolist() == sorted(said.topk(8).indices.tolist())
            kept = [float(said[token]) for token in found.tokens[at]]
            assert found.log_probabilities[at, :8].tolist() == pytest.approx(kept, rel=1e-4)
    assert found.source.vocabulary == VOCABULARY
    assert found.source.data_sha256 == reading.sha256((captured_once / "private/server/auxiliary.jsonl").read_bytes())


def one_step(folder: Path, *more: str) -> None:
    """Agree on a single step, and have the aggregate say so."""
    edit(folder / "fedcollm.toml", "[distillation]\nsteps = 5", "\n".join(["[distillation]\nsteps = 1", *more]))
    for place in folder.glob(f"{ROUND}/aggregate"):
        sign(place, agreement_sha256=reading.sha256((folder / "fedcollm.toml").read_bytes()))


@pytest.mark.parametrize("more", [[], ['divergence = "jensen-shannon"', "temperature = 2.0"], ['select = "min-ce"']])
def test_one_step_with_the_whole_vocabulary_gives_the_adapters_of_one_phase(
    more: list[str], aggregated: Path, tmp_path: Path
) -> None:
    one_step(aggregated, *more)
    together = shutil.copytree(aggregated, tmp_path / "together", symlinks=True)
    co_distill(Workspace(together), round=1)
    for model in ("llm", "slm"):
        capture(aggregated, model, top_k=VOCABULARY)  # type: ignore[arg-type]
    train(aggregated)
    for role in ("slm", "llm"):
        apart, whole = (weights(folder, role) for folder in (aggregated, together))
        assert max(float(np.abs(apart[name] - whole[name]).max()) for name in whole) < 1e-6
        before, after = manifest_of(together, role)[0].metrics, manifest_of(aggregated, role)[0].metrics
        for name in (f"{role}_ft_before", f"{role}_kd_before", f"{role}_ft_after"):
            assert math.isclose(after[name], before[name], rel_tol=1e-5)


def weights(folder: Path, role: str) -> dict[str, np.ndarray]:
    import safetensors.numpy

    return safetensors.numpy.load_file(folder / ROUND / role / "adapter_model.safetensors")


def test_both_models_learn_and_the_round_has_one_log_and_all_losses(taught_once: Path) -> None:
    first, *steps, last = [json.loads(line) for line in (taught_once / ROUND / "co-distill.jsonl").open()]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line[name]) for line in steps for name in LOSSES)
    assert set(first["inputs"]) >= {"aggregate", "data", "captured-llm", "captured-slm", "slm_base", "llm_base"}
    assert last["wall_s"] > 0
    metrics = manifest_of(taught_once, "slm")[0].metrics
    assert all(f"{name}_{when}" in metrics for name in LOSSES for when in ("before", "after"))
    for role in ("slm", "llm"):
        metrics = manifest_of(taught_once, role)[0].metrics
        assert metrics[f"{role}_ft_after"] < metrics[f"{role}_ft_before"]


def test_the_parents_tell_that_it_was_done_in_two_phases(taught_once: Path) -> None:
    digests = {name: manifest_of(taught_once, name)[1] for name in ("aggregate", "captured-slm", "captured-llm", "llm")}
    assert manifest_of(taught_once, "captured-slm")[0].parents == {"aggregate": digests["aggregate"]}
    assert manifest_of(taught_once, "captured-llm")[0].parents == {}  # in round 1 the LLM's adapter is made fresh
    assert manifest_of(taught_once, "llm")[0].parents == {
        "aggregate": digests["aggregate"],
        "captured-slm": digests["captured-slm"],
    }
    assert manifest_of(taught_once, "slm")[0].parents == {
        "aggregate": digests["aggregate"],
        "captured-llm": digests["captured-llm"],
        "llm-after": digests["llm"],
    }


def test_from_round_two_on_the_llm_is_captured_with_the_adapter_that_it_has(taught: Path) -> None:
    run(Workspace(taught), rounds=range(2, 3), scores=False)
    shutil.rmtree(taught / "private/server/round-0002/slm")
    shutil.rmtree(taught / "private/server/round-0002/llm")
    workspace = Workspace(taught)
    for model in ("llm", "slm"):
        co_distill(workspace, round=2, phase="capture", model=model)  # type: ignore[arg-type]
    made = co_distill(workspace, round=2, phase="train")
    assert read_manifest(workspace.captured(2, "llm"))[0].parents == {"llm": manifest_of(taught, "llm")[1]}
    assert set(made.parents) == {"aggregate", "llm", "captured-llm", "llm-after"}
    assert verify(workspace).folders == 18
    before, after = manifest_of(taught, "llm")[0].metrics, read_manifest(workspace.llm(2))[0].metrics
    assert math.isclose(before["llm_ft_after"], after["llm_ft_before"], rel_tol=1e-5)


# --- one model at a time


@pytest.mark.parametrize("model", ["slm", "llm"])
def test_a_phase_needs_the_weights_of_its_own_model_alone(model: Role, aggregated: Path, captured: Path) -> None:
    other = "llm" if model == "slm" else "slm"
    if model == "slm":  # the LLM comes first
        train(captured, "llm")
    for folder in (aggregated, captured):
        models = (folder / "models").resolve()
        (folder / "models").unlink()
        shutil.copytree(models, folder / "models")
        (folder / "models" / other / "model.safetensors").unlink()
    assert capture(aggregated, model).role == model
    assert train(captured, model).role == model


def test_train_lets_the_llm_go_before_it_loads_the_slm(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = Models._load

    def watched(self: Models, *rest: Any) -> Any:
        alive.append(sum(one() is not None for one in loaded))
        tuned = load(self, *rest)
        loaded.append(weakref.ref(tuned.model.get_base_model()))
        return tuned

    monkeypatch.setattr(Models, "_load", watched)
    train(captured)
    assert alive == [0, 0]


# --- again, and after a stop


def test_the_same_again_is_already_done(taught: Path) -> None:
    before, told = published(taught), list[str]()
    for step in (
        {"phase": "capture", "model": "llm", "top_k": 8},
        {"phase": "capture", "model": "slm", "top_k": 8},
        {"phase": "train"},
        {"phase": "train", "model": "slm"},
        {},  # as `run` and `next` ask: the round is done, whichever way
    ):
        co_distill(Workspace(taught), round=1, report=lambda event: told.append(event.text), **step)  # type: ignore[arg-type]
    notes = [text for text in told if "already done" in text]
    assert notes == ["already done"] * 6
    assert published(taught) == before


def test_captures_may_be_cleared_away_once_the_round_is_done(taught: Path) -> None:
    for role in ("slm", "llm"):
        shutil.rmtree(taught / ROUND / f"captured-{role}")
    before = published(taught)
    train(taught)
    co_distill(Workspace(taught), round=1)
    assert published(taught) == before
    assert status(Workspace(taught)).rounds[0].is_done
    assert verify(Workspace(taught)).elsewhere == 2
    assert not [finding for finding in audit([taught]) if finding.level in ("FAIL", "WARN")]
    shutil.rmtree(taught / ROUND / "slm")
    with pytest.raises(NotReady, match="the LLM of round 1 is not captured") as caught:
        train(taught)
    assert caught.value.mend == "fedcollm co-distill --round 1 --phase capture --model llm"


def test_training_that_was_stopped_goes_on_to_the_same_adapters(captured: Path, taught_once: Path) -> None:
    (captured / "machine.toml").write_text("checkpoint_steps = 1\n")

    def stop_at(step: int) -> Callable[[Event], None]:
        def report(event: Event) -> None:
            if event.kind == "step" and event.step == step:
                raise KeyboardInterrupt

        return report

    for step in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            train(captured, report=stop_at(step))
    assert not (captured / ROUND / "llm").exists()
    train(captured, "llm")
    with pytest.raises(KeyboardInterrupt):
        train(captured, report=stop_at(3))
    train(captured)
    assert adapters(captured) == adapters(taught_once)
    assert not list((captured / ROUND).glob(".co-distill*"))


def test_one_phase_does_not_take_the_place_of_half_of_two(captured: Path) -> None:
    train(captured, "llm")
    with pytest.raises(Refused, match="LLM was trained in two phases, the SLM not yet") as caught:
        co_distill(Workspace(captured), round=1)
    assert "--phase train" in str(caught.value.mend)
    co_distill(Workspace(captured), round=1, overwrite=True)
    assert set(manifest_of(captured, "slm")[0].parents) == {"aggregate", "llm-after"}
    assert status(Workspace(captured)).rounds[0].is_done  # the captures that are left over do not count
    with pytest.raises(Refused, match="LLM was trained in one phase"):
        train(captured, "slm")
    with pytest.raises(Refused, match="changed since: captured-slm"):
        train(captured)


def test_half_of_one_phase_is_made_again_in_two(captured: Path, taught_once: Path) -> None:
    co_distill(Workspace(captured), round=1)
    shutil.rmtree(captured / ROUND / "slm")
    train(captured)
    assert adapters(captured) == adapters(taught_once)


# --- what is refused


def test_a_capture_of_other_data_is_refused(captured: Path, taught: Path) -> None:
    for folder in (captured, taught):
        data = folder / "private/server/auxiliary.jsonl"
        write_rows(data, [json.loads(line) for line in data.read_text().splitlines()][:-1])
        with pytest.raises(Refused, match="changed since: the training data"):
            capture(folder, "slm")
    with pytest.raises(Refused, match="captured-slm is of another auxiliary data: ") as caught:
        train(captured)
    assert caught.value.mend == "fedcollm co-distill --round 1 --phase capture --model slm --overwrite"
    with pytest.raises(Refused, match="changed since: the training data"):
        train(taught)


def agree_again(folder: Path, old: str, new: str) -> None:
    """Edit the agreement, and have everything at the server claim it, as a forger would."""
    edit(folder / "fedcollm.toml", old, new)
    for place in (folder / ROUND).glob("*/manifest.json"):
        sign(place.parent, agreement_sha256=reading.sha256((folder / "fedcollm.toml").read_bytes()))


def test_a_capture_at_another_temperature_is_refused(captured: Path) -> None:
    agree_again(captured, "[distillation]", "[distillation]\ntemperature = 2.0")
    with pytest.raises(Refused, match=r"is of another temperature: 1\.0, here it is 2\.0"):
        train(captured, "llm")


def test_a_capture_of_another_adapter_is_refused(captured: Path) -> None:
    theta = captured / ROUND / "aggregate"
    before = manifest_of(captured, "aggregate")[1]
    sign(theta, steps=1)  # another manifest: another aggregate
    with pytest.raises(Refused, match=f"captured-slm is of another adapter: aggregate {before[:16]}"):
        train(captured, "llm")


def test_a_capture_of_another_base_is_refused(captured: Path) -> None:
    train(captured, "llm")
    base = manifest_of(captured, "captured-llm")[0].base.model_dump() | {"weights_sha256": "0" * 64}
    sign(captured / ROUND / "captured-llm", base=base)
    with pytest.raises(Refused, match="captured-llm is of another LLM than private/server/round-0001/llm"):
        train(captured, "slm")


def test_a_capture_made_under_another_agreement_is_refused(captured: Path) -> None:
    edit(captured / "fedcollm.toml", "[distillation]", "[distillation] # the same for all")
    sign(captured / ROUND / "aggregate", agreement_sha256=reading.sha256((captured / "fedcollm.toml").read_bytes()))
    with pytest.raises(Refused, match="captured-slm is of another agreement"):
        train(captured, "llm")


def test_a_capture_with_rows_tokenised_otherwise_is_refused(captured: Path) -> None:
    path = captured / ROUND / "captured-slm/capture.safetensors"
    found = top_k_logits.parse_capture(path.read_bytes(), path)
    source = top_k_logits.Source(**{**found.source.__dict__, "rows_sha256": "0" * 64})
    other = top_k_logits.Captured(source, found.positions, found.tokens, found.log_probabilities, found.confidence)
    path.write_bytes(top_k_logits.capture_bytes(other))
    sign(path.parent)
    with pytest.raises(Refused, match="another tokens of the auxiliary data: tokenizer or max_length"):
        train(captured, "llm")


def test_another_number_of_tokens_is_another_capture(captured: Path) -> None:
    with pytest.raises(Refused, match="changed since: --top-k, from 8"):
        capture(captured, "llm", top_k=9)
    assert capture(captured, "llm", top_k=9, overwrite=True).metrics["top_k"] == 9


def test_a_damaged_capture_is_found_by_training_verify_and_audit(captured: Path) -> None:
    path = captured / ROUND / "captured-slm/capture.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(Damaged, match=r"capture\.safetensors is not the file its manifest names"):
        train(captured, "llm")
    with pytest.raises(Damaged, match=r"capture\.safetensors is not the file its manifest names"):
        verify(Workspace(captured))
    assert "A2" in [one.id for one in audit([captured]) if one.level == "FAIL"]
    content[-3] ^= 1
    found = top_k_logits.parse_capture(bytes(content), path)
    found.confidence[0] = 1.5
    path.write_bytes(top_k_logits.capture_bytes(found))
    sign(path.parent)  # now the bytes are what the manifest says, and still no model can have said them
    assert [one.id for one in audit([captured]) if one.level == "FAIL"] == ["A3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "llm"}, "are for co-distill in two phases"),
        ({"top_k": 3}, "are for co-distill in two phases"),
        ({"phase": "capture"}, "one model is captured at a time"),
        ({"phase": "train", "top_k": 3}, "--top-k is for the first phase"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: Any, message: str, aggregated: Path) -> None:
    with pytest.raises(UsageProblem, match=message) as caught:
        co_distill(Workspace(aggregated), round=1, **options)
    assert "--phase capture --model llm" in str(caught.value.mend)


def test_alternating_has_no_second_phase(aggregated: Path) -> None:
    edit(aggregated / "fedcollm.toml", "[distillation]", '[distillation]\norder = "alternating"')
    with pytest.raises(UsageProblem, match="has no second phase"):
        capture(aggregated, "llm")


def test_the_slm_comes_last(captured: Path) -> None:
    with pytest.raises(NotReady, match="the SLM comes last") as caught:
        train(captured, "slm")
    assert caught.value.mend == "fedcollm co-distill --round 1 --phase train --model llm"


# --- where it stands


def test_next_goes_on_in_two_phases_once_they_were_begun(aggregated: Path) -> None:
    capture(aggregated, "llm", top_k=64)
    given = [str(next_step(Workspace(aggregated), party="server")) for _ in range(4)]
    command = "fedcollm co-distill --round 1 --phase"
    assert given == [
        f"{command} capture --model slm",
        f"{command} train --model llm",
        f"{command} train --model slm",
        "fedcollm broadcast --round 2",
    ]
    assert status(Workspace(aggregated)).rounds[0].is_done


def test_the_llm_can_be_captured_while_clients_train(answered: Path) -> None:
    (answered / "exchange/round-0001/client-3").rename(answered / "client-3")
    capture(answered, "llm", top_k=64)
    assert status(Workspace(answered), party="server").waiting_for
    (answered / "client-3").rename(answered / "exchange/round-0001/client-3")
    given = [str(next_step(Workspace(answered), party="server")) for _ in range(2)]
    assert given == ["fedcollm aggregate --round 1", "fedcollm co-distill --round 1 --phase capture --model slm"]


def test_what_was_made_from_another_capture_is_stale(taught: Path) -> None:
    capture(taught, "llm", top_k=9, overwrite=True)
    conditions = {step.name: (step.condition, step.reason) for step in status(Workspace(taught)).rounds[0].steps}
    assert conditions["slm"] == ("stale", "made from another captured-llm")
    assert conditions["llm"][0] == "done"
    with pytest.raises(Refused, match=r"slm was made from another .*captured-llm than lies here"):
        verify(Workspace(taught))


def test_everything_that_looks_at_a_workspace_knows_captures(taught: Path) -> None:
    assert verify(Workspace(taught)).folders == 9
    assert not [finding for finding in audit([taught]) if finding.level in ("FAIL", "WARN")]
    run(Workspace(taught), scores=False)
    assert status(Workspace(taught), verify=True).rounds[1].is_done


def test_by_the_command_line(aggregated: Path, fedcollm: Callable[..., Outcome]) -> None:
    def give(*words: object) -> Outcome:
        return fedcollm("co-distill", "--round", 1, "-w", aggregated, *words)

    assert give("--phase", "capture").code == 2
    assert give("--phase", "train").code == 3
    for model in ("llm", "slm"):
        made = give("--phase", "capture", "--model", model, "--top-k", 5)
        assert (made.code, made.out) == (0, f"{ROUND}/captured-{model}\n")
    assert "the 5 likeliest tokens of 12 positions have" in " ".join(made.err.split())
    assert give("--phase", "train", "--model", "slm").code == 3
    assert give("--phase", "train", "--model", "llm").out == f"{ROUND}/llm\n"
    assert give("--phase", "train").out == f"{ROUND}/slm\n"
    assert give("--phase", "capture", "--model", "llm", "--top-k", 6).code == 5
    words = [line.split() for line in fedcollm("status", "-w", aggregated).out.splitlines()]
    assert words.index(["captured-llm", "done"]) + 1 == words.index(["llm", "done"])


def test_in_secure_mode_captures_are_signed(summed: Path) -> None:
    workspace = Workspace(summed)
    for role in ("slm", "llm"):
        shutil.rmtree(summed / f"private/server/round-0002/{role}")
    before = verify(workspace).signatures
    for model in ("llm", "slm"):
        co_distill(workspace, round=2, phase="capture", model=model)  # type: ignore[arg-type]
    co_distill(workspace, round=2, phase="train")
    assert verify(workspace).signatures == before + 4
    assert not [finding for finding in audit([summed]) if finding.level == "FAIL"]


@pytest.mark.real
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the real data is not beside the checkout")
def test_on_really_trained_models_and_real_questions_both_learn(workspace_folder: Path) -> None:
    (workspace_folder / "models").unlink()
    for role, name in (("slm", "stories0.8M-sheared"), ("llm", "stories3M")):
        (workspace_folder / "models").mkdir(exist_ok=True)
        (workspace_folder / "models" / role).symlink_to(SHARED_DATA / "models" / name)
    questions = [json.loads(line) for line in (SHARED_DATA / "datasets/arc_easy/train.jsonl").open()][:64]
    asked = [
        {
            "prompt": f"Question: {one['question']}\nAnswer:",
            "completion": " " + one["choices"]["text"][one["choices"]["label"].index(one["answerKey"])],
        }
        for one in questions
    ]
    for party in range(4):
        place = f"client-{party}/train.jsonl" if party else "server/auxiliary.jsonl"
        write_rows(workspace_folder / "private" / place, asked[party::4])
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    for client in workspace.clients:
        client_train(workspace, round=1, client=client)
    aggregate(workspace, round=1)
    kept = {role: capture(workspace_folder, role, top_k=64).metrics["kept"] for role in ("llm", "slm")}  # type: ignore[arg-type]
    assert all(0.5 < share < 1 for share in kept.values())  # of 4,096 tokens
    made = train(workspace_folder)
    for name in LOSSES:
        assert made.metrics[f"{name}_after"] < made.metrics[f"{name}_before"], name
    assert verify(workspace).folders == 9
