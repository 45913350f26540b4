"""What a shell offers where a value is typed: quickly, and never an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builders import AGREEMENT, ROOT


def offered(line: str, folder: Path, code: str = "") -> list[str]:
    """What bash is told for the last word of a line, by a fresh Python in this folder."""
    words = line.split(" ")
    asked = {"_FEDCOLLM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    environment = os.environ | asked | {"PYTHONPATH": str(ROOT)}
    call = f"try:\n    app(prog_name='fedcollm')\nfinally:\n    {code or 'pass'}"
    program = f"import sys\nfrom fedcollm_cli.main import app\n{call}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fedcollm.toml").write_text(AGREEMENT)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("fedcollm init --template s", ["s1", "s2", "s3"]),
        ("fedcollm client-train --client ", ["1", "2", "3"]),
        ("fedcollm evaluate --round ", ["1", "2"]),
        ("fedcollm sweep --set distillation.lambda_", ["distillation.lambda_slm=", "distillation.lambda_llm="]),
        ("fedcollm init study --set federation.se", ["federation.seed="]),
        ("fedcollm run --method fedavg-", ["fedavg-aux"]),
    ],
)
def test_values_that_there_are_are_offered(line: str, values: list[str], folder: Path) -> None:
    assert offered(line, folder / "elsewhere") == values


def test_without_a_workspace_or_with_a_broken_one_nothing_is_offered(tmp_path: Path) -> None:
    assert offered("fedcollm client-train --client ", tmp_path) == []
    (tmp_path / "fedcollm.toml").write_text("[")
    assert offered("fedcollm client-train --round ", tmp_path) == []


def test_completing_imports_nothing_heavy(folder: Path) -> None:
    heavy = "print(*({'torch', 'transformers', 'numpy', 'peft'} & sys.modules.keys()))"
    assert offered("fedcollm sweep --set federation.see", folder, heavy) == ["federation.seed="]
