"""Specifications of charts with lines: one for each series, with error bars, or the range of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stages.report.charts import STYLES, WIDTH, Row, Spec, Style

MOST_SERIES = 5
"""More lines than these are drawn as their mean and range."""
MOST_LARGE_POINTS = 12
"""Longer lines have small points."""


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
