"""Fixtures: tiny real models and workspaces, no network, no mocks."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from builders import (
    Outcome,
    make_base_models,
    make_equal_workspace,
    make_study,
    make_unlike_models,
    make_unlike_study,
    make_unlike_workspace,
    make_workspace,
)
from command_line import give

Once = Callable[[str, Callable[[Path], object]], Path]

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


frozen = {"modules": 0}


@pytest.fixture(autouse=True)
def frozen_garbage() -> None:
    """Trainer collects garbage whenever it begins: a third of a second, unless what is imported is kept out of it."""
    if len(sys.modules) > frozen["modules"]:
        frozen["modules"] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while all is imported: there is none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(autouse=True)
def own_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for keys of each test's own, and never the user's."""
    place = tmp_path / "secrets"
    monkeypatch.setenv("XDG_DATA_HOME", str(place))
    return place


def pytest_configure(config: pytest.Config) -> None:
    """Keep what `datasets` remembers of the tests' files out of the user's cache."""
    folder = tempfile.mkdtemp(prefix="fedcollm-tests-")
    os.environ["HF_DATASETS_CACHE"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


# --- in several processes


LONGEST = (
    *("slurm/test_on_slurm.py", "test_arc_easy.py", "cli/test_write_failures.py", "cli/test_snakemake.py"),
    *("cli/test_together.py", "cli/test_killed.py", "steps/test_evaluate.py", "cli/test_planning.py"),
    *("files/test_fuzzing.py", "planning/test_plan.py", "test_secure_protocol.py", "secagg/test_secure_run.py"),
    *("test_one_reader.py", "artefacts/test_checkpoints.py", "federation/test_compare_refuses.py"),
    *("accounting/test_budget.py", "accounting/test_accountant.py", "secagg/test_unmasking.py", "cli/test_attempts.py"),
    *("cli/test_commands.py", "cli/test_two_writers.py", "cli/test_faults.py", "cli/test_by_cron.py", "test_docs.py"),
)
"""Files whose tests are begun first, in this order: the first waits for Slurm, while other processes do the rest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"tests/{file}": place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A folder that is filled once for all of xdist's processes: once("finished", fill) -> what fill(folder) filled."""
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent

    def filled(name: str, fill: Callable[[Path], object]) -> Path:
        folder, is_whole = top / f"once-{name}", top / f"once-{name}.whole"
        with (top / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                is_whole.touch()
        return folder

    return filled


# --- made once, to be read only or copied


@pytest.fixture(scope="session")
def base_models(once: Once) -> Path:
    """A folder with slm/ and llm/: GPT-2-shaped models of two sizes with one word-level tokenizer, random weights."""
    return once("models", make_base_models)


@pytest.fixture(scope="session")
def unlike_models(once: Once) -> Path:
    """A folder with slm-1/, slm-2/, slm-3/ and llm/: random weights, a tokenizer of its own each."""
    return once("unlike-models", make_unlike_models)


@pytest.fixture
def workspace_folder(tmp_path: Path, base_models: Path) -> Path:
    """A workspace of three clients and two rounds with models, data and a task; no stage has run."""
    return make_workspace(tmp_path / "study", base_models)


def run_both_rounds(folder: Path) -> None:
    """What `run` does in a new workspace, without scores."""
    from stages.federation.run import run
    from stages.workspace.paths import Workspace

    run(Workspace(folder), scores=False)


@pytest.fixture(scope="session")
def finished_once(once: Once, base_models: Path) -> Path:
    """A workspace in which `run` has done both rounds, without scores; made once."""

    return once("finished", lambda top: run_both_rounds(make_workspace(top / "study", base_models))) / "study"


@pytest.fixture(scope="session")
def studied_once(once: Once, base_models: Path) -> Path:
    """A workspace with every method from the seeds 7 and 8, scored; made once, by what `compare --seeds 7,8` runs."""

    def fill(top: Path) -> None:
        import stages.evaluation.scoring  # noqa: F401
        import stages.training.training  # noqa: F401
        from stages.federation.compare import run_all
        from stages.study.table_rows import FEDCOLLM
        from stages.workspace.paths import Workspace

        gc.freeze()
        run_all(Workspace(make_study(top / "study", base_models)), seeds=[7, 8], methods=FEDCOLLM)

    return once("studied", fill) / "study"


@pytest.fixture
def studied(studied_once: Path, tmp_path: Path) -> Path:
    """Such a study of one's own."""
    return shutil.copytree(studied_once, tmp_path / "study", symlinks=True)


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    """A finished workspace of one's own, to read, damage and repair."""
    return shutil.copytree(finished_once, tmp_path / "study", symlinks=True)


@pytest.fixture(scope="session")
def unlike_once(once: Once, unlike_models: Path) -> Path:
    """A workspace of FedMKT in which `run` has done both rounds, without scores; made once."""

    return once("unlike", lambda top: run_both_rounds(make_unlike_workspace(top / "study", unlike_models))) / "study"


@pytest.fixture
def unlike(unlike_once: Path, tmp_path: Path) -> Path:
    """A finished workspace of FedMKT of one's own."""
    return shutil.copytree(unlike_once, tmp_path / "study", symlinks=True)


@pytest.fixture(scope="session")
def equal_once(once: Once, unlike_models: Path) -> Path:
    """A workspace of FedMKT whose clients' adapters are averaged, in which `run` has done both rounds; made once."""

    return once("equal", lambda top: run_both_rounds(make_equal_workspace(top / "study", unlike_models))) / "study"


@pytest.fixture
def equal(equal_once: Path, tmp_path: Path) -> Path:
    """Such a finished workspace of one's own."""
    return shutil.copytree(equal_once, tmp_path / "study", symlinks=True)


@pytest.fixture
def equal_folder(unlike_models: Path, tmp_path: Path) -> Path:
    """The same in which no stage has run."""
    return make_equal_workspace(tmp_path / "new study", unlike_models)


@pytest.fixture(scope="session")
def unlike_studied_once(once: Once, unlike_models: Path) -> Path:
    """A workspace of FedMKT with all its baselines, scored, from one seed; made once, to be read only."""

    def fill(top: Path) -> None:
        from stages.federation.compare import run_all
        from stages.study.table_rows import FEDMKT
        from stages.workspace.paths import Workspace

        run_all(Workspace(make_unlike_study(top / "study", unlike_models)), seeds=[7], methods=FEDMKT)

    return once("unlike-studied", fill) / "study"


@pytest.fixture
def unlike_studied(unlike_studied_once: Path, tmp_path: Path) -> Path:
    """Such a study of one's own."""
    return shutil.copytree(unlike_studied_once, tmp_path / "study", symlinks=True)


@pytest.fixture
def unlike_folder(unlike_models: Path, tmp_path: Path) -> Path:
    """A workspace of FedMKT in which no stage has run."""
    return make_unlike_workspace(tmp_path / "new study", unlike_models)


@pytest.fixture(scope="session")
def reported_once(finished_once: Path, once: Once) -> Path:
    """A finished workspace with scores, FedAvg beside it, and a report; made once, to be read only."""

    def fill(top: Path) -> None:
        from stages.federation.run import run
        from stages.workspace.paths import Workspace

        folder = shutil.copytree(finished_once, top / "study", symlinks=True)
        run(Workspace(folder))
        run(Workspace(folder), method="fedavg")
        assert give("report", "--quiet", "--workspace", folder) == 0

    return once("reported", fill) / "study"


@pytest.fixture(scope="session")
def enrolled_once(once: Once, base_models: Path) -> tuple[Path, Path]:
    """A workspace of secure aggregation in which all have joined and no round has begun, and its keys; made once."""

    def fill(top: Path) -> None:
        from federations import agreement, enrol, with_keys
        from stages.workspace.paths import Workspace

        folder = with_keys(make_workspace(top / "study", base_models), top / "keys")
        (folder / "fedcollm.toml").write_text(agreement())
        enrol(Workspace(folder))

    top = once("enrolled", fill)
    return top / "study", top / "keys"


@pytest.fixture
def enrolled(enrolled_once: tuple[Path, Path], tmp_path: Path) -> Path:
    """Such a workspace of one's own."""
    from federations import copied

    return copied(enrolled_once, tmp_path)


@pytest.fixture(scope="session")
def summed_once(once: Once, enrolled_once: tuple[Path, Path]) -> tuple[Path, Path]:
    """The same after `run`: two rounds of secure aggregation; made once."""

    def fill(top: Path) -> None:
        from federations import copied
        from stages.federation.run import run
        from stages.workspace.paths import Workspace

        run(Workspace(copied(enrolled_once, top)), scores=False)

    top = once("summed", fill)
    return top / "study", top / "keys"


@pytest.fixture
def summed(summed_once: tuple[Path, Path], tmp_path: Path) -> Path:
    """Such a finished workspace of one's own."""
    from federations import copied

    return copied(summed_once, tmp_path / "summed")


@pytest.fixture
def answered(finished: Path) -> Path:
    """A workspace in which every client has answered in round 1 and the server has not looked at it yet."""
    shutil.rmtree(finished / "exchange" / "round-0002")
    for number in (1, 2):
        shutil.rmtree(finished / "private" / "server" / f"round-{number:04d}")
    return finished


@pytest.fixture
def fedcollm(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call the command line in this process: fedcollm("status", "-w", folder) -> exit code, stdout, stderr."""

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        code = give(*words)
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call
