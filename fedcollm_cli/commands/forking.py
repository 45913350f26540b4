"""fork: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcollm_cli.session import Session, in_workspace
from stages.runtime.errors import UsageProblem
from stages.workspace.commands import Command


@in_workspace("quiet")
def fork(
    folder: Annotated[Path, typer.Argument(help="The workspace to make.")],
    *,
    round: Annotated[int, typer.Option("--round", min=1, help="The last round that both have in common.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="<str>", help="KEY=VALUE of fedcollm.toml, for the rounds after it; repeatable."),
    ] = None,
    opened: Session,
) -> None:
    """Go on from a round with other settings, in a new workspace.

    Reads what this machine has of the rounds up to that one, and its rows. Writes them into the new workspace, with
    this fedcollm.toml, the settings changed and [federation.fork], which says where it comes from. `run` then makes the
    rounds after it. Each party gives the same command, and gets the same fedcollm.toml.

    The models, clients, rows, first adapters and promises of the rounds before stay what they are: their settings are
    refused, with the reason.

    Example: fedcollm fork ../warmer --round 2 --set distillation.temperature=2
    """
    from stages.federation.settings_in_words import parse_setting
    from stages.study.fork import fork as stage

    changes = {}
    for text in set_ or []:
        key, values = parse_setting(text)
        if len(values) != 1 or key in changes:
            raise UsageProblem(
                f"{key} is to be one value, here are several", mend=f"to compare values: `{Command('sweep')}`"
            )
        changes[key] = values[0]
    made = stage(opened.workspace, folder.absolute(), round=round, changes=changes, report=opened.console.report)
    opened.console.result({"path": str(folder), "agreement_sha256": made.agreement_sha256}, f"{folder}")
