"""A chart: plain rows and a Vega-Lite specification, drawn as SVG without a browser or a network.

Text and axes take the page's own colour (currentColor); the marks' colours are told apart by colour-blind readers and
stand out on white as on near-black, and no chart leaves it to colour alone. The width is a phone's.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from stages.runtime.texts import in_cell

Row = dict[str, Any]
"""One point of a chart, or one line of its CSV: numbers and short words by column."""
Spec = dict[str, Any]
"""A part of a Vega-Lite specification."""

WIDTH = 328
"""A phone's 360 pixels less the margins of the page."""
HEIGHT = 170
FONT = "Arial, Helvetica, sans-serif"
"""What the library measures texts with; most browsers have it, or one of the same widths."""
PADDING = {"left": 15, "right": 8, "top": 5, "bottom": 5}
"""Pixels around a chart: as much as a wider font, where Arial is not installed, adds to a long label."""


@dataclass(frozen=True)
class Style:
    """How one series looks: colour, dashes and the shape of its points."""

    colour: str
    dash: tuple[int, int]
    shape: str


STYLES = (
    # Okabe and Ito's palette, where needed darkened to stand out 3:1 on white and on near-black alike; and three more.
    # From the ninth on a colour comes again, with other dashes and another shape.
    Style("#0072B2", (1, 0), "circle"),
    Style("#D55E00", (6, 2), "square"),
    Style("#B85C95", (2, 2), "triangle-up"),
    Style("#008F68", (9, 3), "diamond"),
    Style("#808080", (4, 4), "cross"),
    Style("#7A5AC8", (1, 0), "triangle-down"),
    Style("#9A7B00", (6, 2), "triangle-left"),
    Style("#00839B", (2, 2), "triangle-right"),
    Style("#0072B2", (4, 4), "diamond"),
    Style("#D55E00", (1, 0), "triangle-down"),
    Style("#B85C95", (9, 3), "cross"),
    Style("#008F68", (2, 2), "square"),
    Style("#808080", (6, 2), "circle"),
)
PLAIN = Style("currentColor", (1, 0), "triangle-right")

CONFIG: Spec = {
    "aria": False,  # the page's <figure> says what there is to say
    "font": FONT,
    "view": {"stroke": None},
    "axis": dict.fromkeys(["labelColor", "titleColor", "gridColor", "domainColor", "tickColor"], "currentColor")
    | {"gridOpacity": 0.15, "domainOpacity": 0.5, "tickOpacity": 0.5, "titleFontWeight": "normal"}
    | {
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titlePadding": 6,
        "labelOverlap": "greedy",
        "labelSeparation": 5,
        "labelLimit": 150,
    },
    "legend": {"orient": "top", "title": None, "labelColor": "currentColor", "labelFontSize": 11, "labelLimit": 140}
    | {"columnPadding": 12, "symbolStrokeWidth": 2, "symbolSize": 70},
    "text": {"color": "currentColor", "fontSize": 11},
}


@dataclass(frozen=True)
class Chart:
    """One chart: a name for files, what people read above and below it, its rows, and how they are drawn."""

    name: str
    title: str
    caption: str
    rows: list[Row]
    spec: Spec

    def svg(self) -> str:
        """The drawing, as an element to stand in a page among others."""
        import vl_convert

        whole = {"width": WIDTH, "height": HEIGHT, "background": None, "padding": PADDING, "config": CONFIG} | self.spec
        whole["autosize"] = {"type": "fit-x", "contains": "padding"}
        svg: str = vl_convert.vegalite_to_svg(whole, allowed_base_urls=[])
        return svg

    def csv(self) -> str:
        """The rows, a line each."""
        out = io.StringIO()
        writer = csv.DictWriter(out, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: in_cell(value) for key, value in row.items()} for row in self.rows)
        return out.getvalue()
