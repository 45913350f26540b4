"""The report as a page: charts drawn and embedded with their data, everything else escaped into one template."""

from __future__ import annotations

import base64
import importlib.resources
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.report.charts import Chart
from stages.report.drawing import Absent
from stages.report.findings import shortened
from stages.runtime.texts import printable

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATE = "report.html.jinja"

SECTIONS = {
    "accuracy": "Accuracy over rounds",
    "losses": "Losses inside each stage",
    "averaging": "Drift between clients",
    "choices": "Who teaches whom",
    "data": "Data split",
    "costs": "Traffic and time",
}


def render(drawn: Iterable[tuple[str, Chart | Absent]], words: Mapping[str, Any]) -> str:
    """The whole page. drawn: charts with their sections; words: the template's other names."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_told
    )
    template = environment.from_string((importlib.resources.files("stages.report") / TEMPLATE).read_text())
    placed = list(drawn)
    sections = [
        {
            "id": section,
            "title": title,
            "charts": [_embedded(one) for place, one in placed if place == section and isinstance(one, Chart)],
            "absent": [
                {"title": one.title, "reason": without_folders(one.reason)}
                for place, one in placed
                if place == section and isinstance(one, Absent)
            ],
        }
        for section, title in SECTIONS.items()
        if any(place == section for place, _ in placed)
    ]
    return template.render(words, sections=sections)


def _told(value: Any) -> Any:
    """Everything that the template prints: drawings as they are, of texts what is printable."""
    return printable(value) if type(value) is str else value


@dataclass(frozen=True)
class Embedded:
    """A chart as the page has it: its drawing, the name of its CSV file, and a link that holds the same bytes."""

    name: str
    title: str
    caption: str
    svg: Markup
    file: str
    link: str


def _embedded(chart: Chart) -> Embedded:
    from markupsafe import Markup

    drawing = Markup(chart.svg())  # the library has escaped the texts in it
    link = "data:text/csv;base64," + base64.b64encode(chart.csv().encode()).decode()
    return Embedded(chart.name, chart.title, chart.caption, drawing, f"{chart.name}.csv", link)


def without_folders(text: str) -> str:
    """A text without the folders of this machine: of every absolute path only the last name is left."""
    text = re.sub(r"""(["'])((?:/|~)[^"'\n]*)\1""", lambda found: found[1] + shortened(found[2]) + found[1], text)
    return re.sub(r"(?<![\w.:~/-])~?(?:/[\w.@+-]+)+/?", lambda found: shortened(found[0]), text)
