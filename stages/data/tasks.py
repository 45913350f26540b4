"""lm-eval's tasks: where prompts for training come from and what evaluation scores.

A task file in the workspace's tasks/ comes first, by its name or its file's; lm-eval's own tasks are read only when a
name is not found there, since that takes seconds. Relative data_files are meant from the workspace.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.utils
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # the only reader that knows include and !function

from stages.data.row_files import check_json_lines
from stages.data.rows import Row
from stages.files import faults, reading, seclusion
from stages.parties.agreed import check_tasks
from stages.runtime import quiet
from stages.runtime.errors import NotReady, UsageProblem
from stages.runtime.events import Event, Report, ignore
from stages.workspace import shipped_tasks, task_data, task_files
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace


def _sandbox() -> ImmutableSandboxedEnvironment:
    """lm-eval's own way to render templates, but without a way out of them."""
    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null)
    sandbox.filters["regex_replace"] = lm_eval.utils.regex_replace
    for name in ("lipsum", "cycler", "joiner"):  # objects with a module behind them, of no use in a prompt
        del sandbox.globals[name]
    # lm-eval compiles a template for each question that it renders: most of the time that loading a task would take.
    sandbox.from_string = functools.lru_cache(maxsize=1024)(sandbox.from_string)  # type: ignore[assignment]
    return sandbox


def _not_null(value: object) -> object:
    """What a template prints. Raises TemplateError for null, which would be printed as the word None."""
    if value is None:
        raise TemplateError("a field is null, where its template prints it")
    return value


lm_eval.utils.env = _sandbox()  # all templates are rendered by this one

HARMLESS = (
    r"already-initialized model|`pretrained` model kwarg"  # as we want it
    r"|Combined length of context|Left truncation applied"  # counted as cut
    r"|is defined, but (aggregation|higher_is_better) is not"  # the metric's own are taken
    r"|fewshot_(docs|split)"  # scored zero-shot
)
"""lm-eval's warnings that change no score, or that are told otherwise."""

MISTAKES = (
    *(TemplateError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError, MemoryError),
    AssertionError,
)
"""What a template that does not fit its data, or a null in them, makes jinja and lm-eval raise."""

ANSWER = "correct doc_to_target or doc_to_choice in its task file (an index counts from 0), or its data"
TRAINABLE = ("multiple_choice", "generate_until")


def load(workspace: Workspace, names: list[str], report: Report = ignore) -> list[ConfigurableTask]:
    """These tasks, groups resolved into theirs. Raises UsageProblem for a name that nothing defines."""
    reading.check_plain(workspace.tasks)
    check_tasks(workspace, may_be_absent=False)
    task_files.check_are_data(workspace.tasks, workspace.home, trusted=workspace.machine.run_task_code)
    with quiet.libraries(), quiet.telling(report, "lm_eval", but_for=HARMLESS):
        return _load(workspace, names)


def _load(workspace: Workspace, names: list[str], above: tuple[str, ...] = ()) -> list[ConfigurableTask]:
    local = TaskManager(include_path=str(workspace.tasks), include_defaults=False)
    tasks: list[ConfigurableTask] = []
    for name in names:
        manager = _manager_of(workspace, local, name)
        entry = manager.task_index[name]
        members = _members(entry) if manager is local else []
        if members and all(isinstance(member, str) for member in members):
            if name in above:
                message, mend = (
                    f"the group {name} is a member of itself",
                    "name tasks, or other groups, in its task file",
                )
                raise UsageProblem(message, where=entry.yaml_path, mend=mend)
            tasks += _load(workspace, members, (*above, name))  # one by one, each with its own data
            continue
        spec: Any = name
        if manager is local and entry.yaml_path is not None and entry.kind.name == "TASK":
            spec = task_data.from_workspace(load_yaml(entry.yaml_path), workspace.home)
        tasks += _built(manager, spec, name)
    return tasks


def check_known(workspace: Workspace, names: Sequence[str]) -> None:
    """Raise UsageProblem for a name that nothing defines, before anything is loaded."""
    for name in names:
        _manager_of(workspace, TaskManager(include_path=str(workspace.tasks), include_defaults=False), name)


def _manager_of(workspace: Workspace, local: TaskManager, name: str) -> TaskManager:
    manager: TaskManager | None = local if name in local.task_index else shipped_tasks.manager_of(name)
    if manager is None:
        known = ", ".join(map(str, local.all_tasks)) or "none"
        mend = f"known in this workspace: {known}; or put a task file in {workspace.shown(workspace.tasks)}/"
        raise UsageProblem(f"no task named {name!r}, here or in lm-eval", where=workspace.tasks, mend=mend)
    return manager


def _members(entry: Any) -> list[Any]:
    """What a group or a tag stands for; nothing for a task."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    return list(load_yaml(entry.yaml_path)["task"]) if entry.kind.name == "GROUP" else []


def training_rows(task: ConfigurableTask) -> list[Row]:
    """The task's training documents as rows: its own prompt, delimiter and right answer. Label: the answer's index."""
    name = str(task.config.task)
    if task.OUTPUT_TYPE not in TRAINABLE or getattr(task, "multiple_input", False):
        message = f"task {name} is of type {task.OUTPUT_TYPE}; rows can be made from {' and '.join(TRAINABLE)}"
        raise UsageProblem(message, mend="choose another task, or bring JSONL rows")
    if not task.has_training_docs():
        raise UsageProblem(f"task {name} has no training split", mend="set training_split in its task file")
    rows, number = list[Row](), 0
    try:
        for number, doc in enumerate(task.training_docs(), 1):
            rows.append(_row(task, doc, name, number))
        number = 0
        _check_meaning(task, task.training_docs())
    except MISTAKES as error:
        raise mistaken(name, error, number=number) from error
    return rows


def test_prompts(task: ConfigurableTask) -> Iterator[str]:
    """The prompts that evaluation will score."""
    number = 0
    try:
        for number, doc in enumerate(task.eval_docs, 1):  # noqa: B007
            yield str(task.fewshot_context(doc, num_fewshot=0))
    except MISTAKES as error:
        raise mistaken(str(task.config.task), error, number=number) from error


def _row(task: ConfigurableTask, doc: dict[str, Any], name: str, number: int) -> Row:
    prompt = str(task.fewshot_context(doc, num_fewshot=0))
    if task.OUTPUT_TYPE == "multiple_choice":
        index = right_choices(task, doc, number)[0]
        # The very request that lm-eval scores for the right choice.
        prompt, completion = task.construct_requests(doc, prompt)[index].args[:2]
        return Row(prompt, completion, label=str(index), source=name)
    return Row(prompt, f"{task.config.target_delimiter}{_right_texts(task, doc, number)[0]}", label="", source=name)


def check_answers(task: ConfigurableTask, report: Report = ignore, *, shots: int = 0) -> None:
    """Raise UsageProblem, naming a question, where it has no text or no answer that lm-eval could find right.

    Tells of questions whose right answer is the text of another choice too: which of the two wins is an accident.
    shots: how many examples the agreement puts before a question.
    """
    alike = number = 0
    try:
        for number, doc in enumerate(task.eval_docs, 1):
            if task.doc_to_text(doc) is None:
                raise _bad_question(task, number, "its text is null", "doc_to_text")
            if task.OUTPUT_TYPE == "multiple_choice":
                right, choices = right_choices(task, doc, number), task.doc_to_choice(doc)
                alike += any(
                    choices.count(choices[index]) > sum(choices[index] == choices[i] for i in right) for index in right
                )
            elif task.OUTPUT_TYPE in ("generate_until", "loglikelihood"):
                _right_texts(task, doc, number)
        number = 0
        _check_meaning(task, task.eval_docs)
    except MISTAKES as error:
        raise mistaken(str(task.config.task), error, number=number) from error
    name = task.config.task
    if task.config.metric_list == []:
        raise UsageProblem(
            f"task {name} names no metric", mend="correct metric_list in its task file: acc, acc_norm, ..."
        )
    if alike:
        words = f"{alike} questions of {name} have a choice that reads like the right one and counts as wrong"
        report(Event("warning", words))
    wanted = task.config.num_fewshot
    if wanted and wanted != shots:
        scored = f"with {shots}, by evaluation.num_fewshot" if shots else "without"
        report(Event("warning", f"{name} asks for {wanted} examples before each question; it is scored {scored}"))
    if shots and wanted == 0:
        report(Event("warning", f"{name} says that it has no examples before a question, and is scored without"))


def right_choices(task: ConfigurableTask, doc: dict[str, Any], number: int) -> list[int]:
    """The indexes, from 0, of the choices that are right: one, mostly."""
    choices, several = task.doc_to_choice(doc), bool(getattr(task, "multiple_input", False))
    target = task.doc_to_text(doc) if several else task.doc_to_target(doc)
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise _bad_question(task, number, f"its choices are {choices!r}, not a list of texts")
    named = target if isinstance(target, list) else [target]
    if isinstance(target, list) and not all(isinstance(one, int) for one in named):
        raise _bad_question(task, number, f"its right answers are {target!r}; of several, lm-eval takes indexes only")
    if bool(getattr(task, "multiple_target", 0)) != isinstance(target, list):
        raise _bad_question(task, number, "one right answer and a list of them are mixed in one task")
    found = [choices.index(one) if isinstance(one, str) and one in choices else one for one in named]
    if not found or not all(isinstance(one, int) and 0 <= one < len(choices) for one in found):
        raise _bad_question(task, number, f"its right answer {target!r} is none of its {len(choices)} choices")
    return list(map(int, found))  # of yes and no, true is 1


def _check_meaning(task: ConfigurableTask, docs: Iterable[dict[str, Any]]) -> None:
    """Raise UsageProblem where every right answer is a text of its choices, but lm-eval takes it as an index.

    So it does with a template that gives a number; a column of texts it takes as texts.
    """
    rendered = task.config.doc_to_target
    if task.OUTPUT_TYPE != "multiple_choice" or not isinstance(rendered, str) or rendered in task.features:
        return
    asked = [(task.doc_to_target(doc), task.doc_to_choice(doc)) for doc in docs]
    if not all(isinstance(target, int) and str(target) in choices for target, choices in asked):
        return
    for number, (target, choices) in enumerate(asked, 1):
        if choices[target] != str(target):
            words = f"its right answer {target!r} may be an index or the text of another choice"
            raise _bad_question(task, number, f"{words}; name a column as doc_to_target, of numbers or of texts")


def _right_texts(task: ConfigurableTask, doc: dict[str, Any], number: int) -> list[str]:
    """The answers that are right, to be generated."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[right_choices(task, doc, number)[0]]
    found = [str(one) for one in (target if isinstance(target, list) else [target]) if one is not None]
    if not found or not found[0].strip():
        raise _bad_question(task, number, f"its right answer is {target!r}, no text")
    return found


def _bad_question(
    task: ConfigurableTask, number: int, found: str, keys: str = "doc_to_target or doc_to_choice"
) -> UsageProblem:
    mend = f"correct {keys} in its task file (an index counts from 0), or its data"
    return UsageProblem(f"question {number} of task {task.config.task}: {found}", mend=mend)


def _built(manager: TaskManager, spec: Any, name: str) -> list[ConfigurableTask]:
    where = manager.task_index[name].yaml_path
    try:
        kwargs = (spec.get("dataset_kwargs") or {}) if isinstance(spec, dict) else {}
        cache = Path(kwargs.get("cache_dir") or ".")
        if seclusion.is_private(cache):
            seclusion.make_folder(cache)
        with seclusion.shutting_out(cache):
            return list(manager.load([spec])["tasks"].values())
    except OSError as error:  # a ConnectionError too
        if error.errno in faults.UNWRITABLE or _is_of_cache(error, kwargs.get("cache_dir")):
            what = f"task {name}: its data cannot be read, or the cache of datasets not be written"
            raise faults.unwritable_cache(what, error) from error
        if isinstance(error, FileNotFoundError):
            message = f"the data of task {name} is not there: {error}"
            mend = "put it there, or check data_files in its task file"
            raise NotReady(message, where=where, mend=mend) from error
        mend = (
            f"`{Command('prefetch')}` where there is a network, "
            "or point its task file at local files (see the workspace README)"
        )
        raise NotReady(f"the dataset of task {name} cannot be loaded: {error}", where=where, mend=mend) from error
    except IndexError as error:  # it looks at the first question while it makes the task
        message = f"question 1 of task {name}: its right answer is none of its choices, or it has none"
        raise UsageProblem(message, where=where, mend=ANSWER) from error
    except Exception as error:  # whatever a mistake in a task file makes lm-eval, datasets or jinja raise
        for path in task_files.data_files(spec):
            if path.suffix == ".jsonl":
                check_json_lines(path)
        raise mistaken(name, error, where) from error


def _is_of_cache(error: OSError, cache: str | None) -> bool:
    """Whether it is the cache of datasets that is not there, as behind a link to nothing, rather than the data."""
    from datasets import config

    place, whole = Path(str(error.filename)), Path(cache or config.HF_DATASETS_CACHE)
    return error.errno is not None and (place.is_relative_to(whole) or whole.is_relative_to(place))


def mistaken(name: str, error: BaseException, where: Path | None = None, number: int = 0) -> UsageProblem:
    """What to say of a task, or of one of its questions, that lm-eval, datasets or jinja cannot make sense of."""
    while error.__cause__ is not None:  # datasets says that something went wrong, and what did below it
        error = error.__cause__
    place = f", at question {number}" if number else ""
    message = f"task {name} cannot be used{place}: {type(error).__name__}: {error}"
    return UsageProblem(message, where=where, mend="correct its task file, or the data that it names")
