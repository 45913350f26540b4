"""A CUDA device that is not there: tensors that say they are on it, keep their values on the CPU, and do not mix.

With `cuda()` around it, code runs as on a GPU as far as devices, dtypes and autocast go, and finds right values. A
tensor of the CPU beside one of the device is an error as on a GPU; so is an index on the CPU, which a GPU would copy in
silence. Whatever makes the CPU wait for the device is counted. FakeTensorMode finds the same mistakes, but has no
values, and so cannot follow a mask, a loss that is logged, or a file. The backward pass has an engine of its own here:
autograd's needs a torch with CUDA for tensors of such a device. It knows no hooks, so that DP-SGD cannot be tried.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate.utils.imports
import peft  # noqa: F401  # with all that looks for CUDA only once: when it is imported
import pytest
import torch
import transformers.utils.import_utils
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.__version__.startswith("2.13."):  # a table inside torch is written to: see _guard
    pytest.skip("the pretended device is made for torch 2.13", allow_module_level=True)

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
"""Operations that may have tensors of both."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}


class Pretended(Tensor):
    """A tensor that says it is on the device. held: its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=CUDA,
        )
        made.held = held
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of its values: who writes a file tells tensors apart by it."""
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In a file it is a tensor of the CPU."""
        return self.held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Pretended:
        return Pretended(self.held.clone())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class Cuda(TorchDispatchMode):
    """Where it is entered, "cuda" is a device. waits: what made the CPU wait for it, and how often."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits := _waits(func, args, kwargs):
            self.waits[waits] += 1
        return _computed(func, args, kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those among the arguments of an operation: one by one, or in lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(change, one) for one in value) if isinstance(value, list | tuple) else value


def _waits(func: Any, args: Any, kwargs: Any) -> str:
    """Why the CPU waits for the device here; empty if it does not."""
    if not any(isinstance(one, Pretended) for one in _tensors(args)):
        return ""
    if func is aten._to_copy.default:
        return "copied to the CPU" if torch.device(kwargs.get("device") or CUDA).type == "cpu" else ""
    if func is aten.copy_.default:
        return "" if isinstance(args[0], Pretended) else "copied to the CPU"
    if func in INDEXED:
        masks = [one for one in args[1] if one is not None and one.dtype == torch.bool]
        return "indexed by a mask" if masks else ""
    return func.name() if func in WAITS else ""


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the values of what is on the device; its result is there too, or where it is asked for."""
    found = [*_tensors(args), *_tensors(list(kwargs.values()))]
    there = {id(one.held): one for one in found if isinstance(one, Pretended)}
    if there and func not in COPIES:
        here = [tuple(one.shape) for one in found if not isinstance(one, Pretended) and one.dim()]
        if here:
            raise RuntimeError(f"{func.name()}: tensors of shapes {here} are on the CPU, others on the device")
    wanted = kwargs.get("device")
    is_there = bool(there) if wanted is None else torch.device(wanted).type == "cuda"
    if func is aten.copy_.default:
        is_there = isinstance(args[0], Pretended)
    if not (there or is_there):
        return func(*args, **kwargs)
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if is_there else wanted}

    def bare(one: Tensor) -> Tensor:
        return one.held if isinstance(one, Pretended) else one

    def clothed(one: Tensor) -> Tensor:
        return there[id(one)] if id(one) in there else Pretended(one)

    done = func(*_mapped(bare, args), **{name: _mapped(bare, value) for name, value in kwargs.items()})
    return _mapped(clothed, done) if is_there else done


def moved(module: Any) -> Any:
    """A module with its parameters and buffers on the device, tied ones still tied. Called inside `cuda()`."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(Pretended(parameter.data), requires_grad=parameter.requires_grad)
            if parameter is not None:
                part._parameters[name] = memo[id(parameter)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else Pretended(buffer)
    return module


@contextlib.contextmanager
def cuda() -> Iterator[Cuda]:
    """A CUDA device, until the end of the block."""
    never: Any = lambda *_, **__: None  # noqa: E731
    answers = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda **_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "a pretended device",
        "max_memory_allocated": lambda *_: 1 << 30,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        **dict.fromkeys(
            (
                "_lazy_init",
                "synchronize",
                "empty_cache",
                "reset_peak_memory_stats",
                "set_device",
                "manual_seed_all",
                "set_rng_state",
            ),
            never,
        ),
    }
    only_lifts = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:
        _forget()
        stack.callback(_forget)
        stack.enter_context(_guard())
        for name, answer in answers.items():
            for module in (torch.cuda, torch.cuda.random):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, answer))
        stack.enter_context(mock.patch.object(torch.autograd, "backward", backward))
        stack.enter_context(mock.patch.object(Tensor, "backward", lambda self, *args, **_: backward(self, *args[:1])))
        # Module.to is to make new parameters, not to change those of the CPU in place.
        alike = lambda one, other: isinstance(one, Pretended) == isinstance(other, Pretended)  # noqa: E731
        stack.enter_context(mock.patch.object(torch, "_has_compatible_shallow_copy_type", alike))
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]  # as FakeTensorMode does
        stack.callback(torch._C._set_only_lift_cpu_tensors, only_lifts)  # type: ignore[attr-defined]
        yield stack.enter_context(Cuda())


def _forget() -> None:
    """Have libraries look again whether there is CUDA."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for module in (transformers.utils.import_utils, accelerate.utils.imports):
        for found in vars(module).values():
            if hasattr(found, "cache_clear"):
                found.cache_clear()


class _Guard(torch._C._acc.DeviceGuard):  # type: ignore[misc]
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.CUDA  # type: ignore[attr-defined]


@contextlib.contextmanager
def _guard() -> Iterator[None]:
    """What autograd asks of devices of a kind, where torch is built without CUDA: an entry of its table for it.

    Python can only make one for a kind that torch leaves to others; it is put into CUDA's place meanwhile.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    kinds = torch._C._autograd.DeviceType  # type: ignore[attr-defined]
    cuda, others = int(kinds.CUDA), int(kinds.PrivateUse1)
    before = guards[cuda], guards[others]
    if before[0] is None:
        torch._C._acc.register_python_privateuseone_device_guard(_GUARD)  # type: ignore[attr-defined]
        guards[cuda], guards[others] = guards[others], None
    try:
        yield
    finally:
        guards[cuda], guards[others] = before


_GUARD = _Guard()
"""Never freed: the table holds its address."""


@torch.no_grad()
def backward(tensors: Tensor | Sequence[Tensor], grad_tensors: Any = None, **_: Any) -> None:
    """torch.autograd.backward in Python: each node of the graph, once all that follows it has been."""
    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    starts = [grad_tensors] if isinstance(grad_tensors, Tensor) or grad_tensors is None else list(grad_tensors)
    starts += [None] * (len(roots) - len(starts))
    waiting: collections.Counter[Any] = collections.Counter()
    seen, stack = set(), [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _number in node.next_functions:
            if following is not None:
                waiting[following] += 1
                stack.append(following)
    gradients: dict[Any, dict[int, Tensor]] = collections.defaultdict(dict)
    for root, start in zip(roots, starts, strict=True):
        gradients[root.grad_fn][root.output_nr] = torch.ones_like(root) if start is None else start
    ready = [root.grad_fn for root in roots if not waiting[root.grad_fn]]
    # By its number checkpoints know that they have computed a block again already.
    with mock.patch.object(torch._C, "_current_graph_task_id", return_value=id(gradients)):
        _pass_on(ready, gradients, waiting)


def _pass_on(ready: list[Any], gradients: Any, waiting: collections.Counter[Any]) -> None:
    """Gradients from these nodes to all before them. waiting: how many that follow each have not been passed yet."""
    while ready:
        node = ready.pop()
        found = _passed(node, gradients.pop(node, {}))
        for (following, number), gradient in zip(node.next_functions, found, strict=True):
            if following is None:
                continue
            if gradient is not None:
                before = gradients[following].get(number)
                gradients[following][number] = gradient if before is None else before + gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)


def _passed(node: Any, gradients: dict[int, Tensor]) -> Sequence[Any]:
    """What a node hands to those that it was made from."""
    if hasattr(node, "variable"):
        for gradient in gradients.values():
            own = node.variable.grad
            node.variable.grad = gradient.detach() if own is None else own + gradient
        return ()
    if not gradients:
        return [None] * len(node.next_functions)
    arguments = [
        gradients[number].sum_to_size(form.shape).to(form.dtype) if number in gradients else None
        for number, form in enumerate(node._input_metadata)
    ]
    found = node(*arguments) if callable(node) else node.apply(*arguments)
    passed = list(found) if isinstance(found, tuple) else [found]
    for _ in range(len(passed) - len(node.next_functions)):
        passed.remove(None)  # of what is no tensor
    return passed
