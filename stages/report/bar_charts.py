"""Specifications of charts with areas: grids of cells, and bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stages.report.charts import STYLES, WIDTH, Row, Spec

MOST_COLUMNS = 8
MOST_LABELLED = 40
"""A grid with more columns, or more lines, than these has no numbers printed in its cells."""
TALLEST = 900
"""Pixels that a grid's lines share, however many there are."""


def grid(rows: Sequence[Row], *, x: str, y: str, value: str, titles: tuple[str, str], form: str) -> Spec:
    """A cell for each x and y, the fuller the larger its value; the numbers printed where there is room for them.

    form: of the numbers, in d3's format language.
    """
    columns, lines_ = list(dict.fromkeys(row[x] for row in rows)), list(dict.fromkeys(row[y] for row in rows))
    height = min(20, TALLEST / len(lines_))
    encoding: Spec = {
        "x": {"field": x, "type": "ordinal", "title": titles[0], "sort": columns},
        "y": {"field": y, "type": "ordinal", "title": titles[1], "sort": lines_},
    }
    if len(columns) <= MOST_COLUMNS:  # every column has its name, aslant where that is long
        is_narrow = _text_width(columns) > (WIDTH - _text_width(lines_)) / len(columns)
        encoding["x"]["axis"] = {"labelAngle": -40 if is_narrow else 0, "labelOverlap": False}
    else:
        encoding["x"]["axis"] = {"labelAngle": 0}
    for axis in encoding.values():
        axis["axis"] = axis.get("axis", {}) | {"domain": False, "ticks": False, "labelPadding": 4}
    has_room = len(columns) <= MOST_COLUMNS and len(lines_) <= MOST_LABELLED
    fullness: Spec = {"field": value, "type": "quantitative", "scale": {"range": [0.06, 0.6], "zero": True}}
    mark: Spec = {"type": "rect", "fill": STYLES[0].colour}
    if has_room:
        mark |= {"stroke": "currentColor", "strokeOpacity": 0.25}
        cell = {"mark": mark, "encoding": {"fillOpacity": fullness | {"legend": None}}}
    else:
        legend = {"symbolType": "square", "symbolFillColor": STYLES[0].colour, "symbolStrokeWidth": 0}
        fullness |= {"scale": {"range": [0, 1], "zero": True}, "legend": legend | {"format": form, "tickCount": 4}}
        cell = {"mark": mark, "encoding": {"opacity": fullness}}
    numbers: Spec = {
        "mark": {"type": "text"},
        "encoding": {"text": {"field": value, "type": "quantitative", "format": form}},
    }
    return {
        "data": {"values": rows},
        "height": max(40, height * len(lines_)),
        "encoding": encoding,
        "layer": [cell, numbers] if has_room else [cell],
    }


def bars(rows: Sequence[Row], *, x: str, y: str, series: str, titles: tuple[str, str], form: str = "~s") -> Spec:
    """Upright bars side by side, the first series full and the second hollow."""
    names = list(dict.fromkeys(row[series] for row in rows))
    domain = {"field": series, "type": "nominal", "sort": names}
    return {
        "data": {"values": rows},
        "mark": {"type": "bar", "strokeWidth": 1.5},
        "encoding": {
            "x": {"field": x, "type": "ordinal", "title": titles[0], "axis": {"labelAngle": 0}},
            "xOffset": domain,
            "y": {"field": y, "type": "quantitative", "title": titles[1], "axis": {"format": form, "tickCount": 5}},
            "fill": domain | {"scale": {"domain": names, "range": [style.colour for style in STYLES[: len(names)]]}},
            "stroke": domain | {"scale": {"domain": names, "range": [style.colour for style in STYLES[: len(names)]]}},
            "fillOpacity": domain | {"scale": {"domain": names, "range": [1, 0.15]}},
        },
    }


def lying_bars(rows: Sequence[Row], *, x: str, y: str, title: str, label: str) -> Spec:
    """A bar for each row from the left, with the row's own label at its end."""
    names = [row[y] for row in rows]
    plot = WIDTH - _text_width(names) - 20
    room = plot / (plot - _text_width(row[label] for row in rows) - 10)
    scale = {"domain": [0, room * max(row[x] for row in rows)]}
    return {
        "data": {"values": rows},
        "height": 26 * len(rows),
        "encoding": {
            "x": {
                "field": x,
                "type": "quantitative",
                "title": title,
                "scale": scale,
                "axis": {"tickCount": 4},
            },
            "y": {"field": y, "type": "nominal", "title": None, "sort": names},
        },
        "layer": [
            {"mark": {"type": "bar", "height": 14, "color": STYLES[0].colour}},
            {
                "mark": {"type": "text", "align": "left", "dx": 5},
                "encoding": {"text": {"field": label}},
            },
        ],
    }


def _text_width(texts: Iterable[Any]) -> float:
    """About as many pixels as the longest of these takes."""
    return 6.0 * max(len(str(text)) for text in texts)
