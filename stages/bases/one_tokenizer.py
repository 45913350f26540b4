"""Whether SLM and LLM have one tokenizer, as co-distill needs, by their files alone: nothing of them is loaded.

What these files cannot tell, such as how texts are split, models.vocabulary finds where the tokenizers are loaded.
"""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

from stages.bases import base_files, base_folders
from stages.bases.base_files import TOKENIZER_SETTINGS
from stages.runtime.errors import Problem, UsageProblem
from stages.workspace.commands import Command
from stages.workspace.paths import Workspace
from stages.workspace.settings import ROLES

WHOLE = TOKENIZER_SETTINGS[0]


def check(workspace: Workspace) -> None:
    """Raise UsageProblem if the method trains both models together, and their tokenizers are certainly two.

    Says nothing where one of them is not here, or cannot be read: who loads it tells that.
    """
    if not workspace.agreement.federation.distils:
        return
    folders = [base_folders.configuration(workspace, role) for role in ROLES]
    slm, llm = folders
    if slm is None or llm is None or _is_one_file(slm / WHOLE, llm / WHOLE):
        return
    try:
        ours, theirs = _tokens(slm), _tokens(llm)
    except (Problem, OSError):
        return
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            raise two_tokenizers(index, ours[index], theirs[index], where=llm)


def two_tokenizers(index: int, slm: str | None, llm: str | None, *, where: Path | str) -> UsageProblem:
    """What is said of tokenizers of which a token differs."""
    return unlike(f"the tokenizers differ: token {index} is {slm!r} for the SLM, {llm!r} for the LLM", where)


def unlike(message: str, where: Path | str) -> UsageProblem:
    """What is said of two models that cannot teach each other, and what to do."""
    made = Command("shear", layers=...)
    mend = f"mutual distillation needs one tokenizer: take both models from one family, or make a small one by `{made}`"
    return UsageProblem(message, where=where, mend=mend)


def _is_one_file(some: Path, other: Path) -> bool:
    return some.is_file() and other.is_file() and filecmp.cmp(some, other, shallow=False)


def _tokens(folder: Path) -> dict[int, str]:
    """The tokens of a tokenizer by their numbers, as far as its own files say."""
    whole = base_files.table_of(folder / WHOLE)
    model = whole.get("model")
    words: Any = model.get("vocab") if isinstance(model, dict) else None
    if not whole:
        words = base_files.table_of(folder / "vocab.json")
    found: dict[Any, Any] = {}
    if isinstance(words, dict):
        found |= {index: token for token, index in words.items() if isinstance(index, int)}
    elif isinstance(words, list):  # [token, score] each
        found |= {index: one[0] for index, one in enumerate(words) if isinstance(one, list) and one}
    added = whole.get("added_tokens")
    for one in added if isinstance(added, list) else ():
        if isinstance(one, dict) and isinstance(one.get("id"), int):
            found.setdefault(one["id"], one.get("content"))  # the vocabulary's own keep their numbers
    return {index: token for index, token in found.items() if isinstance(token, str)}
