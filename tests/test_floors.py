"""Who may import whom: a file imports only from lower floors, or a lower file of its own folder. No circles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
WINGS = ("nn", "data", "sources", "metrics")
FLOORS = {
    "errors": 1,
    "types": 1,
    "config": 1,
    "distributed": 1,
    "files": 1,
    "weights": 1,
    "weight_files": 1,
    "rendezvous": 1,
    "starters": 1,
    "meeting": 1,
}
FLOORS |= {"tensor_files": 1, "checkpoint_folders": 1}
FLOORS |= {**dict.fromkeys(WINGS, 2), "models": 3, "recipe": 4, "recipes": 5, "run": 5, "web": 5}
OF_ALL_MODELS = ("system", "trained", "freezing", "generation", "quantised")
FILES = sorted(path for folder in ("vlm", "launch", "tools") for path in (REPOSITORY / folder).rglob("*.py"))
DYNAMIC_IMPORTS = {"vlm/recipe.py", "vlm/sources/common_loading.py"}  # a recipe, a source, by the name a user gives


def part_of(path: Path) -> str:
    """`vlm/data/video.py` -> data, `vlm/types.py` -> types, `tools/score.py` -> tools."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return parts[1] if parts[0] == "vlm" else parts[0]


def imports(path: Path) -> set[Path]:
    """The files of this repository that `path` imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert all(alias.name != "*" for alias in node.names), f"{path}:{node.lineno}: no star imports"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {REPOSITORY / f"{name.replace('.', '/')}.py" for name in names}
    return {file for file in files if file.exists()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_down(path: Path) -> None:
    own = part_of(path)
    for target in imports(path):
        other = part_of(target)
        says = f"{path.relative_to(REPOSITORY)} imports {target.relative_to(REPOSITORY)}"
        assert other in FLOORS, f"{says}: nothing imports from {other}"
        neighbours = path.parent == target.parent  # then it is a lower file of the folder if there is no circle
        below = FLOORS[other] <= FLOORS.get(own, 6) if neighbours else FLOORS[other] < FLOORS.get(own, 6)
        assert below, f"{says}: floor {FLOORS[other]} is not below floor {FLOORS.get(own, 6)}"
        concrete = other == "models" and target.stem not in OF_ALL_MODELS
        assert own != "run" or not concrete, f"{says}: run knows no concrete model"


def test_every_file_has_a_floor() -> None:
    assert {part_of(path) for path in FILES if path.stem != "__init__"} <= {*FLOORS, "launch", "tools"}


def test_no_circles() -> None:
    below = {path: imports(path) for path in FILES}
    while below:
        free = [path for path, targets in below.items() if not targets & below.keys()]
        assert free, f"these files import one another: {sorted(str(path.relative_to(REPOSITORY)) for path in below)}"
        for path in free:
            del below[path]


def test_init_files_are_empty() -> None:
    assert [path for path in FILES if path.stem == "__init__" and path.stat().st_size] == []


def test_dynamic_imports_are_the_known_ones() -> None:
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", "")) if isinstance(node, ast.Attribute | ast.Name) else ""
            if name in ("import_module", "__import__"):
                found.add(str(path.relative_to(REPOSITORY)))
    assert found == DYNAMIC_IMPORTS
