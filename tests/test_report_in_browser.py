"""The report in a real browser: all of it is drawn, asks for nothing, is legible on a phone, by day and by night."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIETLY = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
QUIETLY += ["--disable-background-networking", "--disable-component-update"]

LEGIBLE = 4.5
"""WCAG's contrast for text of ordinary size."""
VISIBLE = 3.0
"""WCAG's contrast for the marks of a chart."""

CONTRASTS = """() => {
  const numbers = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = ([r, g, b, a = 1], under) => [r, g, b].map((c, i) => a * c + (1 - a) * under[i]);
  const light = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
  const contrast = (a, b) => {
    const [x, y] = [luminance(a), luminance(b)];
    return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
  };
  const faded = (colour, share) => { const [r, g, b, a = 1] = numbers(colour); return [r, g, b, a * share]; };
  const ground = element => {
    if (!element) return [255, 255, 255];
    return over(numbers(getComputedStyle(element).backgroundColor), ground(element.parentElement));
  };
  const cellsUnder = (text, under) => {  // the cell of a grid that a number is printed on
    const box = text.getBoundingClientRect(), x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
    for (const cell of text.closest('svg').querySelectorAll('.mark-rect path, .mark-rect rect')) {
      const place = cell.getBoundingClientRect(), style = getComputedStyle(cell);
      if (place.left <= x && x <= place.right && place.top <= y && y <= place.bottom)
        return over(faded(style.fill, Number(style.fillOpacity)), under);
    }
    return under;
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), svg = element.closest('svg');
    let under = ground(svg ? svg.parentElement : element);
    if (svg) under = cellsUnder(element, under);
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    texts.push({text, size: parseFloat(style.fontSize) * scale,
                contrast: contrast(over(numbers(svg ? style.fill : style.color), under), under)});
  }
  const marks = [];
  for (const mark of document.querySelectorAll('.role-mark path, .role-mark line')) {
    const style = getComputedStyle(mark), paint = style.stroke === 'none' ? style.fill : style.stroke;
    const under = ground(mark.closest('svg').parentElement);
    if (!mark.closest('.mark-rect, .mark-area, .mark-text')) marks.push(contrast(over(numbers(paint), under), under));
  }
  return {texts, marks};
}"""

DRAWN = """() => [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const inside = e => { const b = e.getBoundingClientRect();
    return b.left >= box.left - 1 && b.right <= box.right + 1 && b.top >= box.top - 1 && b.bottom <= box.bottom + 1; };
  const shown = [...svg.querySelectorAll('text')].filter(e => e.getAttribute('opacity') !== '0');
  const texts = shown.map(e => [e.textContent, e.getBoundingClientRect()]);
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
  const overlapping = texts.flatMap(([a, x], i) =>
    texts.slice(i + 1).filter(([, y]) => meet(x, y)).map(([b]) => [a, b]));
  const marks = [...svg.querySelectorAll('.role-mark path, .role-mark line, .role-mark rect')];
  return {name: figure.id, width: box.width, height: box.height, page: figure.getBoundingClientRect().width,
          outside: [...marks, ...shown].filter(e => !inside(e)).map(e => e.outerHTML),
          marks: marks.length, overlapping};
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=QUIETLY)
        yield opened
        opened.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def page(browser: Browser, scheme: Any, reported_once: Path) -> Iterator[Page]:
    """The report on a phone, after it has said and asked for everything that it wants."""
    opened = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    opened.goto((reported_once / "results" / "report" / "index.html").as_uri())
    yield opened
    opened.close()


def test_the_page_asks_for_nothing_but_itself_and_complains_of_nothing(browser: Browser, reported_once: Path) -> None:
    page = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.on("request", lambda request: asked.append(request.url))
    address = (reported_once / "results" / "report" / "index.html").as_uri()
    page.goto(address, wait_until="networkidle")
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]


def test_every_chart_is_drawn_inside_its_box_on_a_phone(page: Page, reported_once: Path) -> None:
    charts = page.evaluate(DRAWN)
    files = {path.stem for path in (reported_once / "results" / "report").glob("*.csv")}
    assert {chart["name"] for chart in charts} == files
    assert len(files) >= 10
    for chart in charts:
        assert chart["marks"] > 0, chart
        assert 300 <= chart["width"] <= chart["page"], chart
        assert chart["height"] >= 60, chart
        assert chart["outside"] == [], chart
        assert chart["overlapping"] == [], chart


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_scrolls_sideways_but_tables_and_settings(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_every_text_is_legible_and_every_mark_stands_out_by_day_and_by_night(page: Page, scheme: str) -> None:
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    found = page.evaluate(CONTRASTS)
    assert len(found["texts"]) > 200
    assert [text for text in found["texts"] if text["contrast"] < LEGIBLE] == []
    assert [text for text in found["texts"] if text["size"] < 10.5] == []
    assert len(found["marks"]) > 50
    assert min(found["marks"]) >= VISIBLE


def test_the_data_below_a_chart_is_the_same_in_the_page_as_in_the_file(page: Page, reported_once: Path) -> None:
    import base64

    for figure in page.query_selector_all("figure"):
        beside, within = figure.query_selector_all("a")
        file = reported_once / "results" / "report" / str(beside.get_attribute("href"))
        assert base64.b64decode(str(within.get_attribute("href")).partition("base64,")[2]) == file.read_bytes()
