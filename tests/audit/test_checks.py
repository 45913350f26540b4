"""checks: what a finding says, which are shown, and the exit code that they come to."""

from __future__ import annotations

import pytest

from stages.audit.checks import Check, exit_code, lines, result, told

X = Check("A1", "chain")
SUMMARY, DETAIL, MORE = X.ok("all well"), X.ok("well", where="a"), X.ok("well", where="b", measured={"norm": 1.0})
WARN, FAIL, SKIP = X.warn("a", "odd", "even"), X.fail("b", "gone"), X.skip("no keys")


def test_a_finding_is_a_sentence_of_where_found_and_expected() -> None:
    assert WARN.text == "a: odd; expected even"
    assert FAIL.text == "b: gone"
    assert SKIP.text == "no keys"
    assert MORE.as_json() == {
        **{"id": "A1", "level": "OK", "check": "chain", "where": "b", "found": "well", "expected": ""},
        **{"text": "b: well", "measured": {"norm": 1.0}},
    }


def test_no_summary_stands_beside_a_problem_or_a_single_detail() -> None:
    assert told([DETAIL, MORE, SUMMARY]) == [DETAIL, MORE, SUMMARY]
    assert told([DETAIL, SUMMARY]) == [DETAIL]
    assert told([DETAIL, MORE, WARN, SUMMARY]) == [DETAIL, MORE, WARN]
    assert told([SKIP, SUMMARY]) == [SKIP, SUMMARY]


def test_people_are_shown_problems_gaps_and_one_line_of_what_is_well() -> None:
    assert lines([DETAIL, MORE, SKIP, SUMMARY]) == [SKIP, SUMMARY]
    assert lines([DETAIL]) == [DETAIL]
    assert lines([DETAIL, MORE, FAIL]) == [FAIL]


@pytest.mark.parametrize(
    ("findings", "strict", "code", "last"),
    [
        ([SUMMARY, SKIP], True, 0, "result: clean (exit 0)"),
        ([WARN, WARN], False, 0, "result: 2 warnings (exit 0)"),
        ([WARN], True, 10, "result: 1 warning (exit 10)"),
        ([WARN, FAIL, FAIL], True, 4, "result: 2 failures, 1 warning (exit 4)"),
    ],
)
def test_failures_are_4_and_warnings_10_if_strict(findings: list, strict: bool, code: int, last: str) -> None:  # type: ignore[type-arg]
    assert exit_code(findings, strict=strict) == code
    assert result(findings, strict=strict) == last
