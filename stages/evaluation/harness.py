"""lm-eval's Hugging Face model, sharing its work among processes and its prompts among their answers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from stages.data.examples import encode_row
from stages.data.rows import Row
from stages.evaluation import branches
from stages.evaluation.branches import Likelihood, Question
from stages.models import adapters
from stages.runtime.errors import BadNumbers, UsageProblem
from stages.runtime.events import Event, Report
from stages.runtime.processes import ALONE, Processes

MOST_TEXTS = 1 << 14
"""Whose tokens are kept: the prompts and answers of three thousand questions."""


class Tokens(Protocol):
    """A prompt and its answer as tokens. doc_id: of which question, from 0; task_name: of which task or file."""

    @property
    def doc_id(self) -> int:
        """The question, from 0."""

    @property
    def task_name(self) -> str:
        """The task, or the file of rows."""

    @property
    def prompt(self) -> list[int]:
        """Of one token at least."""

    @property
    def answer(self) -> list[int]:
        """Of one token at least."""


class Harness(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model, which also says how far it is, and reads a prompt once for all of its answers.

    Of several processes each scores its share of the questions; lm-eval sees all answers in all of them. shares: False
    where the model is spread over the processes, so that each must take part in every forward pass. Prompts
    are read once if a probe of the model has the likelihoods then that lm-eval gives it.
    """

    report: Report
    processes: Processes = ALONE
    shares = True
    _done = 0
    _total = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        """As lm-eval's, of this process's share; all answers in all processes."""
        return self._shared(partial(super().loglikelihood, disable_tqdm=True), requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's, of this process's share; all answers in all processes."""
        return self._shared(partial(super().generate_until, disable_tqdm=True), requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's, of this process's share; all answers in all processes."""
        return self._shared(partial(super().loglikelihood_rolling, disable_tqdm=True), requests)

    def of_tokens(self, asked: Sequence[Tokens]) -> list[Likelihood]:
        """The likelihood of each answer, as loglikelihood gives it, of prompts and answers that are tokens already."""
        return self._shared(
            lambda own: self._loglikelihood_tokens([(("", ""), one.prompt, one.answer) for one in own]), asked
        )

    def generated(self, asked: Sequence[Tokens], most: int, ends: list[int]) -> list[list[int]]:
        """What is written after each prompt: the likeliest token each time, up to so many, or to one of the ends."""
        return self._shared(lambda own: self._written(own, most, ends), asked)

    def _written(self, asked: Sequence[Tokens], most: int, ends: list[int]) -> list[list[int]]:
        room = [min(most, int(self.max_length) - len(one.prompt)) for one in asked]
        order = sorted(range(len(asked)), key=lambda place: (room[place], -len(asked[place].prompt)))
        found: dict[int, list[int]] = {}
        for tokens, alike in itertools.groupby(order, key=lambda place: room[place]):
            places = list(alike)
            for start in range(0, len(places), int(self.batch_size)):
                some = places[start : start + int(self.batch_size)]
                found |= zip(some, self._continued([asked[place].prompt for place in some], tokens, ends), strict=True)
        return [found[place] for place in range(len(asked))]

    def _continued(self, prompts: Sequence[Sequence[int]], most: int, ends: list[int]) -> list[list[int]]:
        self._tell(len(prompts))
        longest, pad = max(map(len, prompts)), ends[0] if ends else 0
        ids = torch.tensor([[pad] * (longest - len(one)) + list(one) for one in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=self.device)
        how: Any = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=most, do_sample=False, use_cache=True, eos_token_id=ends or None, pad_token_id=pad
        )
        made = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=how)
        found: list[list[int]] = made[:, longest:].tolist()
        return [list(itertools.takewhile(lambda token: token not in ends, one)) for one in found]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As a row is split for training: what is trained is what is scored."""
        example = encode_row(Row(context, continuation), _encoder_of(self.tokenizer))
        return example.input_ids[: example.prompt_tokens], example.input_ids[example.prompt_tokens :]

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Likelihood]:
        """As lm-eval's, with each prompt read once, where that fits and the model takes it."""
        room = self.room
        whole = [place for place, request in enumerate(requests) if _is_whole(*request, room=room)]
        asked = [requests[place][1:] for place in whole]
        found: dict[int, Likelihood] = {}
        for batch in branches.batches(branches.questions_of(asked, rows=self.batch_size, most=room), self.batch_size):
            self._tell(sum(len(question.answers) for question in batch))
            for question, answers in zip(batch, self._branched(batch), strict=True):
                found |= zip((whole[place] for place in question.places), answers, strict=True)
        apart = [place for place in range(len(requests)) if place not in found]
        if apart:
            answered = super()._loglikelihood_tokens([requests[place] for place in apart], disable_tqdm=True)
            found |= zip(apart, answered, strict=True)
        return [found[place] for place in range(len(requests))]

    @property
    def room(self) -> int:
        """The longest row in which a prompt can stand with all its answers; 0 where the model takes no branches."""
        return min(self._longest_row, int(self.max_length))

    def encoded(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and of an answer, as both are scored; of no prompt, the token that begins a text."""
        if context:
            return self._encode_pair(context, answer)
        return [self.prefix_token_id], list(self.tok_encode(answer, add_special_tokens=False))

    @functools.cached_property
    def _longest_row(self) -> int:
        """The longest row that has the likelihoods which lm-eval finds: 0 where the model does not take branches."""
        return branches.longest_row(self.model.config) if self.packs or self._has_likelihoods(packs=False) else 0

    @functools.cached_property
    def packs(self) -> bool:
        """Whether rows of branches may stand one after the other in one, without padding."""
        return self._has_likelihoods(packs=True)

    def _has_likelihoods(self, *, packs: bool) -> bool:
        """Found out by two short questions, whose answers are also scored one by one as lm-eval does."""
        room, questions = branches.longest_row(self.model.config), branches.probe(self.vocab_size)
        if min(room, self.max_length) < max(question.tokens for question in questions):
            return False
        total, self._total = self._total, 0  # nothing to tell of
        try:
            found = branches.likelihoods(self.model, questions, packs=packs, softmax_dtype=self.softmax_dtype)
            apart = self._apart
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):  # no such masks, positions or head
            return False
        finally:
            self._total = total
        tolerance = 1e-4 if branches.computes_in(self.model) == torch.float32 else 2e-2
        return all(
            math.isfinite(one) and abs(one - other) <= tolerance * max(1.0, abs(other))
            for one, other in zip((one for answers in found for one, _ in answers), apart, strict=True)
        )

    @functools.cached_property
    def _apart(self) -> list[float]:
        """The likelihoods of the probe's answers, one by one, as lm-eval finds them."""
        questions = branches.probe(self.vocab_size)
        requests = [(("", ""), list(one.prompt), answer) for one in questions for answer in one.answers]
        return [one for one, _ in super()._loglikelihood_tokens(requests, disable_tqdm=True)]

    def _branched(self, questions: Sequence[Question]) -> list[list[Likelihood]]:
        return branches.likelihoods(self.model, questions, packs=self.packs, softmax_dtype=self.softmax_dtype)

    def cut(self, requests: Iterable[Any]) -> set[Any]:
        """The questions of these requests that do not fit into the context: lm-eval drops their beginning.

        Raises UsageProblem for an answer that does not fit by itself.
        """
        found, most = set(), self.max_length
        for request in requests:
            if request.request_type == "loglikelihood":
                context, answer = request.args[:2]
                before, after = self._encode_pair(context, answer) if context else ([self.prefix_token_id], [])
                if not before:
                    message = f"the text of question {request.doc_id + 1} of task {request.task_name} has no token"
                    raise UsageProblem(f"{message}: it is {context!r}", mend="correct doc_to_text, or its data")
                wanted = len(after if context else self.tok_encode(answer, add_special_tokens=False))
                longest, room = len(before) + wanted - 1, most
            elif request.request_type == "generate_until":
                wanted = int(request.args[1].get("max_gen_toks", self.max_gen_toks))
                longest, room = len(self.tok_encode(request.args[0])), most - wanted
            else:
                continue  # scored window by window: nothing is dropped
            if wanted >= most:
                message = f"an answer to question {request.doc_id + 1} of task {request.task_name} has {wanted} tokens"
                mend = "shorten it or max_gen_toks, or take a model of a longer context"
                raise UsageProblem(f"{message}; the model's context is {most}", mend=mend)
            if longest > room:
                found.add(request.doc_id)
        return found

    def _shared(self, answer: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        count, rank = (self.processes.count, self.processes.rank) if self.shares else (1, 0)
        shares = _shares(requests, count)
        own = [requests[place] for place in shares[rank]]
        self._done, self._total = 0, len(own)
        answers = answer(own) if own else []
        for request, one in zip(own, answers, strict=True):
            likelihood = one[0] if isinstance(one, tuple) else one
            if isinstance(likelihood, float) and math.isnan(likelihood):
                message = f"question {request.doc_id + 1} of task {request.task_name}: an answer's likelihood is NaN"
                raise BadNumbers(message, mend=adapters.NO_SETTING_OF_TRAINING)
        if count == 1:
            return answers
        found: dict[int, Any] = {}
        for share, those in zip(shares, self.processes.gather(answers), strict=True):
            found |= zip(share, those, strict=True)
        return [found[place] for place in range(len(requests))]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._tell(len(inps))
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._tell(len(context))
        tokens: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        return tokens

    def _tell(self, rows: int) -> None:
        if not self._total:
            return
        self._done = min(self._done + rows, self._total)
        self.report(Event("step", "scoring", step=self._done, total=self._total))


class _Encoder:
    """A tokenizer that encodes a text once: a question's answers share their prompt, and what is checked is scored."""

    def __init__(self, tokenizer: Any) -> None:
        self.bos_token, self.eos_token = tokenizer.bos_token, tokenizer.eos_token
        self.encode = functools.lru_cache(maxsize=MOST_TEXTS)(tokenizer.encode)


@functools.lru_cache(maxsize=2)
def _encoder_of(tokenizer: Any) -> _Encoder:
    """Kept for the next model with this tokenizer: round after round the same questions are asked."""
    return _Encoder(tokenizer)


def _is_whole(texts: Any, before: list[int], after: list[int], *, room: int) -> bool:
    """Whether an answer fits behind its prompt in a row of this length. texts: None for a window of a long text."""
    return texts is not None and bool(before and after) and len(before) + len(after) - 1 <= room


def _shares(requests: Sequence[Any], count: int) -> list[list[int]]:
    """Which requests each of so many processes answers: those of one question together."""
    questions = [list(group) for _, group in itertools.groupby(range(len(requests)), lambda i: requests[i].doc_id)]
    return [[place for question in questions[rank::count] for place in question] for rank in range(count)]
