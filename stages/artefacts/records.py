"""What a workspace keeps beside its folders with manifests: results, private logs, rows, tasks, checkpoints, secrets.

Each is compared with the digest that was written with it. That notices damage and edits; who means to forge can write
the digest anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from pydantic import ValidationError

from stages.artefacts.manifest import BaseIdentity
from stages.files import reading
from stages.runtime.errors import Damaged
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace

DIGEST = "result_sha256"
ROBUST = "robust_acc"
"""The metric that says which questions were right under attack, beside lm-eval's own."""
EARLIER = ("subject", "round", "agreement_sha256", "adapter_sha256", "manifest_sha256", "base", "tasks_sha256", "dtype")
LATER = ("limit", "batch_size", "weights_dtype", "versions", "tasks")
MEND = f"score again: {Command('evaluate', ..., overwrite=True)}"


class TaskScores(TypedDict):
    """What one task's questions gave, as lm-eval scores them. Earlier versions wrote only what is required here."""

    metrics: dict[str, float]  # by lm-eval's name: acc, acc_stderr, ...
    questions: int  # that were scored
    questions_in_all: NotRequired[int]  # that the task has
    questions_sha256: NotRequired[str]  # of all that was asked
    cut: NotRequired[int]  # questions scored without their beginning
    correct: NotRequired[dict[str, str]]  # by metric that is 0 or 1: a digit for each question
    version: Any  # the task's own
    prompt: str
    num_fewshot: int


class Scored(TypedDict):
    """What decides the scores: two results that agree on it are the same result."""

    subject: str  # slm, llm, aggregate or client-k
    round: int | None  # None: the base alone
    agreement_sha256: str
    adapter_sha256: str | None
    manifest_sha256: str | None
    base: dict[str, Any]  # as a BaseIdentity
    tasks_sha256: str
    dtype: str
    limit: int | None  # questions of each task
    batch_size: int
    evaluation: NotRequired[dict[str, Any]]  # as an Evaluation, where it is another than the agreement has
    attack: NotRequired[dict[str, Any]]  # as an Attack, where ROBUST was measured


class Measured(TypedDict):
    """What scoring gave, and with which precision and libraries."""

    weights_dtype: str
    versions: dict[str, str]
    tasks: dict[str, TaskScores]


class Result(Scored, Measured):
    """results/*/*.json, but for the digest."""


def stamped(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result with the digest of all the rest of it."""
    return dict(result) | {DIGEST: reading.sha256(reading.json_bytes(dict(result)))}


def read_result(path: Path) -> Result:
    """A result, without its digest. Raises Damaged if it is not as it was written; an earlier version wrote none."""
    return cast(Result, unstamped(path, unnamed={*EARLIER, *LATER}))


def unstamped(path: Path, *, unnamed: Set[str] = frozenset()) -> dict[str, Any]:
    """The rest of what was stamped. Raises Damaged unless it is as it was written.

    unnamed: the keys that a record without a digest may have, as an earlier version wrote it.
    """
    result, _ = reading.read_json(path)
    named = result.pop(DIGEST, None)
    is_changed = named != reading.sha256(reading.json_bytes(result)) if named else bool(set(result) - unnamed)
    if is_changed:
        raise Damaged(f"{path.name} has been changed since it was written", where=path, mend=MEND)
    return result


def attack_of(result: Result) -> str:
    """The attack under which ROBUST was measured, in words; empty where there was none."""
    return ", ".join(f"{key} {value}" for key, value in result.get("attack", {}).items() if value is not None)


def is_current(result: Result, workspace: Workspace) -> bool:
    """Whether a result was made under the agreement, and under the settings of scoring, that are there now."""
    own = own_evaluation(workspace)
    return (
        result.get("agreement_sha256") == workspace.agreed_in(result.get("round")) and result.get("evaluation") == own
    )


def own_evaluation(workspace: Workspace) -> dict[str, Any] | None:
    """The settings of scoring where they are other ones than the agreement has."""
    is_agreed = workspace.evaluation == workspace.agreement.evaluation
    return None if is_agreed else workspace.evaluation.model_dump()


def is_of_base(result: Result, base: BaseIdentity) -> bool:
    """Whether a result is of this base model."""
    try:
        return BaseIdentity.model_validate(result.get("base")).is_of(base)
    except ValidationError:
        return False


def _check_copy(path: Path) -> None:
    """Raise Damaged unless a kept copy of the agreement has the digest that it is named by."""
    if not reading.sha256(reading.read_own(path)).startswith(path.stem):
        raise Damaged("is not the agreement that its name says", where=path, mend="remove it: it is a copy")
