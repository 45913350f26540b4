"""The documentation is true: generated pages are current, and what a page lists is what the program has."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import ROOT, Outcome
from generate_docs import pages

DOCS = ROOT / "docs"


def headings(path: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", path.read_text(), re.M)


@pytest.mark.parametrize("name", ["commands.md", "settings.md"])
@pytest.mark.parametrize("columns", ["40", "200"])
def test_a_generated_page_is_current_whatever_the_terminal(
    name: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    [made] = [text for path, text in pages().items() if path.name == name]
    assert (DOCS / "reference" / name).read_text() == made, "run `python tests/generate_docs.py`"


def test_every_exit_code_has_a_heading() -> None:
    from stages.parts import checks, errors

    known = {0, 1, errors.NOTHING_LEFT_EXIT_CODE, errors.INTERRUPTED_EXIT_CODE, checks.WARNED}
    known |= {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    said = [int(heading.split(":")[0]) for heading in headings(DOCS / "reference/exit-codes.md")[1:]]
    assert said == sorted(known)


def test_every_check_of_the_audit_has_a_heading() -> None:
    from stages.audit import CHECKS
    from stages.parts.checks import Check

    modules = [module for name, module in sys.modules.items() if name.startswith("stages.")]
    names = {one.id: one.name for module in modules for one in vars(module).values() if isinstance(one, Check)}
    assert headings(DOCS / "reference/audit-checks.md")[1:] == [f"{id}: {names[id]}" for id in CHECKS]


# --- snippets

FENCE = re.compile(r"(?:<!-- not run: (?P<why>[^>\n]+) -->\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@pytest.mark.slow
def test_the_tutorial_goes_from_nothing_to_a_report(
    fedcollm: Callable[..., Outcome], base_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line by line as it stands there, but that the base models are tiny ones in local folders."""
    monkeypatch.chdir(tmp_path)
    given = []
    for fence in FENCE.finditer((DOCS / "tutorial.md").read_text()):
        name = re.match(r"# (\S+\.(?:py|yaml))\n", fence["text"])
        if name:
            Path(name[1]).write_text(fence["text"])
        for line in fence["text"].splitlines() if fence["kind"] == "sh" and not fence["why"] else ():
            words = shlex.split(line, comments=True)
            given.append(words[1:2])
            if words[0] == "fedcollm":
                outcome = fedcollm(*words[1:])
                assert outcome.code == 0, (line, outcome.err)
            elif words[0] == "cd":
                monkeypatch.chdir(words[1])
                machine = Path("machine.toml").read_text()
                for role in ("slm", "llm"):
                    machine = re.sub(rf"# {role} = .*", f'{role} = "{base_models / role}"', machine)
                Path("machine.toml").write_text(machine)
            else:
                python = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
                subprocess.run(["bash", "-ec", python + line], check=True, capture_output=True)
    assert ["compare"] in given
    assert Path("results/report/index.html").exists()
    assert Path("exports/slm-round-0002/adapter_model.safetensors").exists()
