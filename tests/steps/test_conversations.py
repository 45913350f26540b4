"""Steps on rows of messages: the tokens that are trained and scored are those of the assistant's turns alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from builders import COLOURS, SHAPES, Outcome, edit, give_template, write_rows
from stages.artefacts.reading import read_manifest
from stages.broadcast import broadcast
from stages.client_train import client_train
from stages.evaluate_rows import evaluate_rows
from stages.federation.run import run
from stages.workspace.paths import Workspace

TEMPLATE = (
    "{% for one in messages %}{{ ('Q : ' if one['role'] == 'user' else 'A : ') + one['content'] + "
    "(' <eos> ' if one['role'] == 'assistant' else ' ') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A : ' }}{% endif %}"
)


def chat(i: int) -> dict[str, Any]:
    """Two questions and answers, the second answer of two words."""
    shape, colour = SHAPES[i % 3], COLOURS[i % 3]
    return {
        "messages": [
            {"role": "user", "content": f"what colour is the {shape} {i % 4} ?"},
            {"role": "assistant", "content": colour},
            {"role": "user", "content": "what shape is it ?"},
            {"role": "assistant", "content": f"a {shape}"},
        ]
    }


CHATS = [chat(i) for i in range(12)]


@pytest.fixture
def talking(workspace_folder: Path) -> Path:
    """A workspace whose models have a chat template, and all rows are conversations."""
    give_template(workspace_folder, TEMPLATE)
    for k in (1, 2, 3):
        write_rows(workspace_folder / f"private/client-{k}/train.jsonl", CHATS)
    write_rows(workspace_folder / "private/server/auxiliary.jsonl", CHATS[:8])
    return workspace_folder


@torch.no_grad()
def by_hand(folder: Path, chats: list[dict[str, Any]]) -> tuple[float, int]:
    """Loss per token and number of tokens of the base, where an answer is what stands after "A :" up to <eos>."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "models/slm").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "models/slm")
    nats, tokens = 0.0, 0
    for one in chats:
        words, learned = list[str](), list[bool]()
        for message in one["messages"]:
            is_answer = message["role"] == "assistant"
            said = [*message["content"].split(), *(["<eos>"] if is_answer else [])]
            words += ["A" if is_answer else "Q", ":", *said]
            learned += [False, False, *[is_answer] * len(said)]
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(words))
        chances = model(ids[None]).logits[0].log_softmax(-1)
        own = chances[:-1].gather(1, ids[1:, None])[:, 0]
        where = torch.tensor(learned[1:])
        nats -= float(own[where].sum())
        tokens += int(where.sum())
    return nats / tokens, tokens


def test_a_conversation_s_answers_alone_are_trained_and_scored(talking: Path) -> None:
    workspace = Workspace(talking)
    loss, tokens = by_hand(talking, CHATS)
    assert tokens == 12 * (2 + 3)
    found = evaluate_rows(workspace, workspace.client_data(2), model="slm")["scores"]
    assert (found["rows"], found["tokens"]) == (12, tokens)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    broadcast(workspace, round=1)
    manifest = client_train(workspace, client=2, round=1)
    assert manifest.metrics["slm_ft_before"] == pytest.approx(loss, rel=1e-4)
    assert manifest.metrics["slm_ft_after"] < loss


def test_a_federation_runs_on_conversations_and_a_model_learns_to_end_its_turn(
    talking: Path, fedcollm: Callable[..., Outcome]
) -> None:
    edit(talking / "fedcollm.toml", "steps = 6", "steps = 60")
    run(Workspace(talking), scores=False)
    rows = talking / "private/client-1/train.jsonl"
    words = ("evaluate", "--round", "2", "--client", "1", "--rows", rows, "--generate", "--json", "-w", talking)
    scores = json.loads(fedcollm(*words).out)["scores"]
    assert scores["written"]["until"] == "\n"
    assert scores["written"]["most_tokens"] == 3
    assert scores["written"]["rouge_l"] >= 0.5
    assert scores["exact_match"] <= scores["written"]["generated_match"]


def test_check_rows_and_plan_tell_of_messages_without_a_template(
    talking: Path, fedcollm: Callable[..., Outcome]
) -> None:
    assert fedcollm("check-rows", "-w", talking).code == 0
    for role in ("slm", "llm"):
        (talking / "models" / role / "chat_template.jinja").unlink()
    outcome = fedcollm("check-rows", "--client", "2", "-w", talking)
    assert outcome.code == 4
    assert "FAIL the tokenizer of slm has no chat template" in outcome.out
    planned = fedcollm("plan", "-w", talking)
    assert planned.code == 0, planned.err
    assert "has no chat template" in planned.out


def test_two_phases_find_the_losses_of_the_same_tokens_as_one(talking: Path, fedcollm: Callable[..., Outcome]) -> None:
    workspace = Workspace(talking)
    broadcast(workspace, round=1)
    for k in (1, 2, 3):
        client_train(workspace, client=k, round=1)
    assert fedcollm("aggregate", "--round", "1", "-w", talking).code == 0
    for role in ("llm", "slm"):
        words = ("co-distill", "--round", "1", "--phase", "capture", "--model", role, "-w", talking)
        assert fedcollm(*words).code == 0
    assert fedcollm("co-distill", "--round", "1", "--phase", "train", "-w", talking).code == 0
    before = {role: metrics_of(workspace, role)[f"{role}_ft_before"] for role in ("slm", "llm")}
    assert fedcollm("co-distill", "--round", "1", "--overwrite", "-w", talking).code == 0
    after = {role: metrics_of(workspace, role)[f"{role}_ft_before"] for role in ("slm", "llm")}
    assert before == pytest.approx(after, rel=1e-4)


def metrics_of(workspace: Workspace, role: str) -> dict[str, float]:
    return dict(read_manifest({"slm": workspace.slm, "llm": workspace.llm}[role](1))[0].metrics)
