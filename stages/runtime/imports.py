"""What transformers, PEFT and accelerate import for features that no stage uses, kept out of their sight.

PEFT imports bitsandbytes for any model, and with it torch's compiler; transformers SciPy for object detection,
scikit-learn for assisted generation, datasets and so pandas to ask whether rows are of their type. All are optional
there: out of sight they count as not installed. Whoever else imports them sees them, and so do those three what has
been imported already.

What is left is mostly torch's own: its first optimiser step imports its compiler, and as much again as torch itself.
A stand-in for the compiler does not help: accelerate asks Trainer's model whether it was compiled, and PEFT each layer
whether it is spread over processes, both by the true classes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

UNUSED = ("bitsandbytes", "datasets", "scipy", "sklearn")
WHERE = ("transformers", "peft", "accelerate")


def spare() -> None:
    """From now on in this process, load the modules of these libraries with what is unused there out of sight."""
    if not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


@contextlib.contextmanager
def out_of_sight(*names: str) -> Iterator[None]:
    """Have packages that have not been imported yet look as if they were not installed, meanwhile."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is how Python itself notes it
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, sys) is None:
                del sys.modules[name]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: what is imported stays, and looking it through again and again takes a tenth."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Finder(MetaPathFinder):
    """Finds what Python finds, and has it loaded so."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for a module of any other library, which is then found as ever."""
        if fullname.partition(".")[0] not in WHERE and fullname != "torch":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            loader = _Uncollected if fullname == "torch" else _Loader
            spec.loader = loader(spec.loader.name, spec.loader.path)
        return spec


class _Uncollected(SourceFileLoader):
    """Python's, which runs a module without garbage collection."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and all that it imports."""
        with _uncollected():
            super().exec_module(module)


class _Loader(SourceFileLoader):
    """Python's, which runs a module with what is unused out of sight."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and all that it imports."""
        with out_of_sight(*UNUSED), _uncollected():
            super().exec_module(module)
            if "." not in module.__name__:  # a whole library, before which there can be no model: none is frozen here
                gc.freeze()
            if module.__name__ == "transformers.utils.import_utils":
                _remember_folders(module)


def _remember_folders(module: ModuleType) -> None:
    """Have transformers read its thousands of files once, to see what is in them: it forgets all but 128 folders."""
    name = "create_import_structure_from_path"
    forgetful: Any = getattr(module, name, None)
    if hasattr(forgetful, "__wrapped__"):
        setattr(module, name, functools.cache(forgetful.__wrapped__))
