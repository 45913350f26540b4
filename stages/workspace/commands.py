"""Command lines as values: `status` and messages print them, `next` runs them. They are spelled here alone.

str(Command("client-train", client=2, round=5)) is "fedcollm client-train --client 2 --round 5".
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

Value = str | int | Path | EllipsisType | tuple[str, ...] | None
"""What an option is given. True: a flag. False or None: the option is left out. A tuple: the option once for each of
its items. `...`: what the reader is to fill in."""


@dataclass(frozen=True, init=False)
class Command:
    """One call of the program.

    options: by their names in Python, as stages take them: i_understand_reset is --i-understand-reset. They are printed
    in the order given.
    """

    verb: str
    arguments: tuple[Value, ...]
    options: Mapping[str, Value]

    def __init__(self, verb: str, *arguments: Value, **options: Value) -> None:
        object.__setattr__(self, "verb", verb)
        object.__setattr__(self, "arguments", arguments)
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        object.__setattr__(self, "options", given)

    def also(self, **options: Value) -> Command:
        """The same with further options, such as overwrite=True or workspace=folder."""
        return Command(self.verb, *self.arguments, **{**self.options, **options})

    def __str__(self) -> str:
        """The line to paste into a shell."""
        words = ["fedcollm", self.verb, *map(_word, self.arguments)]
        for name, value in self.options.items():
            for one in value if isinstance(value, tuple) else (value,):
                words += [f"--{name.replace('_', '-')}", *([] if one is True else [_word(one)])]
        return shlex.join(words)


def _word(value: Value) -> str:
    return "..." if value is ... else str(value)
