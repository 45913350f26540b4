"""plan: steps, bytes and memory as the stages then have them, and everything that is missing."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders import Outcome, edit, rows, write_rows
from stages.aggregate import aggregate
from stages.aggregation.products import best_of_rank
from stages.artefacts.reading import read_manifest
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.data.examples import encode_row
from stages.data.prepare import prepare
from stages.data.row_files import read_rows
from stages.planning.averages import of_products
from stages.planning.estimates import StagePlan
from stages.planning.plan import Plan, plan
from stages.runtime.errors import UsageProblem
from stages.training import schedule
from stages.workspace.init import init
from stages.workspace.paths import Workspace


def stage_of(found: Plan, name: str) -> StagePlan:
    (stage,) = [stage for stage in found.stages if stage.name == name]
    return stage


def test_steps_and_parameters_are_those_of_the_manifests(finished: Path) -> None:
    workspace = Workspace(finished)
    found = plan(workspace)
    trained, _ = read_manifest(workspace.client_update(1, 1))
    assert stage_of(found, "client-train").steps == (trained.steps, trained.steps) == (6, 6)
    distilled, _ = read_manifest(workspace.llm(1))
    assert stage_of(found, "co-distill").steps == (distilled.steps, distilled.steps)
    assert [one.adapter_parameters for one in found.models] == [trained.parameters, distilled.parameters]
    assert found.models[0].adapter_bytes == trained.files["adapter_model.safetensors"].size_bytes
    assert found.sent == {"client": found.models[0].adapter_bytes, "server": 3 * found.models[0].adapter_bytes}


def test_epochs_over_the_rows_here_give_the_steps_that_training_schedules(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[client_training]\nsteps = 6", "[client_training]\nepochs = 2.5")
    write_rows(workspace_folder / "private/client-2/train.jsonl", rows(31))
    workspace = Workspace(workspace_folder)
    stage = stage_of(plan(workspace), "client-train")
    # 12 and 31 rows, 4 a step: ceil(2.5 * 12 / 4) = 8, ceil(2.5 * 31 / 4) = 20.
    assert (stage.rows, stage.steps) == ((12, 31), (8, 20))
    for count, steps in zip((12, 31), (8, 20), strict=True):
        assert len(schedule.schedule(count, workspace.agreement.client_training, seed=1)) == steps


def test_without_rows_epochs_tell_no_steps_but_a_number_of_steps_does(workspace_folder: Path) -> None:
    shutil.rmtree(workspace_folder / "private")
    edit(workspace_folder / "fedcollm.toml", "[client_training]\nsteps = 6", "[client_training]\nepochs = 1.0")
    found = plan(Workspace(workspace_folder))
    stage = stage_of(found, "client-train")
    assert (stage.rows, stage.steps, stage.length) == (None, None, 64)  # max_length is 512, the model's context 64
    assert stage_of(found, "co-distill").steps == (5, 5)
    assert [one.mend for one in found.missing if one.what == "training data"]


def test_the_batch_is_of_the_longest_row_here_and_of_as_many_as_fit_this_machine(workspace_folder: Path) -> None:
    from transformers import AutoTokenizer

    (workspace_folder / "machine.toml").write_text("micro_batch = 3\n")
    workspace = Workspace(workspace_folder)
    tokenizer = AutoTokenizer.from_pretrained(workspace_folder / "models/slm")
    paths = [workspace.client_data(k) for k in (1, 2, 3)]
    lengths = [len(encode_row(row, tokenizer).input_ids) for path in paths for row in read_rows(path)[0]]
    stage = stage_of(plan(workspace), "client-train")
    assert (stage.batch, stage.length, stage.answers) == (3, max(lengths), 1)
    asked = stage_of(plan(workspace, length=40), "client-train")
    assert asked.length == 40
    assert asked.memory["activations"] > stage.memory["activations"]


def test_memory_is_told_by_part(workspace_folder: Path) -> None:
    found = plan(Workspace(workspace_folder))
    slm, llm = found.models
    trains = stage_of(found, "client-train").memory
    parts = ["weights", "adapters", "gradients", "optimiser", "activations", "logits", "transient"]
    assert list(trains) == parts
    assert trains["weights"] == 4 * slm.parameters
    assert trains["adapters"] == trains["gradients"] == 4 * slm.adapter_parameters
    assert trains["optimiser"] == 8 * slm.adapter_parameters
    both = stage_of(found, "co-distill").memory
    assert both["weights"] == 4 * (slm.parameters + llm.parameters)
    assert both["optimiser"] == 8 * (slm.adapter_parameters + llm.adapter_parameters)
    # Of one model a log-softmax is kept beside its logits; of two that teach each other the logits alone.
    assert all(both[part] > trains[part] for part in parts if part != "logits")
    assert 0.9 < both["logits"] / trains["logits"] < 1.1
    assert stage_of(found, "evaluate llm").memory["weights"] == 4 * llm.parameters


def test_one_model_at_a_time_keeps_less_than_both(workspace_folder: Path) -> None:
    together = stage_of(plan(Workspace(workspace_folder)), "co-distill").memory["activations"]
    edit(workspace_folder / "fedcollm.toml", "[distillation]", '[distillation]\norder = "alternating"')
    apart = stage_of(plan(Workspace(workspace_folder)), "co-distill").memory["activations"]
    assert apart < together


def test_a_smaller_micro_batch_and_gradient_checkpointing_take_less(workspace_folder: Path) -> None:
    def kept(machine: str) -> int:
        (workspace_folder / "machine.toml").write_text(machine)
        return stage_of(plan(Workspace(workspace_folder)), "co-distill").memory["activations"]

    whole = kept("")
    assert kept("micro_batch = 1\n") < whole / 3
    assert kept("gradient_checkpointing = true\n") < whole


@pytest.mark.parametrize(
    "rule",
    ["mean", "median", "trimmed-mean", "clipped-mean", "krum", "geometric-median", "product", "fedavgm", "fedyogi"],
)
def test_aggregate_takes_what_it_is_said_to_take(rule: str, workspace_folder: Path) -> None:
    edit(
        workspace_folder / "fedcollm.toml",
        'dtype = "float32"\n[slm.lora]\nr = 4',
        'dtype = "float32"\n[slm.lora]\nr = 8192',
    )
    key = {"product": "combine", "fedavgm": "server", "fedyogi": "server"}.get(rule, "rule")
    clients = 2 if rule == "mean" or key == "server" else 6
    edit(workspace_folder / "fedcollm.toml", "clients = 3", f"clients = {clients}")
    edit(workspace_folder / "fedcollm.toml", "steps = 6", "steps = 1")
    settings = f'[aggregation]\n{key} = "{rule}"\n'
    settings += "outliers = 1\n" if rule in ("trimmed-mean", "krum") else ""
    edit(workspace_folder / "fedcollm.toml", "[distillation]", f"{settings}[distillation]")
    workspace = Workspace(workspace_folder)
    broadcast(workspace, round=1)
    for client in range(1, clients + 1):
        write_rows(workspace.client_data(client), rows(4, start=4 * client))
        client_train(workspace, round=1, client=client)
    said = sum(stage_of(plan(workspace), "aggregate").memory.values())
    aggregate(workspace, round=1)  # what it imports is not counted
    tracemalloc.start()
    aggregate(workspace, round=1, overwrite=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.8 * peak < said < 1.2 * peak


@pytest.mark.parametrize("clients", [4, 15, 16, 64])  # with 16, as many rows as the layer is narrow
@pytest.mark.parametrize(("outputs", "inputs"), [(256, 256), (256, 1024), (1024, 256)])
def test_the_mean_of_products_takes_what_it_is_said_to_take_in_the_largest_layer(
    outputs: int, inputs: int, clients: int
) -> None:
    draw, rank = np.random.default_rng(1), 16
    a = draw.standard_normal((clients, rank, inputs)).astype(np.float32)
    b = draw.standard_normal((clients, outputs, rank)).astype(np.float32)
    tracemalloc.start()
    best_of_rank(a, b, np.full(clients, 1 / clients))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    small = {"k.lora_A.weight": (rank, 16), "k.lora_B.weight": (16, rank)}
    large = {"q.lora_A.weight": (rank, inputs), "q.lora_B.weight": (outputs, rank)}
    most = 1.2 if np.lib.NumpyVersion(np.__version__) >= "2.5.0" else 2.5  # LAPACK's own was not counted before
    assert 0.8 * peak < of_products(clients, small | large) < most * peak


def test_disk_is_what_all_rounds_leave(finished: Path) -> None:
    found = plan(Workspace(finished))

    def weights(*folders: str) -> int:
        paths = [path for folder in folders for path in (finished / folder).rglob("adapter_model.safetensors")]
        return sum(path.stat().st_size for path in paths)

    assert found.disk["exchange"] == weights("exchange")
    assert found.disk["server"] == weights("private/server")


def test_the_papers_settings_are_planned_before_anything_was_fetched(tmp_path: Path) -> None:
    workspace = init(tmp_path / "study", template="s1")
    (workspace.root / "machine.toml").write_text('device = "cpu"\ndtype = "float32"\n')
    found = plan(workspace, length=32)
    assert [(one.parameters, one.adapter_parameters) for one in found.models] == [
        (124_439_808, 294_912),
        (774_030_080, 1_474_560),
    ]
    assert {one.came_from for one in found.models} == {"shipped with fedcollm"}
    assert [one.stored_bytes for one in found.models] == [4 * 124_439_808, 4 * 774_030_080]
    # Saved activations of one GPT-2 layer's residual stream alone: 8 rows x 32 tokens x 768 x 4 bytes x 12 layers.
    assert stage_of(found, "client-train").memory["activations"] > 8 * 32 * 768 * 4 * 12
    assert len(found.missing) == 4


def test_a_model_without_a_configuration_is_missing_and_the_rest_is_planned(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", '"models/llm"', '"nobody/nothing"')
    found = plan(Workspace(workspace_folder))
    assert [one.what for one in found.missing] == ["the LLM nobody/nothing, of the server alone"]
    assert stage_of(found, "client-train").memory
    assert not stage_of(found, "co-distill").memory
    assert not stage_of(found, "evaluate llm").memory
    assert found.disk == {}


@pytest.mark.parametrize("length", [1, 65])
def test_a_length_that_no_row_can_have_is_refused(length: int, workspace_folder: Path) -> None:
    with pytest.raises(UsageProblem, match=f"rows of {length} tokens: a row has 2 at least.*take 64") as caught:
        plan(Workspace(workspace_folder), length=length)
    assert "--length" in str(caught.value.mend)


def test_target_modules_that_do_not_exist_are_found_before_anything_is_loaded(
    workspace_folder: Path, base_models: Path
) -> None:
    edit(workspace_folder / "fedcollm.toml", "[llm.lora]\n", '[llm.lora]\ntarget_modules = ["q_proj"]\n')
    with pytest.raises(UsageProblem, match="do not fit gpt2") as caught:
        plan(Workspace(workspace_folder))
    assert "c_attn" in str(caught.value.mend)


def test_a_configuration_that_is_none_is_named(workspace_folder: Path) -> None:
    (workspace_folder / "models").unlink()
    (workspace_folder / "models" / "slm").mkdir(parents=True)
    (workspace_folder / "models" / "slm" / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(UsageProblem, match="the SLM cannot be loaded: ") as caught:
        plan(Workspace(workspace_folder))
    assert "check slm.model in fedcollm.toml" in str(caught.value.mend)


def test_unlabelled_auxiliary_rows_count_as_rows(workspace_folder: Path) -> None:
    place = workspace_folder / "private/server/auxiliary.jsonl"
    place.write_text(place.read_text() + '{"prompt": "Q : what colour is the big star 1 ? A :"}\n')
    found = plan(Workspace(workspace_folder))
    assert [one.rows for one in found.stages if one.name == "co-distill"] == [(13, 13)]


# --- before prepare, and what is scored


def to_be_dealt(folder: Path) -> Workspace:
    """A simulation in which prepare was not given yet."""
    shutil.rmtree(folder / "private")
    (folder / "fedcollm.toml").write_text((folder / "fedcollm.toml").read_text() + '[data]\ntasks = ["colours"]\n')
    (folder / "machine.toml").write_text("simulation = true\n")
    return Workspace(folder)


def test_before_prepare_the_plan_is_of_the_rows_that_it_deals(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", "[client_training]\nsteps = 6", "[client_training]\nepochs = 2.5")
    before = plan(to_be_dealt(workspace_folder))
    assert before.is_to_be_dealt
    assert not (workspace_folder / "private").exists()
    assert [one.mend for one in before.missing] == ["fedcollm prepare"]
    assert stage_of(before, "client-train").rows == (3, 3), "of 12 rows each party gets a quarter"
    prepare(Workspace(workspace_folder))
    after = plan(Workspace(workspace_folder))
    assert (after.is_to_be_dealt, after.missing) == (False, [])
    assert after.stages == before.stages
    assert after.two_phases == before.two_phases


def test_a_row_to_be_dealt_that_training_will_refuse_is_named_before(workspace_folder: Path) -> None:
    path = workspace_folder / "data/train.jsonl"
    long = {"question": "red " * 64, "choices": ["red"], "answer": 0}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    found = [one.what for one in plan(to_be_dealt(workspace_folder)).missing]
    assert any("has 65 tokens; max_length is 512, the model's context 64" in what for what in found), found


@pytest.mark.parametrize(("words", "length"), [(40, 41), (100, 64)])
def test_scoring_is_planned_for_the_longest_question_and_its_answer(
    workspace_folder: Path, words: int, length: int
) -> None:
    before = plan(Workspace(workspace_folder))
    path = workspace_folder / "data/test.jsonl"
    long = {"question": " ".join(["red"] * words), "choices": ["blue", "green"], "answer": 0}
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    found = plan(Workspace(workspace_folder))
    assert stage_of(found, "evaluate llm").length == length  # a token a word; the model's context is 64
    assert stage_of(found, "client-train") == stage_of(before, "client-train")
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", "[evaluation]\nlimit = 12")
    assert stage_of(plan(Workspace(workspace_folder)), "evaluate llm").length == stage_of(before, "evaluate llm").length


def test_each_model_has_its_layers_and_how_it_is_held(workspace_folder: Path) -> None:
    edit(workspace_folder / "fedcollm.toml", 'model = "models/llm"', 'model = "models/llm"\nquantization = "4bit"')
    slm, llm = plan(Workspace(workspace_folder)).models
    assert (slm.modules, slm.held_in, slm.dtype) == (["c_attn"], "float32", "float32")
    assert (llm.modules, llm.held_in, llm.dtype) == (["c_attn"], "4bit", "float32")


# --- few bits, two phases, privacy


def with_lines(folder: Path, place: str, *lines: str) -> Workspace:
    edit(folder / "fedcollm.toml", place, "\n".join([place, *lines]))
    return Workspace(folder)


def test_in_two_phases_one_model_is_counted_and_no_other(workspace_folder: Path) -> None:
    found = plan(Workspace(workspace_folder))
    both, (capture, train) = stage_of(found, "co-distill"), found.two_phases
    llm = found.models[1]
    assert train.memory["weights"] == capture.memory["weights"] == 4 * llm.parameters < both.memory["weights"]
    assert train.memory["activations"] < both.memory["activations"]
    assert train.steps == both.steps
    assert capture.steps is None
    assert set(capture.memory) == {"weights", "adapters", "logits", "transient"}
    assert sum(capture.memory.values()) < sum(train.memory.values()) < sum(both.memory.values())


def test_in_two_phases_nothing_is_planned_where_there_are_none(workspace_folder: Path) -> None:
    workspace = with_lines(workspace_folder, "[distillation]", 'order = "alternating"')
    assert plan(workspace).two_phases == []


def test_a_least_confidence_does_not_keep_a_plan_from_being_made(workspace_folder: Path) -> None:
    before = stage_of(plan(Workspace(workspace_folder)), "co-distill").memory
    workspace = with_lines(workspace_folder, "[distillation]", "min_confidence = 0.5")
    assert stage_of(plan(workspace), "co-distill").memory == before


def test_private_training_counts_a_gradient_of_each_row(workspace_folder: Path) -> None:
    before = stage_of(plan(Workspace(workspace_folder)), "client-train").memory
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", "[privacy]\nnoise_multiplier = 1.0\n[evaluation]")
    workspace = Workspace(workspace_folder)
    stage = stage_of(plan(workspace), "client-train")
    added = {part: size for part, size in stage.memory.items() if part not in before}
    assert added == {"each row's gradient": 4 * before["gradients"], "their sum": before["gradients"]}
    assert stage.batch == 4


def test_training_under_attack_tells_its_passes_and_what_it_takes_more(
    workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    before = stage_of(plan(Workspace(workspace_folder)), "client-train")
    assert before.passes == 1
    scoring = stage_of(plan(Workspace(workspace_folder)), "evaluate llm")
    attack = "[client_training.adversarial]\nradius = 0.1\nsteps = 3\n[evaluation.attack]\nradius = 0.1\nsteps = 2\n"
    edit(workspace_folder / "fedcollm.toml", "[evaluation]", f"{attack}[evaluation]")
    scored = stage_of(plan(Workspace(workspace_folder)), "evaluate llm")
    assert (scoring.passes, scored.passes) == (1, 4)  # lm-eval's, a plain one that begins the attack, and two more
    assert scored.memory["activations"] > 0
    assert "activations" not in scoring.memory
    assert all(scored.memory[part] >= size for part, size in scoring.memory.items())
    stage = stage_of(plan(Workspace(workspace_folder)), "client-train")
    assert (stage.passes, stage.steps) == (4, before.steps)
    assert stage.memory["plain gradients"] == stage.memory["gradients"] == before.memory["gradients"]
    assert stage.memory["activations"] > before.memory["activations"]
    assert stage.memory["logits"] == before.memory["logits"]
    shown = " ".join(fedcollm("plan", "-w", workspace_folder).out.split())
    assert "client-train: 4 passes over each batch, for the attack on prompts" in shown


def test_a_row_that_training_will_refuse_is_among_what_is_missing(workspace_folder: Path) -> None:
    path = workspace_folder / "private/client-2/train.jsonl"
    content = path.read_text()
    path.write_text(content + '{"prompt": "' + "red " * 64 + '", "completion": " red"}\n')
    [found] = [one for one in plan(Workspace(workspace_folder)).missing if "client-2" in one.what]
    line = len(content.splitlines()) + 1
    assert f"line {line} of train.jsonl has 65 tokens; max_length is 512, the model's context 64" in found.what
    assert 'data.too_long = "skip"' in found.mend
    path.write_text(content)
    assert plan(Workspace(workspace_folder)).missing == []
