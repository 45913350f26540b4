"""What `shear` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from stages.shearing.shear import Shear


def shear_of(made: Shear, path: str) -> Group:
    """Each block with its influence, and the perplexities."""
    from stages.shearing.card import in_digits

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("block", "influence", "kept"):
        table.add_column(name, justify="left" if name == "kept" else "right")
    for block, influence in enumerate(made["influence"]):
        table.add_row(str(block), f"{influence:.4f}", "yes" if block in made["kept"] else "")
    found = made["perplexity"]  # read back from shearing.json it stands in the order of the alphabet
    values = (found["whole"], found["cut"], *([found["healed"]] if "healed" in found else []))
    measured = ", ".join(
        f"{name} {in_digits(value)}" for name, value in zip(("whole", "cut", "healed"), values, strict=False)
    )
    return Group(table, f"perplexity: {measured}", path)
