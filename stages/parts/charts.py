"""Charts of plain rows: Vega-Lite specifications, drawn as SVG without a browser or a network.

Text and axes take the page's own colour (currentColor); the marks' colours are told apart by colour-blind readers and
stand out on white as on near-black, and no chart leaves it to colour alone. The width is a phone's.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Spec = dict[str, Any]

WIDTH = 328
"""A phone's 360 pixels less the margins of the page."""
HEIGHT = 170
FONT = "Arial, Helvetica, sans-serif"
"""What the library measures texts with; browsers have it, or one of the same widths."""

MOST_SERIES = 5
"""More lines than these are drawn as their mean and range."""
MOST_LARGE_POINTS = 12
"""Longer lines have small points."""
MOST_COLUMNS = 8
"""A grid's columns beyond these have no numbers printed in their cells."""
MOST_LABELLED = 40
TALLEST = 900


@dataclass(frozen=True)
class Style:
    """How one series looks: colour, dashes and the shape of its points."""

    colour: str
    dash: tuple[int, int]
    shape: str


STYLES = (
    # Okabe and Ito's palette, where needed darkened to stand out 3:1 on white and on near-black alike.
    Style("#0072B2", (1, 0), "circle"),
    Style("#D55E00", (6, 2), "square"),
    Style("#B85C95", (2, 2), "triangle-up"),
    Style("#008F68", (9, 3), "diamond"),
    Style("#808080", (4, 4), "cross"),
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

        whole = {"width": WIDTH, "height": HEIGHT, "background": None, "config": CONFIG} | self.spec
        whole["autosize"] = {"type": "fit-x", "contains": "padding"}
        svg: str = vl_convert.vegalite_to_svg(whole, allowed_base_urls=[])
        return svg

    def csv(self) -> str:
        """The rows, a line each."""
        out = io.StringIO()
        writer = csv.DictWriter(out, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()


def lines(
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    series: str,
    titles: tuple[str, str],
    styles: Mapping[str, Style] | None = None,
    points: bool = True,
    part: str | None = None,
) -> Spec:
    """A line for each series, or, of more than MOST_SERIES, their mean within their range.

    titles: of x and y, with units. styles: by default in the order of appearance. part: a line ends where this changes.
    """
    names = list(dict.fromkeys(str(row[series]) for row in rows))
    encoding: Spec = {
        "x": {"field": x, "type": "quantitative", "title": titles[0], "axis": _whole_numbers(rows, x)},
        "y": {"field": y, "type": "quantitative", "title": titles[1], "scale": {"zero": False}},
    }
    if part:
        encoding["detail"] = {"field": part, "type": "nominal"}
    if len(names) > MOST_SERIES and styles is None:
        del encoding["y"]
        return {"data": {"values": rows}, "encoding": encoding, "layer": _range(y, titles[1], points)}
    chosen = styles or dict(zip(names, STYLES, strict=False))
    encoding |= _appearance(series, {name: style for name, style in chosen.items() if name in names}, points)
    shape = encoding.pop("shape")
    layer: list[Spec] = [{"mark": {"type": "line", "strokeWidth": 2 if points else 1.4}}]
    if points:
        is_dense = len({row[x] for row in rows}) > MOST_LARGE_POINTS
        point = {"type": "point", "filled": True, "opacity": 1, "size": 16 if is_dense else 45}
        layer.append({"mark": point, "encoding": {"shape": shape}})
    return {"data": {"values": rows}, "encoding": encoding, "layer": layer}


def lines_with_errors(
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    error: str,
    series: str,
    start: str,
    titles: tuple[str, str],
    styles: Mapping[str, Style],
) -> Spec:
    """A line for each series with an error bar at each point, all beginning at the point of the series called start.

    Series are moved apart a little sideways, by what no reader could take for another x, so that bars do not hide bars.
    """
    spec = lines(rows, x=x, y=y, series=series, titles=titles, styles=styles)
    names = [name for name in styles if any(row[series] == name for row in rows)]
    others = [name for name in names if name != start]
    aside = 0.012 * max(1, max(row[x] for row in rows))
    offset = f"(indexof({others}, datum['{series}']) - {(len(others) - 1) / 2}) * {aside}"
    spec["transform"] = [
        {"calculate": f"datum['{x}'] + (datum['{series}'] == '{start}' ? 0 : {offset})", "as": "at"},
        {"calculate": f"datum['{y}'] - datum['{error}']", "as": "low"},
        {"calculate": f"datum['{y}'] + datum['{error}']", "as": "high"},
    ]
    spec["encoding"]["x"]["field"] = "at"
    begun = [row | {series: name} for row in rows if row[series] == start for name in others]
    line, point = spec["layer"]
    line["data"] = {"values": [*begun, *(row for row in rows if row[series] != start)]}
    line["transform"] = [spec["transform"][0] | {"calculate": f"datum['{x}'] + (datum['{x}'] > 0 ? {offset} : 0)"}]
    bar = {
        "mark": {"type": "rule", "strokeWidth": 1.2},
        "encoding": {"y": {"field": "low", "type": "quantitative", "title": titles[1]}, "y2": {"field": "high"}}
        | {"strokeDash": {"value": [1, 0]}},
    }
    spec["layer"] = [line, bar, point]
    return spec


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


def _whole_numbers(rows: Sequence[Row], x: str) -> Spec:
    found = sorted({row[x] for row in rows})
    return {"tickMinStep": 1, "format": "d", "grid": False} | ({"values": found} if len(found) <= 10 else {})


def _appearance(series: str, styles: Mapping[str, Style], points: bool) -> Spec:
    """Colour, dash and shape by series, on scales alike, so that they share one legend."""
    names = list(styles)

    fits_one_line = sum(5.5 * len(name) + 28 for name in names) < WIDTH - 30
    legend = {"columns": len(names) if fits_one_line else 3} | ({"symbolStrokeWidth": 0} if points else {})

    def scale(values: list[Any]) -> Spec:
        return {"field": series, "type": "nominal", "scale": {"domain": names, "range": values}, "legend": legend}

    return {
        "color": scale([style.colour for style in styles.values()]),
        "strokeDash": scale([list(style.dash) for style in styles.values()]),
        "shape": scale([style.shape for style in styles.values()]),
    }


def _range(y: str, title: str, points: bool) -> list[Spec]:
    """The mean of all series and the range they lie in."""

    def of(aggregate: str) -> Spec:
        return {"field": y, "aggregate": aggregate, "type": "quantitative", "title": title, "scale": {"zero": False}}

    colour = STYLES[0].colour
    mean = {"type": "line", "color": colour, "strokeWidth": 2, "point": {"color": colour} if points else False}
    return [
        {
            "mark": {"type": "area", "color": colour, "opacity": 0.3},
            "encoding": {"y": of("min"), "y2": {"field": y, "aggregate": "max"}},
        },
        {"mark": mean, "encoding": {"y": of("mean")}},
    ]
