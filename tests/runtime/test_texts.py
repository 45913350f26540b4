"""texts: whatever a text holds, it is one printable line, and in Markdown nothing but itself."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.table import Table

from fedcollm_cli.console import _Harmless
from stages.runtime.texts import Lines, in_line, in_markdown, lines, shown

ANY = st.text(st.characters(), max_size=40) | st.sampled_from(
    ["a\nresult: clean", "\x1b[2J", "[red]x", "\u202e", "\x85", "\r"]
)


@given(ANY)
def test_any_text_is_one_printable_line(text: str) -> None:
    for said in (in_line(text), shown(text), shown(f"{lines([text, text])}")):
        assert all(c.isprintable() for c in said)


@given(st.lists(ANY, min_size=1, max_size=5))
def test_lines_are_as_many_as_were_put_together(texts: list[str]) -> None:
    assert len(shown(lines(texts)).split("\n")) == len(texts)
    assert len(shown(lines([lines(texts), "end"])).split("\n")) == len(texts) + 1


@given(ANY)
def test_rich_prints_a_text_as_it_is_on_one_line(text: str) -> None:
    out = io.StringIO()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row(text)
    _Harmless(file=out, width=1000).print(Group(f"|{text}|", table))
    first, second, *rest = out.getvalue().split("\n")
    assert (first.rstrip(), rest) == (f"|{in_line(text)}|", [""])
    assert second.rstrip() == in_line(text).rstrip()


def test_a_plain_text_is_left_alone() -> None:
    assert in_line("mean(BA), 5 % [1, 2]") == "mean(BA), 5 % [1, 2]"
    assert in_markdown("arc_easy") == "arc_easy"
    assert in_markdown("<b>|`x`") == "\\<b\\>\\|\\`x\\`"
    assert shown(Lines("a\nb")) == "a\nb"
