"""What `evaluate --rows` keeps: how well a model knows the answers of rows of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from stages.artefacts.records import unstamped


class WrittenScores(TypedDict):
    """How what the model writes itself compares with the answers."""

    generated_match: float  # the share of rows whose generated text is the answer's
    rouge_l: float  # mean F-measure of the longest common subsequence of words
    most_tokens: int  # that were generated for a row
    until: str | None  # where generated text was cut, if it did not end before


class RowScores(TypedDict):
    """Of all rows together; no text of a row."""

    rows: int  # that were scored
    rows_left_out: NotRequired[int]  # too long for the model
    tokens: int  # of answers
    loss: float  # nats per answer token
    perplexity: float
    exact_match: float  # the share of rows of which each answer token is the likeliest
    written: NotRequired[WrittenScores]


class MeasuredRows(TypedDict):
    """What scoring gave, and with which precision and libraries."""

    weights_dtype: str
    versions: dict[str, str]
    scores: RowScores


class AskedRows(TypedDict):
    """What decides the scores: two results that agree on it are the same result."""

    subject: str  # slm, llm, aggregate or client-k
    round: int | None  # None: the base alone
    rows: str  # the file, as seen from the workspace
    rows_sha256: str
    adapter_sha256: str | None
    manifest_sha256: str | None
    base: dict[str, Any]  # as a BaseIdentity
    dtype: str
    precision: str
    batch_size: int
    generate: bool


class RowsResult(AskedRows, MeasuredRows):
    """results/own-rows/*/*.json, but for the digest."""


def read_rows_result(path: Path) -> RowsResult:
    """A result, without its digest. Raises Damaged if it is not as it was written."""
    return cast(RowsResult, unstamped(path))
