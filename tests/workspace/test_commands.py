"""Command lines as values."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from stages.runtime.errors import NotReady
from stages.workspace.commands import Command


def test_a_command_prints_the_line_that_is_typed() -> None:
    assert str(Command("client-train", client=2, round=5)) == "fedcollm client-train --client 2 --round 5"
    assert str(Command("unpack", "FILE")) == "fedcollm unpack FILE"
    assert f"then `{Command('enroll')}`" == "then `fedcollm enroll`"


def test_options_stand_in_the_order_given_and_their_names_have_dashes() -> None:
    found = Command("client-train", round=1, i_understand_reset=True, client=2)
    assert str(found) == "fedcollm client-train --round 1 --i-understand-reset --client 2"


def test_what_is_none_or_false_is_left_out() -> None:
    assert str(Command("evaluate", zero_shot=False, client=None, model="slm")) == "fedcollm evaluate --model slm"
    assert Command("evaluate", client=None) == Command("evaluate")


def test_a_tuple_gives_the_option_once_for_each_and_dots_are_for_the_reader() -> None:
    assert str(Command("sweep", set=("a=1,2", "b=3"))) == "fedcollm sweep --set a=1,2 --set b=3"
    assert str(Command("evaluate", ..., overwrite=True)) == "fedcollm evaluate ... --overwrite"
    assert str(Command("join", client=2, fingerprint=...)) == "fedcollm join --client 2 --fingerprint ..."


@pytest.mark.parametrize("folder", ["my study", "it's", "$(rm x)", "a;b", "-w"])
def test_a_shell_reads_back_what_was_meant(folder: str) -> None:
    line = str(Command("audit", Path(folder)).also(workspace=Path(folder)))
    assert shlex.split(line) == ["fedcollm", "audit", folder, "--workspace", folder]


def test_also_adds_and_leaves_the_first_as_it_was() -> None:
    first = Command("run", method="fedavg")
    again = first.also(workspace=None).also(overwrite=True).also(overwrite=True)
    assert (str(first), str(again)) == ("fedcollm run --method fedavg", "fedcollm run --method fedavg --overwrite")


def test_a_command_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Command("run").verb = "sweep"  # type: ignore[misc]


def test_a_command_mends_a_problem() -> None:
    assert NotReady("absent", mend=Command("enroll")).mend == "fedcollm enroll"
    assert NotReady("absent").mend is None
