"""All benchmarks as one table of ratios: python -m tests.benchmarks [--repeats 5] [name ...].

Every figure is a ratio against a named peer or limit measured in the same run: the median of repeats, and in brackets
the smallest and the largest. Nothing here is a test: machines differ, and a slow one has not failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.benchmarks import (
    aggregate,
    client_train,
    co_distill,
    commands,
    encryption,
    evaluate,
    gpu,
    knowledge,
    mutual,
    on_slurm,
    repeats,
    secagg,
    two_phases,
)

BENCHMARKS = {
    "client-train": client_train.measure,
    "co-distill": co_distill.measure,
    "mutual": mutual.measure,
    "evaluate": evaluate.measure,
    "fedmkt": knowledge.measure,
    "aggregate": aggregate.measure,
    "commands": commands.measure,
    "secagg": secagg.measure,
    "encryption": encryption.measure,
    "slurm": on_slurm.measure,
    "gpu": gpu.measure,
    "two-phases": two_phases.measure,
}
LONG = {"two-phases"}
"""Run by name only: many whole federations."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; default: all but the last"
    )
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    table = Table(title=repeats.processor())
    for column in ("what", "measured", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name in arguments.names or [name for name in BENCHMARKS if name not in LONG]:
        for what, measured, goal in BENCHMARKS[name](arguments.repeats):
            table.add_row(f"{name}: {what}", measured, goal)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
