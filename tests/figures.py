"""The size and the order of the code: python tests/figures.py [CHECKOUT]. Needs no library."""

from __future__ import annotations

import ast
import functools
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("stages", "fedcollm_cli")


@dataclass(frozen=True)
class Code:
    """Modules by their dotted name, lines of each and of every function, and what each imports of the others."""

    modules: dict[str, int]
    functions: dict[str, int]
    imports: dict[str, set[str]]


def read(checkout: Path) -> Code:
    """Every module of both packages; an __init__.py without any code is none."""
    paths = {
        ".".join(path.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((checkout / package).rglob("*.py"))
    }
    texts = {name: path.read_text() for name, path in paths.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    modules = {name: len(text.splitlines()) for name, text in texts.items() if len(trees[name].body) > 1}
    functions = {
        f"{name}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name in modules
        for node in ast.walk(trees[name])
        if isinstance(node, ast.FunctionDef)
    }
    return Code(modules, functions, {name: set(_imported(trees[name])) & set(modules) - {name} for name in modules})


def _imported(tree: ast.Module) -> list[str]:
    """What a module imports, anywhere in it, but for types alone; `from package import name` counts as both."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def longest_chain(imports: dict[str, set[str]]) -> list[str]:
    """The longest way down from module to module. Raises ValueError for a circle."""
    above: list[str] = []

    @functools.cache
    def chain(name: str) -> tuple[str, ...]:
        if name in above:
            raise ValueError(f"a circle of imports: {' > '.join([*above[above.index(name) :], name])}")
        above.append(name)
        below = max((chain(one) for one in sorted(imports[name])), key=len, default=())
        above.pop()
        return (name, *below)

    return list(max((chain(name) for name in sorted(imports)), key=len))


def floors(imports: dict[str, set[str]]) -> list[list[str]]:
    """The rooms of stages/, from those that import no other room; those of one floor do not know each other."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, others in imports.items():
        if name.startswith("stages."):
            rooms[name.split(".")[1]] |= {one.split(".")[1] for one in others if one.startswith("stages.")}
    found: list[list[str]] = []
    while left := set(rooms) - {room for floor in found for room in floor}:
        floor = sorted(room for room in left if not (rooms[room] - {room}) & left)
        if not floor:
            raise ValueError(f"a circle of rooms among {sorted(left)}")
        found.append(floor)
    return found


def told(what: str, sizes: dict[str, int]) -> str:
    """One line: how many, their median, ninth decile, and longest."""
    ordered, name = sorted(sizes.values()), max(sizes, key=lambda one: sizes[one])
    median, ninth = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.9))
    return f"{what}: {len(sizes)} of {sum(ordered)} lines, median {median}, p90 {ninth}, longest {sizes[name]} ({name})"


def main(checkout: Path) -> None:
    code = read(checkout)
    print(told("modules", code.modules))
    for package in PACKAGES:
        functions = {name: size for name, size in code.functions.items() if name.startswith(package)}
        print(told(f"functions of {package}", functions))
    chain = longest_chain(code.imports)
    print(f"longest import chain, {len(chain)} modules: {' > '.join(chain)}")
    print("rooms and steps, from the ground:")
    for number, floor in enumerate(floors(code.imports), 1):
        print(f"  {number:2} {' '.join(floor)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1])
