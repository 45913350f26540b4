"""What is installed: the wheel has all that the program reads and no tests, and its bounds are those that are tried."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from builders import ROOT
from fedcollm_cli import __version__

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENT = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)")
UNTRIED = {"wandb", "mlflow"}
"""Trackers that no test starts."""


def bounds(requirements: list[str]) -> dict[str, str]:
    """The lowest release of each, by its name."""
    found = [REQUIREMENT.fullmatch(one) for one in requirements]
    assert all(found), requirements
    return {one[1]: one[2] for one in found if one}


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return {package.lower().replace("_", "-"): release for package, release in (line.split("==") for line in lines)}


def parts(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release))


REQUIRED = bounds(PROJECT["dependencies"])
OF_EXTRAS = bounds([one for extra in EXTRAS.values() for one in extra])
DEV = bounds(PYPROJECT["dependency-groups"]["dev"])


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    hatchling = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (made,) = hatchling.WheelBuilder(str(ROOT)).build(
        directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"]
    )
    return zipfile.ZipFile(made)


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    here = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert here >= {"stages/report/report.html.jinja", "workspace_template/fedcollm.toml"}
    about = f"fedcollm-{__version__}.dist-info"
    assert {name for name in wheel.namelist() if not name.startswith(f"{about}/")} == here
    assert f"{about}/licenses/LICENSE" in wheel.namelist()


def test_the_wheel_asks_for_no_tool_of_the_tests(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"fedcollm-{__version__}.dist-info/METADATA").decode()
    asked = re.findall(r"^Requires-Dist: ([\w-]+)", text, re.M)
    assert {*asked} == REQUIRED.keys() | OF_EXTRAS.keys()
    assert not {*asked} & (DEV.keys() - OF_EXTRAS.keys())


def test_what_is_in_the_wheel_works_by_itself(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    wheel.extractall(installed)
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}

    def fedcollm(*words: str) -> str:
        code = "import runpy, stages; print(stages.__file__); runpy.run_module('fedcollm_cli', run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        where, _, said = done.stdout.partition("\n")
        assert Path(where).is_relative_to(installed)
        return said

    fedcollm("init", "study", "--template", "demo")
    assert {*(path.name for path in (tmp_path / "study/tasks").iterdir())} >= {"creature.yaml", "_closed_world_yaml"}
    assert fedcollm("status", "--workspace", "study").startswith("rounds 1 to ")
    fedcollm("slurm", "--workspace", "study", "--partition", "gpu")
    assert os.access(tmp_path / "study/slurm/submit.sh", os.X_OK)


def test_there_is_one_version() -> None:
    assert PROJECT["version"] == __version__


# --- which releases


def test_the_oldest_releases_that_are_tried_are_the_oldest_that_are_allowed() -> None:
    """`make test-lowest` installs tests/lowest.txt."""
    assert pins("tests/lowest.txt") == {
        name: release for name, release in (REQUIRED | OF_EXTRAS).items() if name not in UNTRIED
    }


def test_extras_that_tests_need_have_the_bounds_that_users_get() -> None:
    assert {name: DEV[name] for name in DEV.keys() & OF_EXTRAS.keys()} == {
        name: OF_EXTRAS[name] for name in DEV.keys() & OF_EXTRAS.keys()
    }


def test_the_releases_of_the_tests_are_allowed() -> None:
    pinned = pins("constraints.txt")
    assert pinned.keys() >= REQUIRED.keys() | DEV.keys()
    asked = REQUIRED | OF_EXTRAS | DEV
    assert [name for name in asked.keys() & pinned.keys() if parts(pinned[name]) < parts(asked[name])] == []


def test_make_installs_the_tools_of_the_tests() -> None:
    text = (ROOT / "Makefile").read_text()
    rule = re.search(r"^\.venv/installed:.*?--editable \. \\\n(.*?)\n", text, re.M | re.S)
    assert rule
    assert {*rule[1].split()} == DEV.keys()


# --- containers


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile, with its words."""
    lines = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines.splitlines() if line)]


def sections(text: str) -> dict[str, str]:
    """Of an Apptainer definition: its head under "", and each section under its name."""
    found = re.split(r"^%(\w+)\n", re.sub(r"^#.*\n", "", text, flags=re.M), flags=re.M)
    return {"": found[0]} | dict(zip(found[1::2], found[2::2], strict=True))


DOCKERFILE = instructions((ROOT / "Dockerfile").read_text())
DEFINITION = sections((ROOT / "docs/how-to/fedcollm.def").read_text())
COPIED = {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", *PACKAGES}
"""What the wheel is built from, and the releases that are installed beside it."""


def arguments() -> dict[str, str]:
    return dict(rest.split("=", 1) for word, rest in DOCKERFILE if word == "ARG")


def test_the_image_is_built_from_what_the_wheel_is_made_of() -> None:
    copies = [rest.split()[:-1] for word, rest in DOCKERFILE if word == "COPY" and not rest.startswith("--from")]
    assert {name for names in copies for name in names} == COPIED
    assert all((ROOT / name).exists() for name in COPIED)
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == COPIED
    assert {line.split()[0] for line in DEFINITION["files"].strip().splitlines()} == COPIED


def test_the_image_runs_the_program_as_a_user_without_rights() -> None:
    last = dict(DOCKERFILE)
    assert last["ENTRYPOINT"] == '["fedcollm"]'
    assert "fedcollm" in PROJECT["scripts"]
    assert last["USER"] == "fedcollm"
    assert last["WORKDIR"] == "/workspace"
    assert last["VOLUME"] == "/cache"
    assert "HF_HOME=/cache/huggingface" in last["ENV"].split()
    assert DEFINITION["runscript"].strip() == 'exec fedcollm "$@"'


def test_both_containers_install_alike() -> None:
    docker, apptainer = arguments(), dict(line.strip().split("=", 1) for line in DEFINITION["arguments"].split())
    assert {name: docker[name] for name in apptainer} == apptainer
    assert re.search(r"^From: (.+)$", DEFINITION[""], re.M)[1] == docker["BASE"]  # type: ignore[index]
    of_docker = next(rest for word, rest in DOCKERFILE if word == "RUN" and "pip install" in rest)
    of_apptainer = re.sub(r"\\\n\s*", "", DEFINITION["post"])
    for name in ("TORCH_INDEX", "EXTRAS"):
        of_docker = of_docker.replace(name, name.removeprefix("TORCH_").lower())
    install = of_docker.split(" && ")[-1].strip()
    assert install.startswith("/opt/fedcollm/bin/pip install")
    assert install in [line.strip() for line in of_apptainer.splitlines()]


def test_the_images_python_is_one_that_the_project_allows() -> None:
    base = re.fullmatch(r"python:(3\.\d+)-slim", arguments()["BASE"])
    assert base
    assert parts(base[1]) >= parts(PROJECT["requires-python"])


# --- what the page on installing says

INSTALL = (ROOT / "docs/how-to/install.md").read_text()


def test_the_page_on_installing_tells_every_extra() -> None:
    assert re.findall(r"^\| `([a-z0-9]+)` \|", INSTALL, re.M) == list(EXTRAS)


def test_the_page_on_installing_tells_the_oldest_python() -> None:
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')}" in INSTALL


def test_windows_is_refused_in_words() -> None:
    code = "import sys; sys.platform = 'win32'; import fedcollm_cli"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: fedcollm does not run on Windows itself: it needs Linux or macOS",
        "  mend  install it in WSL 2, which is a Linux in Windows",
    ]
