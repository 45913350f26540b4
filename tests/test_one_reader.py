"""One reader: every exchanged file is opened by stages/files/writing.py, read once into memory, never mapped, unpickled
or handed to a library by its path. Held twice: in the source, and while whole rounds run."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from builders import ROOT, make_workspace

# --- in the source

OPENERS = {
    *("open", "fdopen", "read_bytes", "read_text", "readline", "safe_open", "load_file", "from_pretrained", "mmap"),
    *("memmap", "fromfile", "loadtxt", "genfromtxt", "copyfile", "copy2", "copytree", "unpack_archive"),
    *("ZipFile", "TarFile", "is_zipfile"),
}
LOADERS = {"torch", "np", "numpy", "pickle", "joblib", "marshal", "shelve", "shutil"}
ARCHIVES = {"zipfile", "tarfile", "pickle", "mmap", "marshal", "shelve", "joblib", "dill", "cloudpickle"}

REASONS = {
    "fedcollm_cli/console.py": "the terminal",
    "stages/files/reading.py": "the one reader",
    "stages/files/writing.py": "the one writer",
    "stages/files/locks.py": "locks",
    "stages/runtime/quiet.py": "/dev/null",
    "stages/report/page.py": "the page's template, in the package",
    "stages/paper/reported.py": "the paper's tables, in the package",
    "stages/workspace/init.py": "the workspace's template, in the package; a workspace to be made",
    "stages/workspace/shipped_tasks.py": "lm-eval's own task files, in its package",
    "stages/federation/slurm.py": "its scripts' templates, in the package; scripts that it wrote earlier",
    "stages/exchange/remote.py": "a remote's files, by its library, up to a given size",
    "stages/exchange/pack.py": "the bundle that is already in the place of the one to write",
    "stages/study/fork.py": "the rounds of a workspace, copied as they lie there",
    "stages/artefacts/checkpoints.py": "checkpoints of one's own, and the notes beside them",
    "stages/privacy/dp_sgd.py": "a checkpoint of this machine, weights only",
    "stages/artefacts/tensor_files.py": "the header of a base model's weights, from the user's disk",
    "stages/bases/base_files.py": "a base model, from the user's disk or the hub's cache",
    "stages/models/base_loading.py": "a base model, from the user's disk or the hub's cache",
    "stages/bases/base_names.py": "the configuration of a base model, from the user's disk",
    "stages/models/identity.py": "a base model, from the user's disk or the hub's cache",
    "stages/export/exported.py": "a base model; and a draft of an export that was just written, loaded back",
    "stages/export/made_folders.py": "a draft of a folder that was just written, for its digests",
    "stages/shearing/shear.py": "a base model; and a draft of the cut one that was just written, loaded back",
}
"""Modules that open files by themselves, and which: none of them is exchanged."""


def openings(path: Path) -> Iterator[str]:
    """Every call in a module that could open a file, and every import of what opens archives or pickles."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in ARCHIVES)
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        owner = called.value.id if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) else ""
        if name in OPENERS or (name in ("load", "copy") and owner in LOADERS):
            yield f"{owner}.{name}".lstrip(".")


def test_no_module_opens_files_by_itself_but_those_that_say_which() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("stages", "fedcollm_cli")
        for path in (ROOT / folder).rglob("*.py")
        if set(openings(path)) - {"study.open", "self.open"}  # evidence's own, a workspace; a step's first part
    }
    assert found == set(REASONS)


def test_nothing_knows_how_to_read_archives_or_pickles() -> None:
    for folder in ("stages", "fedcollm_cli"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {found for found in openings(path) if found.startswith("import ")}, path


# --- while rounds run

WATCHED = '''
import io, json, os, sys
from pathlib import Path

exchange = "/nowhere/"
reads, strangers, mapped = set(), [], []


def lies_there(path):
    path = os.fsdecode(path)
    return os.path.abspath(path).startswith(exchange)


def watch(event, details):
    if event == "mmap.__new__" and lies_there(os.readlink(f"/proc/self/fd/{details[0]}")):
        mapped.append("mmap")
    if event in ("shutil.copyfile", "shutil.copytree", "shutil.move") and lies_there(details[0]):
        strangers.append([event, os.fsdecode(details[0])])
    if event != "open" or not isinstance(details[0], (str, bytes, os.PathLike)):
        return
    path, mode, flags = details
    frame = sys._getframe(1)
    reader = frame.f_code.co_filename
    is_ours = "/stages/files/" in reader
    if is_ours and not os.path.isabs(path):  # one part of a path, below the folder before it
        path = frame.f_locals["path"]
    elif not lies_there(path):
        return
    if lies_there(path) and flags & os.O_ACCMODE == os.O_RDONLY:
        reads.add(os.path.basename(path))
        if not is_ours:
            strangers.append([f"{reader}:{frame.f_lineno}", os.fsdecode(path)])


def guard(module, name):
    """A library's function in C or Rust, which tells no hook what it opens: look at the path that it is given."""
    real = getattr(module, name)

    def guarded(path, *rest, **more):
        if isinstance(path, (str, bytes, os.PathLike)) and lies_there(path):
            mapped.append(f"{module.__name__}.{name}({os.fsdecode(path)})")
        return real(path, *rest, **more)

    setattr(module, name, guarded)


import safetensors, torch, numpy, pickle
for module, names in ((safetensors, ["safe_open"]), (torch, ["load"]), (numpy, ["load", "fromfile", "memmap"])):
    for name in names:
        guard(module, name)
import safetensors.numpy, safetensors.torch
guard(safetensors.numpy, "load_file")
guard(safetensors.torch, "load_file")
sys.addaudithook(watch)

from fedcollm_cli.main import app


def play(study, commands):
    codes = []
    for words in commands:
        try:
            app(words)
            codes.append([words, 0])
        except SystemExit as stop:
            codes.append([words, stop.code or 0])
    sound = list(strangers)
    (study / "exchange/round-0001/broadcast/manifest.json").read_bytes()  # the watch sees what it is for
    safetensors.safe_open(str(study / "exchange/round-0001/broadcast/adapter_model.safetensors"), "np")
    found = {"codes": codes, "reads": sorted(reads), "strangers": sound, "mapped": mapped[:-1]}
    return found | {"caught": len(strangers) - len(sound), "caught_by_path": len(mapped[-1:])}


for study, commands in json.loads(sys.argv[1]):
    exchange = os.path.realpath(f"{study}/exchange") + "/"
    for noted in (reads, strangers, mapped):
        noted.clear()
    found = play(Path(study), commands)
    Path(study, "found.json").write_text(json.dumps(found))
'''
COMMANDS = [
    ["run"],
    ["status"],
    ["comm-cost"],
    ["evaluate", "--round", "1", "--overwrite"],
    ["report"],
    ["export", "--round", "1"],
    ["audit"],
    ["diff", "@/round-0001/broadcast", "@/round-0002/broadcast"],
    ["pack", "--client", "1", "--round", "1", "--output", "@/../update.fedcollm"],
    ["unpack", "@/../update.fedcollm"],
    ["run"],
]
ADAPTER = {"manifest.json", "adapter_config.json", "adapter_model.safetensors"}
MASKED = {
    *("manifest.json.sig", "masked.safetensors", "shares.safetensors", "reveal.bin", "federation.json"),
    *("federation.json.sig", "client-1.json", "client-1.json.sig", "client-1.safetensors"),
}


MODES = ("plain", "secure")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, base_models: Path) -> Path:
    """What a fresh Python that gives these commands in each mode saw of exchange/: <mode>/study/found.json."""
    top, plays = tmp_path_factory.mktemp("watched"), []
    for mode in MODES:
        (top / mode).mkdir()
        study = make_workspace(top / mode / "study", base_models)
        text = (study / "fedcollm.toml").read_text().replace("steps = 6", "steps = 1").replace("steps = 5", "steps = 1")
        text = text.replace("[evaluation]", f'[aggregation]\nmode = "{mode}"\n[evaluation]')
        (study / "fedcollm.toml").write_text(text)
        (study / "machine.toml").write_text('secrets = "../secrets"\n')
        commands = [[word.replace("@", str(study / "exchange")) for word in command] for command in COMMANDS]
        plays.append((str(study), [words if words[0] == "diff" else [*words, "-w", str(study)] for words in commands]))
    call = [sys.executable, "-c", WATCHED, json.dumps(plays)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return top


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_in_whole_rounds_nothing_but_the_one_reader_opens_an_exchanged_file(mode: str, watched: Path) -> None:
    found = json.loads((watched / mode / "study/found.json").read_text())
    assert [code for _, code in found["codes"]] == [0] * len(found["codes"]), found["codes"]
    assert found["strangers"] == []
    assert found["mapped"] == []
    assert (found["caught"], found["caught_by_path"]) == (1, 1)
    assert set(found["reads"]) >= (ADAPTER | MASKED if mode == "secure" else ADAPTER)
