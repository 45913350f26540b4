"""spread: a study over Slurm: job scripts in each of its federations, and one script that submits them all.

Each federation has a chain of jobs of its own, in its own folder, so that chains run side by side. Submits nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from stages.federation.slurm import rendered, slurm
from stages.files import writing
from stages.runtime.errors import Refused
from stages.runtime.events import Event, Report, ignore
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace


def spread(
    workspace: Workspace,
    federations: Sequence[Workspace],
    *,
    study: Literal["sweep", "compare"],
    collected_by: Command,
    report: Report = ignore,
) -> Path:
    """Write the scripts, by [slurm] of machine.toml. Returns slurm/sweep.sh or compare.sh of the first workspace.

    federations: workspaces derived from it, and maybe itself, whose scripts are left alone where it has some.
    collected_by: the command that prints the table of what is there.
    """
    told: set[str] = set()

    def once(event: Event) -> None:
        if event.text not in told:
            told.add(event.text)
            report(event)

    script = workspace.slurm / f"{study}.sh"
    for one in federations:
        is_own = one.root == workspace.root
        try:
            slurm(one, overwrite=not is_own, report=once)
        except Refused as error:
            if not is_own:
                raise
            words = f"{error.message}: it is left alone, and may be of earlier settings"
            report(Event("warning", f"{words}; `{Command('slurm', overwrite=True)}` writes it anew"))
    places = [shlex.quote(workspace.shown(one.root)) for one in federations]
    text = rendered("study.sh", {"places": places, "collected_by": str(collected_by)})
    writing.write(script, text.encode(), mode=0o777)
    return script
