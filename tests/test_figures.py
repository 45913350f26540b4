"""tests/figures.py counts what is there, and finds circles."""

from __future__ import annotations

from pathlib import Path

import pytest

import figures

MODULES = {
    "stages/__init__.py": '"""The map."""\n',
    "stages/ground/stone.py": "SIZE = 1\n\n\ndef small() -> int:\n    return SIZE\n",
    "stages/above/wall.py": "from stages.ground import stone\n\n\nclass Wall:\n    def own(self) -> int:\n"
    "        height = 2\n        return stone.small() * height\n",
    "stages/step.py": "from stages.above.wall import Wall\nMADE = Wall()\n",
    "fedcollm_cli/main.py": "import stages.step\n\n\ndef main() -> None:\n    from stages.ground import stone\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_lines_are_counted_and_the_longest_chain_and_the_order_of_rooms_are_found(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures.main(checkout)
    assert capsys.readouterr().out.splitlines() == [
        "modules: 4 of 19 lines, median 5, p90 5, longest 7 (stages.above.wall)",
        "functions of stages: 2 of 5 lines, median 2, p90 2, longest 3 (stages.above.wall.own)",
        "functions of fedcollm_cli: 1 of 2 lines, median 2, p90 2, longest 2 (fedcollm_cli.main.main)",
        "longest import chain, 4 modules: fedcollm_cli.main > stages.step > stages.above.wall > stages.ground.stone",
        "rooms and steps, from the ground:",
        "   1 ground",
        "   2 above",
        "   3 step",
    ]


def test_a_circle_is_named(checkout: Path) -> None:
    with (checkout / "stages/ground/stone.py").open("a") as file:
        file.write("\n\ndef later() -> None:\n    import stages.step\n")
    imports = figures.read(checkout).imports
    with pytest.raises(ValueError, match=r"a circle of imports: stages\.ground\.stone > .* > stages\.ground\.stone"):
        figures.longest_chain({"stages.ground.stone": imports["stages.ground.stone"]} | imports)
    with pytest.raises(ValueError, match="a circle of rooms"):
        figures.floors(imports)


def test_this_checkout_has_no_circle(capsys: pytest.CaptureFixture[str]) -> None:
    figures.main(Path(__file__).parents[1])
    assert "longest import chain" in capsys.readouterr().out
