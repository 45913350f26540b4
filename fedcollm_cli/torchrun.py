"""How this process was launched: alone, or by torchrun as one of several, from the environment alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from stages.runtime.errors import UsageProblem

COPIES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How many processes a launcher other than torchrun has started; each takes itself to be the only one."""


class Launch(NamedTuple):
    """The number of a process among all and on its machine, and how many there are."""

    rank: int
    local_rank: int
    processes: int


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process alone is to talk."""
    return int(environment.get("WORLD_SIZE") or 1) == 1 or environment.get("RANK", "0") == "0"


def launched(environment: Mapping[str, str], *, expected: int | None, together: bool) -> Launch:
    """Raises UsageProblem for any other number of processes than expected, and for several that cannot be together.

    expected: what machine.toml or --processes asks for, if it does. together: whether the command can be of several.
    """
    count = int(environment.get("WORLD_SIZE") or 1)
    if "RANK" not in environment:
        count = 1
        for name in COPIES:
            if int(environment.get(name) or 1) > 1:
                message = (
                    f"{environment[name]} copies of this command were started ({name}), that know nothing of each other"
                )
                mend = "let one task on each node start torchrun, and that the processes; or ask for one task"
                raise UsageProblem(message, mend=mend)
    if count > 1 and not together:
        mend = "give it without torchrun; client-train, co-distill and evaluate are the ones for several"
        raise UsageProblem(f"this command is for one process, torchrun has started {count}", mend=mend)
    if together and expected not in (None, count):
        mend = f"torchrun --nproc-per-node {expected} -m fedcollm_cli ..., or correct processes in machine.toml"
        raise UsageProblem(f"{expected} processes are asked for, here is {count}", mend=mend)
    if count > 1 and "MASTER_ADDR" not in environment:
        message = f"this is process {environment['RANK']} of {count} by RANK and WORLD_SIZE, and no MASTER_ADDR is set"
        raise UsageProblem(message, mend="start the command by torchrun, which sets all three; or unset the two")
    return Launch(int(environment.get("RANK") or 0), int(environment.get("LOCAL_RANK") or 0), count)
