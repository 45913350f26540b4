"""torch's compiler, which no stage uses, left alone until somebody compiles: its import takes as long as torch's own.

transformers imports it while it is loaded, and torch's optimisers before their first step, for marks that tell it which
functions to leave as they are. Meanwhile something stands in its place that takes these marks and does nothing. When
anything else is asked of it, the compiler itself is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
PATCHES = f"{COMPILER}._trace_wrapped_higher_order_op"
MARKS = ("allow_in_graph", "assume_constant_result", "disable", "graph_break")


@contextlib.contextmanager
def unloaded() -> Iterator[None]:
    """Have the compiler look as if it had been imported, meanwhile; changes nothing if it has been."""
    if COMPILER in sys.modules:
        yield
        return
    patches = ModuleType(PATCHES)
    vars(patches)["TransformGetItemToIndex"] = _Patch
    sys.modules.update({COMPILER: _Compiler(COMPILER), PATCHES: patches})
    try:
        yield
    finally:
        _remove_stand_ins()


class _Compiler(ModuleType):
    """Stands for the compiler: its marks here, all else from itself."""

    def __getattr__(self, name: str) -> Any:
        if name in MARKS:
            return _unmarked
        if name.startswith("__") and name != "__path__":  # its path: somebody imports a module of it
            raise AttributeError(name)
        return getattr(_loaded(), name)


def _loaded() -> ModuleType:
    """The compiler itself."""
    _remove_stand_ins()
    return importlib.import_module(COMPILER)


def _remove_stand_ins() -> None:
    if isinstance(sys.modules.get(COMPILER), _Compiler):
        del sys.modules[COMPILER], sys.modules[PATCHES]


class _Patch:
    """Stands for torch's TransformGetItemToIndex, which is imported when a mask needs it."""

    def __enter__(self) -> None:
        self._exits = contextlib.ExitStack()
        _loaded()
        self._exits.enter_context(importlib.import_module(PATCHES).TransformGetItemToIndex())

    def __exit__(self, *raised: Any) -> None:
        self._exits.__exit__(*raised)


def _unmarked(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    """A mark, with settings or without, that leaves a function as it is."""
    return _unmarked if function is None else function
