"""The memory of one training or scoring step, found without weights or work.

The step runs on fake tensors: every operation of the models and of the losses takes place in form only, so that what
autograd keeps for the backward pass, and the most that lives at once, can be added up for any architecture, precision
and batch, with no formula of our own. The bfloat16 copies of the frozen weights that a CPU holds count as weights
(`shapes.held_bytes`). Backward kernels differ a little in what they need in passing: `transient` is on the high side.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.models.held import cast
from stages.models.perturbing import Ascent, Perturbation
from stages.models.shapes import FLOAT32_BYTES, Shape
from stages.training.objective import Losses, Tokens


@dataclass(frozen=True)
class Step:
    """The memory of one step beside weights and adapters, in bytes.

    activations: what autograd keeps of the models. logits: those of the answers, and what the losses keep of them.
    transient: what the step's peak has beyond that: results in passing, forward and backward.
    """

    activations: int
    logits: int
    transient: int


def training_step(
    models: Mapping[str, Shape],
    losses: Losses,
    *,
    rows: int,
    length: int,
    answers: int,
    device: torch.device,
    autocast: Mapping[str, bool],
    turn: str | None = None,
    is_attacked: bool = False,
) -> Step:
    """The memory of one forward and backward pass over rows of this length, each with so many answer tokens.

    turn: as in Objective.parts, gradients reach that model alone. is_attacked: they reach a change of the embeddings.
    """

    def forward() -> tuple[int, int, Tensor]:
        labels = torch.ones(rows * answers, dtype=torch.long, device=device)
        with _kept(own) as kept:
            logits = {}
            for role, shape in models.items():
                with torch.set_grad_enabled(turn in (None, role)), _attacked(shape, rows, length, device, is_attacked):
                    logits[role] = _answer_logits(
                        shape.model.train(),
                        rows=rows,
                        length=length,
                        answers=answers,
                        device=device,
                        autocast=autocast[role],
                    )
            activations = kept({})
            of_answers = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in logits.values()}
            parts = losses(logits, labels, Tokens(labels.numel(), labels.numel()))
            learnt = [loss for name, loss in parts.items() if name[:3] == (turn or name[:3])]
            return activations, kept(of_answers) - activations, torch.stack(learnt).sum()

    with ExitStack() as held:
        for role, shape in models.items():
            if autocast[role]:
                held.enter_context(cast(shape.model))
        held.enter_context(FakeTensorMode())
        states = {role: _state(shape.model, device) for role, shape in models.items()}
        own = _storages(states.values())
        with ExitStack() as stack:
            for role, shape in models.items():
                # For the backward pass too: gradient checkpointing calls the model in it.
                stack.enter_context(_reparametrize_module(shape.model, states[role], tie_weights=True))
            peak = stack.enter_context(_Peak(own))
            activations, logits, loss = forward()
            torch.autograd.backward(loss)
    gradients = sum(FLOAT32_BYTES * shape.adapter_parameters for role, shape in models.items() if turn in (None, role))
    return Step(activations, logits, max(0, peak.bytes - activations - logits - gradients))


def scoring_step(shape: Shape, *, rows: int, length: int, device: torch.device) -> Step:
    """The memory of one of lm-eval's forward passes: logits of every position, and their log-softmax."""
    with FakeTensorMode(), torch.no_grad():
        state = _state(shape.model, device)
        with _reparametrize_module(shape.model, state, tie_weights=True), _Peak(_storages([state])) as peak:
            ids = torch.ones(rows, length, dtype=torch.long, device=device)
            logits = shape.model.eval()(input_ids=ids, use_cache=False).logits
            scores = torch.log_softmax(logits, -1)
        both = logits.nbytes + scores.nbytes
        return Step(0, both, max(0, peak.bytes - both))


def capture_step(
    shape: Shape,
    keep: Callable[[Tensor], object],
    *,
    rows: int,
    length: int,
    answers: int,
    device: torch.device,
    autocast: bool,
) -> Step:
    """The memory of one forward pass without gradient over answers alone. keep: what is made of their logits."""
    with cast(shape.model) if autocast else nullcontext(), FakeTensorMode(), torch.no_grad():
        state = _state(shape.model, device)
        with _reparametrize_module(shape.model, state, tie_weights=True), _Peak(_storages([state])) as peak:
            logits = _answer_logits(
                shape.model.eval(), rows=rows, length=length, answers=answers, device=device, autocast=autocast
            )
            keep(logits)
        return Step(0, logits.nbytes, max(0, peak.bytes - logits.nbytes))


def _attacked(
    shape: Shape, rows: int, length: int, device: torch.device, is_attacked: bool
) -> AbstractContextManager[None]:
    where = torch.ones(rows, length, dtype=torch.bool, device=device)
    return Perturbation(shape.model, Ascent(1.0), where).applied() if is_attacked else nullcontext()


State = dict[str, Tensor]


def _state(model: PeftModel, device: torch.device) -> State:
    """Fake tensors in the form of the model's parameters and buffers, to run it with."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device).requires_grad_(tensor.requires_grad)
        for name, tensor in named
    }


def _storages(states: Iterable[State]) -> set[int]:
    return {tensor.untyped_storage()._cdata for state in states for tensor in state.values()}


def _answer_logits(
    model: PeftModel, *, rows: int, length: int, answers: int, device: torch.device, autocast: bool
) -> Tensor:
    """As batches.answer_logits of a padded batch. Its mask of answers has no form: here their places are indices."""
    ones = torch.ones(rows, length, dtype=torch.long, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits: Tensor = model(
            input_ids=ones,
            position_ids=ones.clone(),
            attention_mask=torch.ones(rows, 1, length, length, dtype=torch.bool, device=device),
            logits_to_keep=answers + 1,
            use_cache=False,
        ).logits
    row, place = torch.ones(2, rows * answers, dtype=torch.long, device=device)
    return logits[row, place]


@contextmanager
def _kept(own: set[int]) -> Iterator[Callable[[Mapping[int, int]], int]]:
    """Count what autograd saves for the backward pass: bytes of distinct storages that are not the models' own.

    The function given tells them so far, together with these others (bytes by storage).
    """
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    def count(others: Mapping[int, int]) -> int:
        return sum(({key: storage.nbytes() for key, storage in saved.items()} | dict(others)).values())

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that results of operations took at any moment, the models' own storages not counted."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self._now = 0
        self._own = own
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False  # a number is asked for, and there is none: whether OPT leaves out a layer; it does not
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or key in self._own:
            return
        self._live.add(key)
        self._now += size
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._now -= size
