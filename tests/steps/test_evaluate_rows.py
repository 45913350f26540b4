"""evaluate --rows: the numbers are those of plain PyTorch, and of the lm_eval harness on the same texts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import Outcome, rows, scale, write_rows
from processes import start_together
from stages.evaluate_rows import evaluate_rows
from stages.progress.status import status
from stages.runtime.errors import Damaged, UsageProblem
from stages.workspace.paths import Workspace

HELD_OUT = [*rows(10, start=40), {"prompt": "Q : what is the star ?", "completion": " a big blue star ."}]


@pytest.fixture
def held_out(finished: Path) -> Path:
    """Rows of client 2 that nobody trained on, in a workspace whose adapters are loud."""
    for manifest in finished.rglob("round-*/*/manifest.json"):
        scale(manifest.parent, 50)
    return write_rows(finished / "private/client-2/held-out.jsonl", HELD_OUT)


def model_of(folder: Path, role: str, adapter: str | None) -> tuple[Any, Any]:
    base = folder / "models" / role
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        model = PeftModel.from_pretrained(model, folder / adapter).merge_and_unload()
    return model.eval(), AutoTokenizer.from_pretrained(base)


@torch.no_grad()
def by_hand(folder: Path, role: str, adapter: str | None) -> tuple[float, int, float]:
    """Loss per answer token, answer tokens, and the share of rows that are the likeliest throughout, row by row."""
    model, tokenizer = model_of(folder, role, adapter)
    nats, tokens, right = 0.0, 0, 0
    for row in HELD_OUT:
        prompt = tokenizer.encode(row["prompt"])
        whole = torch.tensor(tokenizer.encode(row["prompt"] + row["completion"]))
        chances = model(whole[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        answer = whole[len(prompt) :]
        nats -= float(chances.gather(1, answer[:, None]).double().sum())
        tokens += len(answer)
        right += bool((chances.argmax(-1) == answer).all())
    return nats / tokens, tokens, right / len(HELD_OUT)


SUBJECTS = {
    "--round 2 --client 2": ("slm", "exchange/round-0002/client-2", "round-0002/client-2"),
    "--round 1 --model llm": ("llm", "private/server/round-0001/llm", "round-0001/llm"),
    "--round 2 --model aggregate": ("slm", "private/server/round-0002/aggregate", "round-0002/aggregate"),
    "--zero-shot --model slm": ("slm", None, "zero-shot/slm"),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_loss_and_exact_match_are_those_of_plain_pytorch(
    subject: str, held_out: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = held_out.parents[2]
    role, adapter, where = SUBJECTS[subject]
    outcome = fedcollm("evaluate", *subject.split(), "--rows", held_out, "--json", "-w", folder)
    assert outcome.code == 0, outcome.err
    scores = json.loads(outcome.out)["scores"]
    loss, tokens, exact = by_hand(folder, role, adapter)
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert (scores["rows"], scores["tokens"], scores["exact_match"]) == (11, tokens, pytest.approx(exact))
    [written] = (folder / "results/own-rows").glob(f"{where}-held-out-*.json")
    assert json.loads(written.read_text())["scores"] == scores


def test_subjects_differ_so_that_an_adapter_left_out_would_show(held_out: Path) -> None:
    folder = held_out.parents[2]
    losses = [by_hand(folder, role, adapter)[0] for role, adapter, _ in SUBJECTS.values()]
    assert len({round(loss, 4) for loss in losses}) == len(losses)


def test_the_likelihoods_are_those_that_lm_eval_itself_finds(held_out: Path) -> None:
    folder = held_out.parents[2]
    found = evaluate_rows(Workspace(folder), held_out, round=2, client=2)["scores"]
    model, tokenizer = model_of(folder, "slm", "exchange/round-0002/client-2")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=(row["prompt"], row["completion"]), idx=0)
        for row in HELD_OUT
    ]
    answers = lm.loglikelihood(asked, disable_tqdm=True)
    assert found["loss"] == pytest.approx(-sum(nats for nats, _ in answers) / found["tokens"], rel=1e-5)
    assert found["exact_match"] == pytest.approx(sum(is_likeliest for _, is_likeliest in answers) / len(answers))


@torch.no_grad()
def continued(model: Any, ids: list[int], most: int, end: int) -> list[int]:
    """The likeliest token, one after the other."""
    made: list[int] = []
    while len(made) < most:
        made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        if made[-1] == end:
            return made[:-1]
    return made


def test_generated_text_is_compared_with_the_answer(held_out: Path, fedcollm: Callable[..., Outcome]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    folder = held_out.parents[2]
    model, tokenizer = model_of(folder, "slm", "exchange/round-0002/client-2")
    scorer, shares, same = RougeScorer(["rougeL"]), [], 0
    for row in HELD_OUT:
        text = tokenizer.decode(continued(model, tokenizer.encode(row["prompt"]), 5, tokenizer.eos_token_id))
        shares.append(scorer.score(row["completion"], text)["rougeL"].fmeasure)
        same += text.strip() == row["completion"].strip()
    outcome = fedcollm(
        *("evaluate", "--round", "2", "--client", "2", "--rows", held_out, "--generate", "--json", "-w", folder)
    )
    assert outcome.code == 0, outcome.err
    written = json.loads(outcome.out)["scores"]["written"]
    assert 0 < sum(shares) / len(shares) < 1
    assert written["rouge_l"] == pytest.approx(sum(shares) / len(shares))
    assert written["generated_match"] == pytest.approx(same / len(HELD_OUT))
    assert (written["most_tokens"], written["until"]) == (5, "\n")


def test_two_processes_give_the_scores_of_one(held_out: Path, fedcollm: Callable[..., Outcome]) -> None:
    folder = held_out.parents[2]
    words = ("--round", 2, "--client", 2, "--rows", held_out, "--generate", "-w", folder)
    assert fedcollm("evaluate", *words).code == 0
    path = Workspace(folder).rows_result(2, "client-2", held_out)
    alone = json.loads(path.read_text())["scores"]
    path.unlink()
    ends = [one.end() for one in start_together(2, "evaluate", *words)]
    assert [code for code, _ in ends] == [0, 0], ends
    together = json.loads(path.read_text())["scores"]
    assert together.pop("written") == pytest.approx(alone.pop("written"))
    assert together == pytest.approx(alone)


def test_a_second_call_reads_the_result_and_other_rows_or_adapters_are_scored_anew(
    held_out: Path, fedcollm: Callable[..., Outcome]
) -> None:
    folder = held_out.parents[2]
    words = ("evaluate", "--round", "2", "--client", "2", "--rows", held_out, "-w", folder)
    assert "already done" not in fedcollm(*words).err
    assert "already done" in fedcollm(*words).err
    write_rows(held_out, HELD_OUT[:4])
    outcome = fedcollm(*words, "--json")
    assert "already done" not in outcome.err
    assert json.loads(outcome.out)["scores"]["rows"] == 4
    scale(folder / "exchange/round-0002/client-2", 2)
    assert "already done" not in fedcollm(*words).err
    assert len(list((folder / "results/own-rows").rglob("client-2-*.json"))) == 1


def test_results_on_rows_do_not_disturb_the_scores_that_are_compared(held_out: Path) -> None:
    workspace = Workspace(held_out.parents[2])
    before = status(workspace)
    evaluate_rows(workspace, held_out, round=2, client=2)
    assert status(workspace) == before
    assert not workspace.result(2, "client-2").exists()


def test_a_result_that_was_changed_is_told_and_not_used(held_out: Path, fedcollm: Callable[..., Outcome]) -> None:
    workspace = Workspace(held_out.parents[2])
    evaluate_rows(workspace, held_out, round=2, client=2)
    path = workspace.rows_result(2, "client-2", held_out)
    path.write_text(path.read_text().replace('"tokens": 15', '"tokens": 14'))
    outcome = fedcollm("status", "--verify", "-w", workspace.root)
    assert outcome.code == 4
    assert f"{workspace.shown(path)}: " in outcome.out
    with pytest.raises(Damaged, match="has been changed since it was written"):
        evaluate_rows(workspace, held_out, round=2, client=2)


def test_a_row_longer_than_the_model_s_context_is_refused_by_its_line(held_out: Path) -> None:
    long = [*HELD_OUT, {"prompt": "red " * 70, "completion": " blue"}]
    write_rows(held_out, long)
    with pytest.raises(Damaged, match=r"line 12 of held-out.jsonl has 71 tokens"):
        evaluate_rows(Workspace(held_out.parents[2]), held_out, round=2, client=2)


@pytest.mark.parametrize(
    ("words", "found"),
    [(["--generate"], "--generate is for --rows"), (["--rows", "x", "--attack", "0.1"], "--attack is of questions")],
)
def test_options_that_do_not_go_together_are_refused(
    words: list[str], found: str, workspace_folder: Path, fedcollm: Callable[..., Outcome]
) -> None:
    outcome = fedcollm("evaluate", "--round", "1", *words, "-w", workspace_folder)
    assert outcome.code == UsageProblem.exit_code
    assert found in outcome.err
