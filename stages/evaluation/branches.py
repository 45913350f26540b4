"""Log-likelihoods of the answers to a question, its prompt read once.

The answers stand one after the other behind the prompt, in one row. Each is a branch: its tokens attend to the prompt
and to itself, and count positions from the prompt's end. So the logits are those of a row for each answer; and they
are computed at answer positions alone, which saves most of the work where the vocabulary is large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.models.packed_attention import reading
from stages.models.packing import UNBOUNDED, own_window

Likelihood = tuple[float, bool]
"""Of an answer, in nats; and whether each of its tokens is the likeliest."""


@dataclass(frozen=True)
class Question:
    """A prompt and its answers as token ids, of one token at least each; places: which of the requests these are."""

    prompt: tuple[int, ...]
    answers: list[list[int]]
    places: list[int]

    @property
    def branch_tokens(self) -> int:
        """Those of answers that something is predicted after."""
        return sum(len(answer) - 1 for answer in self.answers)

    @property
    def tokens(self) -> int:
        """The length of its row."""
        return len(self.prompt) + self.branch_tokens

    @property
    def longest(self) -> int:
        """How long a row would be that has one answer, the longest."""
        return len(self.prompt) + max(map(len, self.answers)) - 1


class Batch(NamedTuple):
    """Questions as tensors.

    Padded: input_ids, position_ids: [questions, length], padded on the left. attention_mask: bool [questions, 1,
    length, length], whom each token reads. prompt: bool [questions, length], which tokens are of prompts. kept: bool
    [questions, last], at which of the last places of each row logits are needed: after the prompt, and after each token
    of a branch.

    Packed: all rows in one, [1, tokens], without padding. attention_mask: the same as packed_attention.reading has it.
    kept: [logits], the places at which they are needed.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    prompt: Tensor
    kept: Tensor


def longest_row(config: Any) -> int:
    """The longest row at which a model of this configuration attends, and counts positions, as it is told to.

    That of its window, or that up to which its rotary frequencies do not depend on the row.
    """
    text = config.get_text_config()
    names = ("window_size", "attention_window_size", "original_max_position_embeddings")
    bounds = [getattr(text, name, None) for name in names]
    bounds.append((getattr(text, "rope_parameters", None) or {}).get(names[-1]))
    return min([own_window(config), *(int(one) for one in bounds if one)])


def questions_of(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, rows: int, most: int = UNBOUNDED
) -> list[Question]:
    """Prompts and answers, those of one prompt together, in the order of the prompts' first.

    A prompt is read again where its row would have more tokens than most, or than so many rows of one answer each.
    """
    found: list[Question] = []
    last: dict[tuple[int, ...], Question] = {}
    for place, (prompt, answer) in enumerate(requests):
        one = last.get(tuple(prompt))
        if one is not None:
            more = Question(one.prompt, [*one.answers, list(answer)], [*one.places, place])
            if more.tokens <= min(most, rows * more.longest):
                one.answers.append(list(answer))
                one.places.append(place)
                continue
        last[tuple(prompt)] = one = Question(tuple(prompt), [list(answer)], [place])
        found.append(one)
    return found


def batches(questions: Sequence[Question], rows: int) -> Iterator[list[Question]]:
    """Questions of about one length together, the longest first, one at least.

    No more tokens than so many rows of one answer each would have: so a batch takes no more memory than theirs.
    """
    batch: list[Question] = []
    for one in sorted(questions, key=lambda question: -question.tokens):
        if batch and (len(batch) + 1) * batch[0].tokens > rows * batch[0].longest:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def batch_of(questions: Sequence[Question], *, packs: bool = False) -> Batch:
    """The rows of some questions, padded or packed."""
    length = max(question.tokens for question in questions)
    ids, positions = torch.zeros(2, len(questions), length, dtype=torch.long).unbind()
    branch = torch.full_like(ids, -2)  # -2: padding; -1: the prompt; then the number of the answer
    for row, question in enumerate(questions):
        first = length - question.tokens
        tokens = [*question.prompt, *(token for answer in question.answers for token in answer[:-1])]
        ids[row, first:] = torch.tensor(tokens)
        places, branches = list(range(len(question.prompt))), [-1] * len(question.prompt)
        for number, answer in enumerate(question.answers):
            places += range(len(question.prompt), len(question.prompt) + len(answer) - 1)
            branches += [number] * (len(answer) - 1)
        positions[row, first:], branch[row, first:] = torch.tensor(places), torch.tensor(branches)
    reads = (branch[:, None, :] == branch[:, :, None]) | ((branch == -1)[:, None, :] & (branch >= 0)[:, :, None])
    mask = (reads & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    kept = branch >= 0
    for row, question in enumerate(questions):
        kept[row, -1 - question.branch_tokens] = True
    if packs:
        own = branch > -2
        is_prompt, asked = (branch == -1)[own][None], kept[own].nonzero()[:, 0]
        return Batch(ids[own][None], positions[own][None], reading(mask, own), is_prompt, asked)
    last = 1 + max(question.branch_tokens for question in questions)
    return Batch(ids, positions, mask, branch == -1, kept[:, -last:])


@torch.no_grad()
def likelihoods(
    model: Any, questions: Sequence[Question], *, packs: bool = False, softmax_dtype: torch.dtype | None = None
) -> list[list[Likelihood]]:
    """That of each answer to each question. softmax_dtype: of the probabilities; default: that of the logits."""
    parts = of_each(model, questions, batch_of(questions, packs=packs), softmax_dtype=softmax_dtype)
    found = zip(*torch.cat(parts, dim=1).cpu().tolist(), strict=True)  # read from the device once
    return [[(nats, not misses) for nats, misses in islice(found, len(one.answers))] for one in questions]


def of_each(
    model: Any, questions: Sequence[Question], batch: Batch, *, softmax_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Of each question, its answers' likelihoods, and how many of their tokens are not the likeliest: [2, answers].

    batch: of these questions. Gradients reach the likelihoods.
    """
    dtype, mask, is_packed = computes_in(model), batch.attention_mask, batch.kept.dim() == 1
    kept = batch.kept.to(model.device)
    if not is_packed:  # in numbers: some attention adds it as it is
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    with nullcontext() if is_packed else _head_reads(model, kept):
        logits: Tensor = model(
            input_ids=batch.input_ids.to(model.device),
            position_ids=batch.position_ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_to_keep=kept if is_packed else kept.shape[1],
            use_cache=False,
        ).logits
    logits = logits[0] if is_packed else logits
    each = torch.split(logits, [1 + question.branch_tokens for question in questions])
    return [_of_question(*pair, softmax_dtype) for pair in zip(questions, each, strict=True)]


def computes_in(model: Any) -> torch.dtype:
    """The type of its large operations: that of its weights, or, under autocast, of what they are cast to."""
    device = model.device.type
    found: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return found


@contextmanager
def _head_reads(model: Any, places: Tensor) -> Iterator[None]:
    """Inside, the output layer is given what stands at these places alone, in one row, and says as many logits."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0][places],))
    try:
        yield
    finally:
        hook.remove()


def _of_question(question: Question, logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Of each answer its likelihood, and how many of its tokens are not the likeliest: float32 [2, answers].

    logits: [1 + its branches' tokens, vocabulary], the first those after the prompt.
    """
    places, owners, branch = list[int](), list[int](), 1
    for number, answer in enumerate(question.answers):
        places += [0, *range(branch, branch + len(answer) - 1)]
        owners += [number] * len(answer)
        branch += len(answer) - 1
    labels = [token for answer in question.answers for token in answer]
    place, owner, label = torch.tensor([places, owners, labels]).to(logits.device)
    chances = F.log_softmax(logits, dim=-1, dtype=dtype)
    own = chances[place, label]
    misses = own != chances.amax(-1)[place]
    alike = (~misses).nonzero().flatten()  # few: argmax, which says who is first of equals, is slow
    misses[alike] = chances[place[alike]].argmax(-1) != label[alike]
    each = torch.stack([own.float(), misses.float()])
    found = each.new_zeros(2, len(question.answers)).index_add(1, owner, each)
    found[0] = found[0].to(chances.dtype)  # rounded as lm-eval has the sum
    return found


def probe(vocabulary: int) -> list[Question]:
    """Two questions at which a model shows whether it takes branches, of token ids from all over its vocabulary.

    One is padded, one has a prompt of one token, and each has two answers that must not read each other.
    """
    tokens = [(7919 * place + 17) % vocabulary for place in range(1, 18)]
    return [
        Question(tuple(tokens[:1]), [tokens[1:3], tokens[3:5]], [0, 1]),
        Question(tuple(tokens[5:12]), [tokens[12:14], tokens[14:17]], [2, 3]),
    ]
