"""Libraries that others import in passing: out of their sight, and in that of whoever asks for them."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from builders import ROOT
from stages.runtime import imports


def found_by(folder: Path, code: str) -> str:
    """What a fresh Python prints that knows the packages in a folder."""
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\nfrom stages.runtime import imports\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A PEFT that imports SciPy if it is there, as a library of another name does; and a SciPy."""
    (tmp_path / "scipy.py").write_text("")
    asks = """import importlib.util
try:
    import scipy
except ImportError:
    scipy = None
sees = scipy is not None, importlib.util.find_spec("scipy") is not None
"""
    for name in ("peft", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"from {name}.inner import sees\n")
        (tmp_path / name / "inner.py").write_text(asks)
    return tmp_path


def test_what_is_unused_is_out_of_the_sight_of_those_that_do_not_need_it_alone(packages: Path) -> None:
    code = "imports.spare(); imports.spare()\nimport peft, other\nprint(peft.sees, other.sees, len(sys.meta_path))"
    before = found_by(packages, "print(len(sys.meta_path))")
    assert found_by(packages, code).split(") ") == ["(False, False", "(True, True", f"{int(before) + 1}\n"]


def test_what_has_been_imported_already_is_in_sight(packages: Path) -> None:
    assert found_by(packages, "imports.spare()\nimport scipy, peft\nprint(peft.sees)") == "(True, True)\n"


def test_a_submodule_that_is_imported_later_does_not_see_it_either(packages: Path) -> None:
    (packages / "peft" / "__init__.py").write_text("")
    code = "imports.spare()\nimport peft\nfrom peft.inner import sees\nprint(sees)\nimport scipy\nprint(scipy.__file__)"
    assert found_by(packages, code).splitlines() == ["(False, False)", str(packages / "scipy.py")]


def test_a_source_is_shown_as_ever(packages: Path) -> None:
    code = "imports.spare()\nimport inspect, peft.inner\nprint(inspect.getsource(peft.inner).count('scipy'))"
    assert found_by(packages, code) == "4\n"


def test_garbage_is_collected_again_afterwards(packages: Path) -> None:
    (packages / "peft" / "__init__.py").write_text("import gc\nmeanwhile = gc.isenabled()\nimport peft.inner\n")
    code = "imports.spare()\nimport gc, peft\nprint(peft.meanwhile, gc.isenabled())"
    assert found_by(packages, code) == "False True\n"
    assert found_by(packages, f"import gc; gc.disable()\n{code}") == "False False\n"


def test_a_package_is_out_of_sight_only_meanwhile_whatever_happens(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packages / "fedcollm_unused.py").write_text("")
    monkeypatch.syspath_prepend(packages)
    with imports.out_of_sight("fedcollm_unused", "gc"):
        assert importlib.util.find_spec("fedcollm_unused") is None
        assert importlib.import_module("gc") is gc, "which has been imported already"
    with pytest.raises(ModuleNotFoundError), imports.out_of_sight("fedcollm_unused"):
        importlib.import_module("fedcollm_unused")
    assert importlib.util.find_spec("fedcollm_unused") is not None
    assert "fedcollm_unused" not in sys.modules


def test_transformers_reads_its_files_once_to_see_what_is_in_them() -> None:
    code = """import builtins, collections, json, sys
from stages.runtime import imports
imports.spare()
read, opened = collections.Counter(), open
def counted(file, *args, **settings):
    read[str(file)] += 1
    return opened(file, *args, **settings)
builtins.open = counted
import transformers.models.gpt2
print(len(read), sum(times > 1 for times in read.values()), transformers.GPT2Config.__name__)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    files, twice, config = done.stdout.split()
    assert int(files) > 1000
    assert int(twice) < 20, "those of gpt2, which looks at its own once more"
    assert config == "GPT2Config"
