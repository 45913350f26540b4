"""The sha256 of every file that small federations leave: python tests/digests.py > before; ...; diff before after.

A change of the code that should change nothing leaves the same list on the same machine: adapters, manifests, results,
captures, exports, job scripts, keys and ledgers, of each method, order, rule, channel and precision. Keys and masks are
drawn from a fixed stream for it. Times in logs are left out, and checkpoints are not looked at. Words name the
federations to play, in this order; default: each once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

TIMES = ("wall_s", "elapsed_s", "seconds", "time")
ROOTS = ("exchange", "private", "results", "exports", "slurm", "baselines")
PASSED_OVER = ("checkpoints", "cache")


class Drawn:
    """Randomness that is the same in every run; what names a draft is no part of the stream."""

    def __init__(self) -> None:
        self.count = 0

    def bytes(self, size: int | None = None) -> bytes:
        self.count += 1
        return hashlib.shake_256(b"%d" % self.count).digest(32 if size is None else size)

    def hexadecimal(self, size: int | None = None) -> str:
        return os.getrandom(4).hex() if size == 4 else self.bytes(size).hex()


def hold_secrets_fixed() -> Drawn:
    """Have every secret come from one stream; before anything of the product is imported."""
    drawn = Drawn()
    replaced: Any = secrets
    replaced.token_bytes, replaced.token_hex, os.urandom = drawn.bytes, drawn.hexadecimal, drawn.bytes
    for kind in (X25519PrivateKey, Ed25519PrivateKey):
        made: Any = kind
        made.generate = classmethod(lambda own: own.from_private_bytes(drawn.bytes(32)))
    return drawn


def give(folder: Path, *words: object) -> str:
    """A command in a workspace, which must end well. Returns what it printed."""
    from fedcollm_cli.main import app

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app([*map(str, words), "--workspace", str(folder)])
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"{words} ended with {stop.code}: {err.getvalue()}") from None
    return out.getvalue()


def timeless(path: Path) -> bytes:
    """A file's bytes; of a log, its lines without times and without what digests them."""
    content = path.read_bytes()
    if path.suffix != ".jsonl" or path.name in ("train.jsonl", "auxiliary.jsonl"):
        return content
    lines = [json.loads(line) for line in content.splitlines()]
    for line in lines:
        for key in (*TIMES, "log_sha256"):
            line.pop(key, None)
    return json.dumps(lines, sort_keys=True).encode()


def left_in(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and sha256 of every file of a workspace that holds a result."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = path.suffix == ".lock" or any(part.startswith(".") for part in name.parts)
        is_result = folder.name == "keys" or name.parts[0] in ROOTS
        if not is_result or not path.is_file() or is_hidden or set(PASSED_OVER) & set(name.parts):
            continue
        yield str(name), hashlib.sha256(timeless(path)).hexdigest()


def changed(old: str, new: str) -> Callable[[Path], None]:
    """A workspace whose agreement has a new text in place of an old one."""
    from builders import edit

    return lambda folder: edit(folder / "fedcollm.toml", old, new)


def added(lines: str) -> Callable[[Path], None]:
    """A workspace whose agreement ends with these lines."""

    def arrange(folder: Path) -> None:
        toml = folder / "fedcollm.toml"
        toml.write_text(f"{toml.read_text()}\n{lines}\n")

    return arrange


def of_five(folder: Path) -> None:
    """As many clients as Krum needs."""
    from builders import edit, rows, write_rows

    edit(folder / "fedcollm.toml", "clients = 3", "clients = 5")
    for client in (4, 5):
        write_rows(folder / "private" / f"client-{client}" / "train.jsonl", rows(12, start=12 * client))


def in_few_bits(bits: str) -> Callable[[Path], None]:
    """A workspace whose bases are wide and kept in so many bits."""
    from builders import edit, make_wide_models

    def arrange(folder: Path) -> None:
        wide = make_wide_models(folder / "wide", folder / "models")
        (folder / "models").unlink()
        wide.rename(folder / "models")
        for role in ("slm", "llm"):
            edit(
                folder / "fedcollm.toml",
                f'model = "models/{role}"',
                f'model = "models/{role}"\nquantization = "{bits}"',
            )

    return arrange


def run(folder: Path) -> None:
    give(folder, "run")


def by_methods(folder: Path) -> None:
    for method in ("fedavg", "fedavg-aux", "standalone", "centralized"):
        give(folder, "run", "--method", method)


def handed_on(folder: Path) -> None:
    run(folder)
    for words in (("slm",), ("llm",), ("slm", "--merged")):
        give(folder, "export", "--round", 2, "--model", *words)
    give(folder, "slurm", "--partition", "gpu", "--gpus-per-task", 1, "--time", "01:00:00")


def in_two_phases(folder: Path) -> None:
    give(folder, "broadcast", "--round", 1)
    for client in (1, 2, 3):
        give(folder, "client-train", "--round", 1, "--client", client)
    give(folder, "aggregate", "--round", 1)
    for model in ("llm", "slm"):
        give(folder, "co-distill", "--round", 1, "--phase", "capture", "--model", model, "--top-k", 8)
    give(folder, "co-distill", "--round", 1, "--phase", "train")


def securely(folder: Path) -> None:
    (folder / "machine.toml").write_text(f'secrets = "{folder.parent / "keys"}"\n')
    for client in (1, 2, 3):
        give(folder, "keys", "--client", client)
    fingerprint = give(folder, "enroll").strip()
    for client in (1, 2, 3):
        give(folder, "join", "--client", client, "--fingerprint", fingerprint)
    give(folder, "run")


SECURE = '[aggregation]\nmode = "secure"'
PRIVATE = "[privacy]\nnoise_multiplier = 1.0"
RULES = {
    "median": 'rule = "median"',
    "trimmed mean": 'rule = "trimmed-mean"\noutliers = 1',
    "clipped mean": 'rule = "clipped-mean"',
    "Krum": 'rule = "krum"\noutliers = 1',
    "the geometric median": 'rule = "geometric-median"',
    "the mean of products": 'combine = "product"',
    "the mean and its residual": 'combine = "residual"',
}

Scene = tuple[tuple[Callable[[Path], None], ...], Callable[[Path], None]]


def scenes() -> dict[str, Scene]:
    """What is played: how a workspace differs from the plain one, and what is done in it."""
    return {
        "run, exports, job scripts": ((), handed_on),
        "methods": ((), by_methods),
        "weighed by samples": ((added('[aggregation]\nweighting = "samples"'),), run),
        **{rule: ((of_five, added(f"[aggregation]\n{lines}")), run) for rule, lines in RULES.items()},
        "short updates": ((added("[aggregation]\nmax_update_norm = 0.5"),), run),
        "alternating": ((changed("[distillation]", '[distillation]\norder = "alternating"'),), run),
        "two phases": ((), in_two_phases),
        "private": ((added(PRIVATE),), run),
        "secure": ((added(SECURE),), securely),
        "secure and private": ((added(SECURE), added(PRIVATE)), securely),
        **{bits: ((in_few_bits(bits),), run) for bits in ("4bit", "8bit")},
    }


def main(names: Sequence[str] = (), *, libraries: Sequence[str] = ()) -> None:
    """Play these federations; default: each. libraries: to be imported before, since some draw as they are imported."""
    drawn = hold_secrets_fixed()
    for library in libraries:
        importlib.import_module(library)
    from builders import make_base_models, make_workspace

    with tempfile.TemporaryDirectory() as top:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{top}/cache", "OMP_NUM_THREADS": "1"}
        bases = make_base_models(Path(top) / "models")
        played = scenes()
        for name in names or played:
            arrangements, play = played[name]
            drawn.count = 0
            # One name for all, since a workspace's path is in some of its files.
            folder = make_workspace(Path(top) / "study", bases)
            for arrange in arrangements:
                arrange(folder)
            play(folder)
            for place in (folder, Path(top) / "keys"):
                for file, digest in left_in(place):
                    print(f"{digest}  {name}: {file}", flush=True)
                shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
