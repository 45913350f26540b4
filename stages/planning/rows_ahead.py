"""The rows and questions that a plan counts: those that lie here, and where nobody has any, those that prepare deals.

Tasks are read from the disk alone: the hub is not asked. Writes nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from stages.bases import base_folders
from stages.data.examples import Extent, Tokenizer, encode_row, extent_of
from stages.data.prepare import dealt
from stages.data.row_files import read_rows
from stages.data.rows import Row
from stages.runtime.errors import Damaged, Problem
from stages.workspace.paths import Workspace

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

    from stages.workspace.rows_and_scores import Evaluation


class RowsAhead:
    """Of one workspace; each file is read, and each task loaded, once."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._read: dict[Path, list[Row]] = {}
        self.refused: dict[Path, Damaged] = {}
        """Of what was read, why a file's rows would be refused."""

    @functools.cached_property
    def dealt(self) -> dict[Path, list[Row]]:
        """What prepare would write, where it is to be given yet and its sources are here; else nothing."""
        workspace = self.workspace
        places = [workspace.auxiliary_data, *map(workspace.client_data, workspace.clients)]
        data = workspace.agreement.data
        if any(place.exists() for place in places) or not (workspace.is_simulation and (data.tasks or data.files)):
            return {}
        try:
            with base_folders.offline():
                return dealt(workspace)[0]
        except (Problem, OSError):  # it is among the missing, or prepare says it
            return {}

    def of(self, path: Path, *, unlabelled: bool = False) -> list[Row] | None:
        """The rows of a file, there or to come; None where neither, and none where they would be refused."""
        if not path.exists():
            return self.dealt.get(path)
        if path not in self._read:
            try:
                self._read[path] = read_rows(path, unlabelled=unlabelled)[0]
            except Damaged as problem:
                self._read[path], self.refused[path] = [], problem
        return self._read[path]

    def extent(self, paths: Iterable[Path], tokenizer: Tokenizer | None, *, unlabelled: bool = False) -> Extent | None:
        """How many rows these files have, and the longest in tokens, if that is known; None if there is no row."""
        found = [rows for path in paths if (rows := self.of(path, unlabelled=unlabelled))]
        return extent_of(found, tokenizer)

    def questions(self, tokenizer: Tokenizer | None) -> int | None:
        """Tokens of the longest question that is scored, with the longest of its choices; None if that is not known."""
        if tokenizer is None or not self._asked:
            return None
        return max(len(encode_row(row, tokenizer).input_ids) for row in self._asked)

    @functools.cached_property
    def _asked(self) -> list[Row]:
        """Each question that is scored, with the choice of the most letters."""
        from stages.data import tasks

        try:
            with base_folders.offline():
                loaded = tasks.load(self.workspace, self.workspace.scored_tasks)
            return [row for task in loaded for row in _longest(task, self.workspace.evaluation)]
        except (Problem, OSError, *tasks.MISTAKES):  # evaluate says it
            return []


def _longest(task: ConfigurableTask, settings: Evaluation) -> Iterable[Row]:
    before = {"num_fewshot": settings.num_fewshot, "system_instruction": settings.system_prompt}
    for doc in itertools.islice(task.eval_docs, settings.limit):
        prompt = str(task.fewshot_context(doc, **before))
        if task.OUTPUT_TYPE != "multiple_choice":
            yield Row(prompt, None)
            continue
        asked = [one.args for one in task.construct_requests(doc, prompt)]
        yield Row(*max(asked, key=lambda pair: len(pair[0]) + len(pair[1])))
