"""charts: each drawing has as many marks as its rows say, in colours that all can tell apart on any ground."""

from __future__ import annotations

import csv
import io
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from stages.report import bar_charts, charts, line_charts
from stages.report.charts import STYLES, Chart

SVG = "{http://www.w3.org/2000/svg}"


def chart(rows: list[dict[str, Any]], spec: dict[str, Any]) -> Chart:
    return Chart("trial", "a trial", "as it is", rows, spec)


def marks(drawn: Chart, kind: str) -> list[ElementTree.Element]:
    """The data's own marks of one kind: line, symbol, rule, rect, area or text."""
    groups = [
        group
        for group in ElementTree.fromstring(drawn.svg()).iter(f"{SVG}g")
        if {f"mark-{kind}", "role-mark"} <= set(group.get("class", "").split())
    ]
    return [mark for group in groups for mark in group]


def curve(names: int, rounds: int) -> list[dict[str, Any]]:
    return [
        {"client": f"client {k}", "round": t, "value": float(k + t)} for k in range(names) for t in range(1, rounds + 1)
    ]


def test_a_line_for_each_series_and_a_point_for_each_row() -> None:
    rows = curve(3, 4)
    drawn = chart(rows, line_charts.lines(rows, x="round", y="value", series="client", titles=("round", "value")))
    assert len(marks(drawn, "line")) == 3
    assert len(marks(drawn, "symbol")) == 12
    assert len({mark.get("stroke-dasharray") for mark in marks(drawn, "line")}) == 3
    assert len({mark.get("d") for mark in marks(drawn, "symbol")}) == 3


def test_a_line_ends_with_its_part() -> None:
    rows = curve(2, 4)
    spec = line_charts.lines(
        rows, x="round", y="value", series="client", titles=("", ""), points=False, part="round"
    )  # each round has one point
    assert len(marks(chart(rows, spec), "line")) == 8
    assert marks(chart(rows, spec), "symbol") == []


def test_more_series_than_can_be_told_apart_are_drawn_as_their_mean_and_range() -> None:
    rows = curve(6, 4)
    drawn = chart(rows, line_charts.lines(rows, x="round", y="value", series="client", titles=("", "")))
    assert len(marks(drawn, "line")) == 1
    assert len(marks(drawn, "area")) == 1
    assert len(marks(drawn, "symbol")) == 4


def test_an_error_bar_for_each_row_and_every_line_begins_at_the_start() -> None:
    rows = [{"method": "base", "round": 0, "value": 40.0, "error": 2.0}]
    rows += [
        {"method": name, "round": t, "value": 40.0 + 5 * t, "error": 1.0} for name in ("one", "other") for t in (1, 2)
    ]
    styles = dict(zip(("one", "other", "base"), STYLES, strict=False))
    spec = line_charts.lines_with_errors(
        rows, x="round", y="value", error="error", series="method", start="base", titles=("", ""), styles=styles
    )
    drawn = chart(rows, spec)
    assert len(marks(drawn, "rule")) == 5
    assert len(marks(drawn, "symbol")) == 5
    lines = [str(mark.get("d")) for mark in marks(drawn, "line")]
    assert len(lines) == 2
    assert [line.count("L") for line in lines] == [2, 2]  # the start, and two rounds
    assert len({line.partition("L")[0] for line in lines}) == 1
    heights = [abs(float(mark.get("y2", "0"))) for mark in marks(drawn, "rule")]
    assert min(heights) > 5
    assert max(heights) == pytest.approx(2 * min(heights), rel=0.02)  # errors of 2 and of 1


def test_a_cell_and_a_number_for_each_row_of_a_grid_while_there_is_room() -> None:
    rows = [{"layer": f"h.{i}", "round": t, "value": float(i)} for i in range(12) for t in range(1, 5)]
    drawn = chart(rows, bar_charts.grid(rows, x="round", y="layer", value="value", titles=("", ""), form=".1f"))
    assert len(marks(drawn, "rect")) == 48
    assert [mark.text for mark in marks(drawn, "text")][:5] == ["0.0", "0.0", "0.0", "0.0", "1.0"]


def test_a_grid_of_many_layers_and_rounds_stays_on_the_page_without_numbers() -> None:
    rows = [{"layer": f"h.{i}", "round": t, "value": float(i)} for i in range(128) for t in range(1, 31)]
    drawn = chart(rows, bar_charts.grid(rows, x="round", y="layer", value="value", titles=("", ""), form=".1f"))
    assert len(marks(drawn, "rect")) == 128 * 30
    assert marks(drawn, "text") == []
    assert float(ElementTree.fromstring(drawn.svg()).get("height", "0")) < 1.2 * bar_charts.TALLEST
    assert "role-legend" in drawn.svg()  # which says what the numbers do elsewhere


def test_bars_stand_side_by_side_one_for_each_row_and_the_second_is_hollow() -> None:
    rows = [{"round": t, "way": way, "bytes": 5} for t in (1, 2, 3) for way in ("out", "back")]
    drawn = chart(rows, bar_charts.bars(rows, x="round", y="bytes", series="way", titles=("", "")))
    assert len(marks(drawn, "rect")) == 6
    assert len({mark.get("fill-opacity") for mark in marks(drawn, "rect")}) == 2


def test_lying_bars_carry_their_labels() -> None:
    rows = [{"stage": "long", "seconds": 9.0, "label": "9 s"}, {"stage": "short", "seconds": 0.01, "label": "10 ms"}]
    drawn = chart(rows, bar_charts.lying_bars(rows, x="seconds", y="stage", title="seconds", label="label"))
    assert len(marks(drawn, "rect")) == 2
    assert [mark.text for mark in marks(drawn, "text")] == ["9 s", "10 ms"]


def test_a_value_that_is_not_known_is_left_out() -> None:
    rows = [*curve(1, 3), {"client": "client 0", "round": 4, "value": None}]
    drawn = chart(rows, line_charts.lines(rows, x="round", y="value", series="client", titles=("", "")))
    assert len(marks(drawn, "symbol")) == 3


def test_a_drawing_repeated_is_the_same_and_holds_no_script_and_no_address() -> None:
    rows = [{"layer": f"h.{i}", "round": t, "value": float(i)} for i in range(9) for t in range(20)]
    drawn = chart(rows, bar_charts.grid(rows, x="round", y="layer", value="value", titles=("", ""), form=".1f"))
    first = drawn.svg()
    assert drawn.svg() == first
    assert ' id="' not in first  # the library counts ids through a process, and they would meet in the page
    assert "<script" not in first
    assert set(re.findall(r"https?://[^\"' ]+", first)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_names_from_outside_are_escaped() -> None:
    rows = [{"client": "<script>alert(1)</script>", "round": 1, "value": 1.0}]
    drawn = chart(rows, line_charts.lines(rows, x="round", y="value", series="client", titles=("", "")))
    assert "<script" not in drawn.svg()


def test_the_csv_holds_every_row() -> None:
    rows = [{"party": "a, b", "rows": 3}, {"party": "c", "rows": 0}]
    assert list(csv.DictReader(io.StringIO(chart(rows, {}).csv()))) == [
        {"party": "a, b", "rows": "3"},
        {"party": "c", "rows": "0"},
    ]


@pytest.mark.parametrize("style", STYLES)
def test_every_colour_stands_out_on_white_and_on_near_black(style: charts.Style) -> None:
    def luminance(colour: str) -> float:
        shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    assert 1.05 / (luminance(style.colour) + 0.05) >= 3
    assert (luminance(style.colour) + 0.05) / (luminance("#14171a") + 0.05) >= 3
