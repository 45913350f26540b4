"""shear: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedcollm_cli.session import OverwriteOption, Session, in_workspace
from fedcollm_cli.views.shears import shear_of
from stages.runtime.errors import UsageProblem


@in_workspace("quiet", "device", "dtype")
def shear(
    *,
    layers: Annotated[int, typer.Option("--layers", help="How many of the LLM's layers are kept.")],
    neurons: Annotated[
        int | None, typer.Option("--neurons", help="How many each layer's MLP keeps. Default: all it has.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="The folder to write. Default: models/slm.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text", metavar="<path>", help="A file of plain text; repeatable. Paragraphs end at empty lines."
        ),
    ] = None,
    heal: Annotated[
        int | None, typer.Option("--heal", min=1, help="Train so many steps afterwards. Default: none.")
    ] = None,
    heal_on: Annotated[
        Literal["auxiliary"] | None,
        typer.Option("--heal-on", help="Heal on private/server/auxiliary.jsonl; without --heal, one pass over it."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of healing, after a warm-up; it falls to zero. Default: 3e-4.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows in a step of healing. Default: 8.")] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a row; no more than the model takes.")] = 256,
    opened: Session,
    overwrite: OverwriteOption = False,
) -> None:
    """Make a small model from the large one.

    For those who own a large model and find no small one with its tokenizer. Keeps the layers that change the hidden
    states most (block influence, ShortGPT), and with --neurons of each MLP those that add most. With --heal, the cut
    model then learns to say what the whole one says. All its weights train.

    Reads the base in [llm], and the files of --text or else private/server/auxiliary.jsonl. The last twentieth of the
    text is kept out, to measure perplexity on. Writes a base folder that [slm] can name, with a model card and
    shearing.json. Prints each layer's influence.

    Example: fedcollm shear --layers 22 --neurons 885 --heal 2000 --text corpus.txt
    """
    from stages.shearing.heal import Heal
    from stages.shearing.shear import FOLDER
    from stages.shearing.shear import shear as stage

    if text and heal_on:
        raise UsageProblem("--text and --heal-on both name text", mend="give one of them")
    heals = heal is not None or heal_on is not None
    given = {"learning_rate": learning_rate, "batch_size": batch_size}
    own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if own and not heals:
        option = next(iter(own)).replace("_", "-")
        raise UsageProblem(
            f"--{option} is of healing, which was not asked for", mend="give --heal too, or leave it out"
        )
    made = stage(
        opened.workspace,
        layers=layers,
        neurons=neurons,
        texts=text or (),
        on_auxiliary=heal_on == "auxiliary",
        heal=Heal(steps=heal, **own) if heals else None,
        length=length,
        folder=to and to.absolute(),
        overwrite=overwrite,
        report=opened.console.report,
    )
    folder = opened.workspace.shown(to or opened.workspace.local(FOLDER))
    opened.console.result({"path": folder, **made}, shear_of(made, folder))
