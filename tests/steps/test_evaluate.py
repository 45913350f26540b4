"""evaluate: the accuracy is that of argmax by hand, and of the `lm_eval` command on the same folder."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import COLOURS, WORDS, Outcome, edit, give_template, scale, sign
from stages.artefacts import records
from stages.evaluate import evaluate
from stages.runtime.errors import UsageProblem
from stages.study import results
from stages.workspace.attacks import Attack
from stages.workspace.paths import Workspace

QUESTIONS = 60

GENERATION = """
task: colours_said
dataset_path: json
dataset_kwargs: {data_files: {train: data/train.jsonl, test: data/test.jsonl}}
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 1, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 3.0}
"""


@pytest.fixture
def scored(finished: Path) -> Path:
    """A finished workspace with questions of random words and adapters loud enough to answer them otherwise."""
    draw = random.Random(1)
    questions = []
    for _ in range(QUESTIONS):
        words = draw.sample(WORDS, 9)
        questions.append({"question": " ".join(words[:6]), "choices": words[6:], "answer": draw.randrange(3)})
    (finished / "data/test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    for manifest in finished.rglob("round-*/*/manifest.json"):
        scale(manifest.parent, 50)
    return finished


def model_of(folder: Path, role: str, adapter: str | None) -> tuple[Any, Any]:
    base = folder / "models" / role
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, folder / adapter)
    return model.eval(), AutoTokenizer.from_pretrained(base)


@torch.no_grad()
def next_token_logits(folder: Path, role: str, adapter: str | None) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Each test question and the logits after its prompt."""
    model, tokenizer = model_of(folder, role, adapter)
    questions = [json.loads(line) for line in (folder / "data/test.jsonl").read_text().splitlines()]
    return [(q, model(torch.tensor([tokenizer.encode(q["question"])])).logits[0, -1]) for q in questions]


def accuracy_by_hand(folder: Path, role: str, adapter: str | None) -> float:
    """How often the right choice, one token each, is the likeliest of its three after the prompt."""
    _, tokenizer = model_of(folder, role, None)
    right = 0
    for question, logits in next_token_logits(folder, role, adapter):
        choices = [tokenizer.encode(choice)[0] for choice in question["choices"]]
        right += int(logits[choices].argmax()) == question["answer"]
    return right / QUESTIONS


SUBJECTS = {
    "--round 2 --model slm": ("slm", "private/server/round-0002/slm", "round-0002/slm"),
    "--round 1 --model llm": ("llm", "private/server/round-0001/llm", "round-0001/llm"),
    "--round 2 --model aggregate": ("slm", "private/server/round-0002/aggregate", "round-0002/aggregate"),
    "--round 1 --client 3": ("slm", "exchange/round-0001/client-3", "round-0001/client-3"),
    "--zero-shot --model slm": ("slm", None, "zero-shot/slm"),
    "--zero-shot --model llm": ("llm", None, "zero-shot/llm"),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_accuracy_is_that_of_the_likeliest_choice(subject: str, scored: Path, fedcollm: Callable[..., Outcome]) -> None:
    role, adapter, result = SUBJECTS[subject]
    outcome = fedcollm("evaluate", *subject.split(), "-w", scored)
    assert outcome.code == 0, outcome.err
    written = json.loads((scored / f"results/{result}.json").read_text())
    assert written["tasks"]["colours"]["metrics"]["acc"] == accuracy_by_hand(scored, role, adapter)
    assert written["tasks"]["colours"]["questions"] == QUESTIONS


@pytest.mark.parametrize("role", ["slm", "llm"])
def test_in_the_precision_of_training_questions_are_answered_by_the_logits_that_training_has(
    role: str, scored: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(scored / "fedcollm.toml", "[evaluation]", '[evaluation]\nprecision = "training"')
    outcome = fedcollm("evaluate", "--zero-shot", "--model", role, "--dtype", "bfloat16", "-w", scored)
    assert outcome.code == 0, outcome.err
    written = json.loads((scored / f"results/zero-shot/{role}.json").read_text())
    assert written["weights_dtype"] == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        assert written["tasks"]["colours"]["metrics"]["acc"] == accuracy_by_hand(scored, role, None)


def test_those_accuracies_differ_so_that_an_adapter_left_out_would_show(scored: Path) -> None:
    for role, adapter, _ in SUBJECTS.values():
        if adapter:
            assert accuracy_by_hand(scored, role, adapter) != accuracy_by_hand(scored, role, None), adapter


TEMPLATE = (
    "{% for one in messages %}{{ one['role'] + ' : ' + one['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A : ' }}{% endif %}"
)
SHOTS = "num_fewshot = 2"
CHAT = 'apply_chat_template = true\nsystem_prompt = "the big star is red ."'
ASKED = {
    "as it is": ("", ""),
    "two examples": (SHOTS, "--num_fewshot 2"),
    "a system's words": ('system_prompt = "red."', "--system_instruction red."),
    "a chat template": (f"{SHOTS}\n{CHAT}", "--num_fewshot 2 --apply_chat_template --system_instruction SYSTEM"),
}


@pytest.mark.slow
@pytest.mark.parametrize("asked", ASKED)
def test_accuracy_is_what_the_lm_eval_command_prints_for_the_same_folder(
    asked: str, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.__main__

    settings, options = ASKED[asked]
    give_template(scored, TEMPLATE)
    adapter = f",peft={scored / 'private/server/round-0002/slm'}"
    if settings:  # under another agreement an adapter is refused
        edit(scored / "fedcollm.toml", "[evaluation]", f"[evaluation]\n{settings}")
        adapter = ""
    found = evaluate(Workspace(scored), model="slm", round=2 if adapter else None)["tasks"]["colours"]
    ours = found["metrics"]
    arguments = f"pretrained={scored / 'models/slm'}{adapter},dtype=float32"
    words = f"--tasks colours --include_path tasks --batch_size 8 --device cpu --output_path {tmp_path / 'out'}"
    command = ["lm_eval", "--model", "hf", "--model_args", arguments, *words.split(), "--log_samples"]
    command += [word.replace("SYSTEM", "the big star is red .") for word in options.split()]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(scored)  # the task's data files are named from there
    monkeypatch.setattr(lm_eval.__main__, "setup_logging", lambda: None)  # for all tests after this one
    capfd.readouterr()
    lm_eval.__main__.cli_evaluate()
    printed = capfd.readouterr().out
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["colours"]
    assert ours["acc"] == theirs["acc,none"]
    assert ours["acc_stderr"] == theirs["acc_stderr,none"]
    (row,) = [line.split("|") for line in printed.splitlines() if line.startswith("|colours")]
    assert f"{ours['acc']:.4f}" == f"{float(row[7]):.4f}"
    (logged,) = (tmp_path / "out").rglob("samples_colours_*.jsonl")
    samples = sorted(map(json.loads, logged.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert found["correct"]["acc"] == "".join(str(int(sample["acc"])) for sample in samples)
    assert set(found["correct"]["acc"]) == {"0", "1"}


def test_each_way_of_asking_gives_other_questions_and_names_its_examples(scored: Path) -> None:
    give_template(scored, TEMPLATE)
    plain, found = (scored / "fedcollm.toml").read_text(), {}
    for name, (settings, _) in ASKED.items():
        (scored / "fedcollm.toml").write_text(plain.replace("[evaluation]", f"[evaluation]\n{settings}"))
        found[name] = evaluate(Workspace(scored), model="slm")["tasks"]["colours"]
    assert len({one["questions_sha256"] for one in found.values()}) == len(ASKED)
    assert [one["num_fewshot"] for one in found.values()] == [0, 2, 0, 2]


def test_a_model_without_a_chat_template_is_not_asked_by_one(scored: Path) -> None:
    edit(scored / "fedcollm.toml", "[evaluation]", f"[evaluation]\n{CHAT}")
    with pytest.raises(UsageProblem, match=r"this model's tokenizer has no chat template"):
        evaluate(Workspace(scored), model="slm")


def test_a_task_of_another_number_of_examples_is_told(scored: Path, fedcollm: Callable[..., Outcome]) -> None:
    task = scored / "tasks/colours.yaml"
    plain, agreement = task.read_text(), (scored / "fedcollm.toml").read_text()
    words = ("evaluate", "--zero-shot", "--model", "slm", "-w", scored)
    task.write_text(plain + "num_fewshot: 3\n")
    assert "asks for 3 examples before each question; it is scored without" in fedcollm(*words).err
    (scored / "fedcollm.toml").write_text(agreement.replace("[evaluation]", f"[evaluation]\n{SHOTS}"))
    assert "asks for 3 examples before each question; it is scored with 2" in fedcollm(*words).err
    task.write_text(plain + "num_fewshot: 0\n")
    assert "says that it has no examples" in fedcollm(*words).err


def test_an_adapter_that_changes_nothing_is_not_scored(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    broadcast, update = (finished / "exchange/round-0001" / name for name in ("broadcast", "client-2"))
    (update / "adapter_model.safetensors").write_bytes((broadcast / "adapter_model.safetensors").read_bytes())
    sign(update)
    outcome = fedcollm("evaluate", "--round", 1, "--client", 2, "-w", finished)
    assert outcome.code == 6
    assert "the adapter does not change the model: its logits are the base's" in outcome.err
    assert not list(finished.rglob("results/**/*.json"))


def test_a_result_says_what_was_scored_and_how(finished: Path) -> None:
    result = evaluate(Workspace(finished), model="llm", round=2)
    adapter = finished / "private/server/round-0002/llm"

    def digest(name: str) -> str:
        return hashlib.sha256((adapter / name).read_bytes()).hexdigest()

    assert result["subject"] == "llm"
    assert result["round"] == 2
    assert result["adapter_sha256"] == digest("adapter_model.safetensors")
    assert result["manifest_sha256"] == digest("manifest.json")
    assert result["agreement_sha256"] == hashlib.sha256((finished / "fedcollm.toml").read_bytes()).hexdigest()
    assert result["base"] == json.loads((adapter / "manifest.json").read_text())["base"]
    assert result["batch_size"] == 8
    assert result["tasks"]["colours"]["version"] == 1.0
    assert result["tasks"]["colours"]["prompt"] == "{{question}}"
    assert result["tasks"]["colours"]["num_fewshot"] == 0
    assert result["versions"].keys() >= {"python", "torch", "transformers", "peft"}
    assert json.loads((finished / "results/round-0002/llm.json").read_text()) == records.stamped(result)


def test_the_same_again_is_already_done_and_another_adapter_is_scored_anew(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    words = ("evaluate", "--round", 1, "--model", "slm", "-w", finished)
    result = finished / "results/round-0001/slm.json"
    assert fedcollm(*words).code == 0
    before = result.stat().st_mtime_ns
    again = fedcollm(*words)
    assert again.code == 0
    assert "already done" in again.err
    assert result.stat().st_mtime_ns == before
    adapter = finished / "private/server/round-0001/slm"
    (adapter / "adapter_model.safetensors").write_bytes(
        (finished / "private/server/round-0002/slm/adapter_model.safetensors").read_bytes()
    )
    sign(adapter)
    assert "already done" not in fedcollm(*words).err
    assert result.stat().st_mtime_ns > before


def test_a_limit_of_the_agreement_is_kept(finished: Path) -> None:
    edit(finished / "fedcollm.toml", "[evaluation]", "[evaluation]\nlimit = 5")
    assert evaluate(Workspace(finished), model="slm")["tasks"]["colours"]["questions"] == 5


def test_a_task_that_generates_is_prepared_and_scored(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    (finished / "tasks/colours_said.yaml").write_text(GENERATION)
    edit(finished / "fedcollm.toml", 'tasks = ["colours"]', 'tasks = ["colours_said"]')
    toml = finished / "fedcollm.toml"
    toml.write_text(toml.read_text() + '\n[data]\ntasks = ["colours_said"]\n')
    assert fedcollm("prepare", "--overwrite", "-w", finished).code == 0
    row = json.loads((finished / "private/client-1/train.jsonl").read_text().splitlines()[0])
    assert row["prompt"].startswith("Q : what colour is the ")
    assert row["completion"] in [f" {colour}" for colour in COLOURS]

    result = evaluate(Workspace(finished), model="slm")["tasks"]["colours_said"]
    said = next_token_logits(finished, "slm", None)
    _, tokenizer = model_of(finished, "slm", None)
    right = [tokenizer.decode([int(logits.argmax())]).strip() == q["choices"][q["answer"]] for q, logits in said]
    assert result["metrics"]["exact_match"] == sum(right) / len(right)
    assert result["version"] == 3.0
    drawn = fedcollm("evaluate", "--zero-shot", "--model", "slm", "-w", finished).out
    assert re.search(r"model +task +round +questions +exact_match ", drawn)  # a column for each metric there is
    assert re.search(r"slm +colours_said +base +[0-9]+ +[01][.][0-9]{4} ", drawn)


@pytest.mark.parametrize(
    "words", ["--round 1 --zero-shot", "", "--zero-shot --client 1", "--zero-shot --model aggregate"]
)
def test_a_question_that_makes_no_sense_is_refused(
    words: str, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("evaluate", *words.split(), "-w", finished)
    assert outcome.code == 2
    assert "evaluate needs either --round or --zero-shot" in outcome.err
    assert not (finished / "results").exists()


def test_a_changed_task_is_scored_anew(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert fedcollm("evaluate", "--zero-shot", "-w", finished).code == 0
    edit(finished / "tasks/colours.yaml", "version: 1.0", "version: 2.0")
    assert "already done" not in fedcollm("evaluate", "--zero-shot", "-w", finished).err


def test_a_base_that_generates_otherwise_is_scored_anew(
    finished: Path, base_models: Path, fedcollm: Callable[..., Outcome]
) -> None:
    (finished / "models").unlink()
    shutil.copytree(base_models, finished / "models")
    words = ("evaluate", "--zero-shot", "-w", finished)
    result = finished / "results/zero-shot/slm.json"
    assert fedcollm(*words).code == 0
    assert "already done" in fedcollm(*words).err
    generation = finished / "models/slm/generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"repetition_penalty": 5.0}))
    assert "already done" not in fedcollm(*words).err
    # An earlier version wrote nothing of it: its result is taken.
    of_earlier_version = records.read_result(result)
    del of_earlier_version["base"]["settings_sha256"]
    result.write_text(json.dumps(records.stamped(of_earlier_version)))
    assert "already done" in fedcollm(*words).err


def test_another_dtype_is_scored_anew(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    assert fedcollm("evaluate", "--zero-shot", "-w", finished).code == 0
    again = fedcollm("evaluate", "--zero-shot", "--dtype", "bfloat16", "-w", finished)
    assert "already done" not in again.err


def test_questions_that_are_cut_are_counted_wherever_their_score_is_shown(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    long = [{"question": " ".join(["red"] * 100), "choices": ["red", "blue"], "answer": 0}] * 2
    with (finished / "data/test.jsonl").open("a") as file:
        file.writelines(json.dumps(question) + "\n" for question in long)
    outcome = fedcollm("evaluate", "--round", 2, "-w", finished)
    assert "2 of 14 questions of colours are longer than the model's context of 64 tokens" in outcome.err
    assert "14, 2 cut" in outcome.out
    found = json.loads((finished / "results/round-0002/slm.json").read_text())["tasks"]["colours"]
    assert (found["questions"], found["questions_in_all"], found["cut"]) == (14, 14, 2)
    assert fedcollm("report", "-w", finished).code == 0
    page = (finished / "results/report/index.html").read_text()
    assert "scored without their beginning: up to 2 of colours" in page
    assert "by evaluation.limit" not in page
    (finished / "data/test.jsonl").write_text((finished / "data/train.jsonl").read_text())
    assert fedcollm("report", "-w", finished).code == 0
    assert "Stale, and left out: results/round-0002/slm.json" in (finished / "results/report/index.html").read_text()


def test_a_limited_score_is_not_taken_for_one_of_all_questions(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(finished / "fedcollm.toml", "[evaluation]", "[evaluation]\nlimit = 5")
    outcome = fedcollm("evaluate", "--zero-shot", "-w", finished)
    assert "only the first 5 of 12 questions of colours count, by evaluation.limit" in outcome.err
    assert "5 of 12" in outcome.out
    assert results.remarks([Workspace(finished)]) == [
        "only the first questions count, by evaluation.limit: 5 of 12 of colours; no score of a whole task"
    ]


def test_a_metric_that_is_not_measured_is_told(finished: Path, fedcollm: Callable[..., Outcome]) -> None:
    task = finished / "tasks/colours.yaml"
    edit(task, "metric_list: [", "metric_list: [{metric: bleu, aggregation: bleu, higher_is_better: true}, ")
    outcome = fedcollm("evaluate", "--zero-shot", "-w", finished)
    assert "colours asks for bleu, which lm-eval does not measure of multiple_choice" in outcome.err
    edit(task, "{metric: acc, aggregation: mean,", "{metric: acc, aggregation: bleu,")
    outcome = fedcollm("evaluate", "--zero-shot", "-w", finished)
    assert (outcome.code, "error: task colours" in outcome.err) == (2, True), outcome.err
    task.write_text(task.read_text().partition("metric_list")[0] + "metric_list: []\n")
    outcome = fedcollm("evaluate", "--zero-shot", "-w", finished)
    assert (outcome.code, "task colours names no metric" in outcome.err) == (2, True)


@pytest.mark.parametrize(
    "text", ["{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ question.nothing.more }}"]
)
def test_a_template_that_cannot_be_rendered_ends_in_words(
    text: str, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(finished / "tasks/colours.yaml", '"{{question}}"', f"'{text}'")
    outcome = fedcollm("evaluate", "--zero-shot", "-w", finished)
    assert outcome.code == 2
    assert "task colours cannot be used" in outcome.err


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ('"{{question}}"', '"{{question}} "', 12),  # and lm-eval's own delimiter
        ("metric_list", 'target_delimiter: "  "\nmetric_list', 12),
        ('"{{question}}"', '"{{question}} "\ntarget_delimiter: ""', 0),
    ],
)
def test_questions_with_two_spaces_before_their_answers_are_counted(
    old: str, new: str, count: int, workspace_folder: Path
) -> None:
    edit(workspace_folder / "tasks/colours.yaml", old, new)
    told: list[str] = []
    evaluate(Workspace(workspace_folder), report=lambda event: told.append(f"{event.kind}: {event.text}"))
    warnings = [text for text in told if text.startswith("warning")]
    words = f"warning: {count} of 12 questions of colours have two spaces or more before an answer"
    assert [text.partition(": one is")[0] for text in warnings] == ([words] if count else [])


def metrics_of(path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(path.read_text())["tasks"]["colours"]["metrics"]
    return found


def test_accuracy_under_attack_stands_beside_scores_that_stay_what_they_are(
    scored: Path, fedcollm: Callable[..., Outcome]
) -> None:
    """The command of docs/explanation/attacks-on-prompts.md, with another radius."""
    words = ("evaluate", "--round", 2, "--model", "slm", "-w", scored)
    path = scored / "results/round-0002/slm.json"
    assert fedcollm(*words).code == 0
    plain = json.loads(path.read_text())
    attacked = fedcollm(*words, "--attack", 0.3, "--attack-steps", 3)
    assert attacked.code == 0, attacked.err
    assert "robust_acc" in attacked.out
    beside = json.loads(path.read_text())
    signs = beside["tasks"]["colours"]["correct"].pop("robust_acc")
    robust, error = (beside["tasks"]["colours"]["metrics"].pop(f"robust_acc{end}") for end in ("", "_stderr"))
    assert beside.pop("attack") == {"radius": 0.3, "steps": 3, "step_size": None}
    assert {**beside, "result_sha256": ""} == {**plain, "result_sha256": ""}
    right = plain["tasks"]["colours"]["correct"]["acc"]
    assert 0 < signs.count("1") < right.count("1")
    assert all(one == "1" for one, kept in zip(right, signs, strict=True) if kept == "1")
    assert (len(signs), robust) == (QUESTIONS, signs.count("1") / QUESTIONS)
    assert error == pytest.approx((robust * (1 - robust) / (QUESTIONS - 1)) ** 0.5)


def test_what_cannot_be_attacked_is_refused_before_anything_is_scored(
    scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.evaluation import scoring

    scores: list[object] = []
    monkeypatch.setattr(scoring, "evaluate", lambda **more: scores.append(more))
    with (scored / "data/test.jsonl").open("a") as file:
        file.write(json.dumps({"question": "Q : " * 40, "choices": ["red", "blue"], "answer": 0}) + "\n")
    with pytest.raises(UsageProblem, match=f"question {QUESTIONS + 1} of task colours is 80 tokens long"):
        evaluate(Workspace(scored), attack=Attack(radius=0.1))
    assert scores == []


def test_an_attack_that_changes_next_to_nothing_leaves_the_accuracy(scored: Path) -> None:
    result = evaluate(Workspace(scored), model="llm", round=1, attack=Attack(radius=1e-7))["tasks"]["colours"]
    assert result["correct"]["robust_acc"] == result["correct"]["acc"]
    assert 0 < result["metrics"]["robust_acc"] == result["metrics"]["acc"] < 1


def test_a_result_is_made_anew_for_another_attack_alone(scored: Path, fedcollm: Callable[..., Outcome]) -> None:
    words, path = ("evaluate", "--round", 2, "-w", scored), scored / "results/round-0002/slm.json"
    assert fedcollm(*words, "--attack", 0.05).code == 0
    near = path.read_bytes()
    for same in ([], ["--attack", 0.05]):
        assert "already done" in fedcollm(*words, *same).err
        assert path.read_bytes() == near
    assert "already done" not in fedcollm(*words, "--attack", 1).err
    assert metrics_of(path)["robust_acc"] < json.loads(near)["tasks"]["colours"]["metrics"]["robust_acc"]
    assert fedcollm(*words, "--attack", 0.05).code == 0
    assert path.read_bytes() == near  # the same bytes again


def test_the_agreement_may_ask_for_an_attack_on_every_model(scored: Path) -> None:
    edit(scored / "fedcollm.toml", "[evaluation]", "[evaluation.attack]\nradius = 0.3\nsteps = 2\n[evaluation]")
    result = evaluate(Workspace(scored), model="slm")
    assert result["attack"] == {"radius": 0.3, "steps": 2, "step_size": None}
    assert result["tasks"]["colours"]["metrics"]["robust_acc"] <= result["tasks"]["colours"]["metrics"]["acc"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attack", -1), "--attack -1: it is a share of the length of each token's embedding, above 0 and up to 1"),
        (("--attack", 0, "--attack-steps", 3), "--attack 0: it is a share"),
        (("--attack", 1.5), "--attack 1.5: it is a share"),
        (("--attack", "nan"), "--attack nan: it is a share"),
        (("--attack-steps", 3), "--attack-steps is for --attack"),
    ],
)
def test_an_attack_that_is_none_is_refused(
    words: tuple[object, ...], message: str, finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("evaluate", "--round", 1, *words, "-w", finished)
    assert outcome.code == 2
    assert message in outcome.err
    assert "fedcollm evaluate --round 1 --attack 0.1" in outcome.err


def test_a_task_without_choices_is_left_out_of_the_attack_and_that_is_said(
    finished: Path, fedcollm: Callable[..., Outcome]
) -> None:
    (finished / "tasks/colours_said.yaml").write_text(GENERATION)
    edit(finished / "fedcollm.toml", 'tasks = ["colours"]', 'tasks = ["colours", "colours_said"]')
    outcome = fedcollm("evaluate", "--zero-shot", "--attack", 0.1, "-w", finished)
    assert outcome.code == 0, outcome.err
    assert "colours_said is not of one prompt and several answers: no attack" in " ".join(outcome.err.split())
    tasks = json.loads((finished / "results/zero-shot/slm.json").read_text())["tasks"]
    assert "robust_acc" in tasks["colours"]["metrics"]
    assert tasks["colours_said"]["metrics"].keys() == {"exact_match", "exact_match_stderr"}
    edit(finished / "fedcollm.toml", 'tasks = ["colours", "colours_said"]', 'tasks = ["colours_said"]')
    refused = fedcollm("evaluate", "--zero-shot", "--attack", 0.1, "-w", finished)
    assert refused.code == 2
    assert "nothing to attack: no task is multiple choice" in refused.err
    toml = finished / "fedcollm.toml"
    toml.write_text(toml.read_text() + "\n[evaluation.attack]\nradius = 0.1\n")
    assert fedcollm("evaluate", "--zero-shot", "-w", finished).code == 2
    scored = fedcollm("evaluate", "--zero-shot", "--attack", 0, "-w", finished)
    assert scored.code == 0, scored.err
    assert "attack" not in json.loads((finished / "results/zero-shot/slm.json").read_text())
