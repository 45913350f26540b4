"""The study of docs/how-to/shear.md: fewer layers, or narrower ones, at equal size?

    python tests/studies/width_pruning.py WORKSPACE FOLDER SHAPE... --text FILE...

WORKSPACE: its [llm] is cut, as `fedcollm shear` does. SHAPE: layers, and neurons in the MLP of each, such as 22x885;
the LLM must have MLPs of Llama's kind. FOLDER gets a base folder for each, to score by `fedcollm evaluate --zero-shot`.
The neurons kept are those with the largest norm of what they add: that of their activation on a sample of the text,
times that of their column in down_proj. Prints parameters and perplexities, on the part of the text that is kept out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from stages.export import exported
from stages.runtime.events import ignore
from stages.shearing import blocks
from stages.shearing.heal import Heal, heal
from stages.shearing.perplexity import perplexity
from stages.shearing.shear import GENERATION, MEASURED_ROWS
from stages.shearing.texts import Rows, as_rows, evenly, read_texts
from stages.shearing.whole import Whole
from stages.workspace.paths import Workspace


@torch.no_grad()
def norms(mlps: Sequence[Any], model: Any, rows: Sequence[list[int]]) -> list[Tensor]:
    """Of each MLP of a model, the norm of what each neuron adds to the hidden states of all tokens of the rows."""
    squares = [torch.zeros(mlp.down_proj.in_features, dtype=torch.float64) for mlp in mlps]

    def watch(number: int) -> Any:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares[number] += args[0].double().square().sum((0, 1)).cpu()

        return before

    handles = [mlp.down_proj.register_forward_pre_hook(watch(number)) for number, mlp in enumerate(mlps)]
    for row in rows:
        model.base_model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [total.sqrt() * mlp.down_proj.weight.double().norm(dim=0) for total, mlp in zip(squares, mlps, strict=True)]


@torch.no_grad()
def narrow(model: Any, width: int, rows: Sequence[list[int]]) -> None:
    """Keep so many neurons in each MLP, in place."""
    mlps: list[Any] = [block.mlp for block in blocks.blocks_of(model).blocks]
    for mlp, norm in zip(mlps, norms(mlps, model, rows), strict=True):
        kept = norm.topk(width).indices.sort().values
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            linear = getattr(mlp, name)
            linear.weight = nn.Parameter(linear.weight.index_select(dim, kept).contiguous())
            linear.out_features, linear.in_features = linear.weight.shape
        mlp.intermediate_size = width


def made(workspace: Workspace, target: Path, rows: Rows, steps: int) -> tuple[int, float, float]:
    """A model of the shape that its folder is called by, healed.

    Returns its parameters, and its perplexity before and after healing.
    """
    layers, width = map(int, target.name.split("x"))
    whole = Whole.of(workspace, 1)
    model, held = whole.load(), evenly(rows.kept_out, MEASURED_ROWS)
    sample = evenly(rows.trained, MEASURED_ROWS)
    influence = blocks.influence(model, sample, autocast=whole.autocast, report=ignore)
    kept = blocks.most_influential(influence, layers)
    cut = blocks.shortened(model, kept)
    narrow(cut, width, sample)
    before = perplexity(cut, held, autocast=whole.autocast, report=ignore)
    heal(
        cut,
        model,
        rows.trained,
        Heal(steps, batch_size=4).on(len(rows.trained)),
        whole=whole,
        machine=workspace.machine,
        seed=workspace.seed_for("shear", 0),
        folder=target.with_name(f".{target.name}.healing"),
        inputs={"shape": target.name, "steps": steps},
        report=ignore,
    )
    after = perplexity(cut, held, autocast=whole.autocast, report=ignore)
    config = AutoConfig.from_pretrained(whole.folder)
    blocks.shorten(config, kept)
    config.intermediate_size = width
    target.mkdir(parents=True, exist_ok=True)
    exported.write_whole(target, cut, config, exported.stored_dtype(whole.folder))
    exported.copy_files(target, whole.folder, (*exported.TOKENIZER_FILES, GENERATION))
    return sum(weight.numel() for weight in cut.parameters()), before, after


def main() -> None:
    """A line of Markdown for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("shapes", nargs="+", metavar="SHAPE")
    parser.add_argument("--text", action="append", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--length", type=int, default=192)
    given = parser.parse_args()
    workspace = Workspace(given.workspace.resolve())
    rows = as_rows(read_texts(given.text), Whole.of(workspace, 1).tokenizer, given.length)
    for shape in given.shapes:
        count, before, after = made(workspace, given.folder.resolve() / shape, rows, given.steps)
        sys.stdout.write(f"| {shape} | {count / 1e6:.1f} M | {before:.4g} | {after:.4g} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
