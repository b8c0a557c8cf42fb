"""What the pages say is there: commands, paths, recipes, fields, targets, links, and the tree."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tools import make_shards
from vlm.config import override
from vlm.recipe import Recipe, load, names

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")])
# The parts of the README that name what is missing.
MISSING = set(re.findall(r"`([^`]+)`", "".join(line for line in README.splitlines() if "not here yet" in line)))

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page: Path) -> list[list[str]]:
    """Indented lines that call a program of ours, continued lines joined; the originals' own are left out."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    found = [
        shlex.split(line) for line in re.findall(r"^    (\S.*)$", text, re.M) if "launch/" in line or "tools/" in line
    ]
    return [words for words in found if words[0] in ("python", "deepspeed", ".venv/bin/python")]


@cache
def paths_of_fields() -> frozenset[str]:
    """Every dotted path of every recipe."""

    def walk(value: Any, stem: str) -> set[str]:
        found = set()
        for f in fields(value):
            found.add(f"{stem}{f.name}")
            if is_dataclass(getattr(value, f.name)):
                found |= walk(getattr(value, f.name), f"{stem}{f.name}.")
        return found

    return frozenset(path for name in names() for path in walk(load(name), ""))


def test_pages_have_commands() -> None:
    assert len(commands(REPOSITORY / "README.md")) >= 5
    assert len(commands(REPOSITORY / "docs" / "migrating.md")) >= 3


@pages
def test_commands_would_start(page: Path) -> None:
    for words in commands(page):
        script = next(word for word in words if word.endswith(".py"))
        assert (REPOSITORY / script).is_file(), words
        after = words[words.index(script) + 1 :]
        options = {after[i]: after[i + 1] for i in range(len(after) - 1) if after[i].startswith("--")}
        source = (REPOSITORY / script).read_text() + (REPOSITORY / "vlm" / "run" / "command.py").read_text()
        for option in [word for word in after if word.startswith("--")]:
            assert f'"{option}"' in source, f"{script} has no option {option}"
        if "--deepspeed_config" in options:
            assert (REPOSITORY / options["--deepspeed_config"]).is_file()
        if "--recipe" in options:
            changed = [word for word in after if "=" in word and not word.startswith("-")]
            assert isinstance(override(load(options["--recipe"]), changed), Recipe)
        if script == "tools/make_shards.py":
            assert after[0] in (*make_shards.available_sources(), "SOURCE")


@pages
def test_paths_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for path in re.findall(r"`((?:vlm|tools|launch|tests|docs|ds_configs|requirements)/[\w./-]+)`", text):
        assert (REPOSITORY / path).exists() or path in MISSING, f"{page.name} names {path}"
    for path in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (page.parent / path).exists(), f"{page.name} links to {path}"


@pages
def test_links_within_a_page(page: Path) -> None:
    text = page.read_text()
    titles = {re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in re.findall(r"^#+ (.*)$", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= titles


# In convert.md `model.…` also names attributes of a torch module.
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "convert.md"], ids=lambda page: page.name)
def test_fields_exist(page: Path) -> None:
    heads = "model|inputs|data|optim|eval"
    for path in re.findall(rf"`((?:{heads})\.[a-z_.]+)(?:=[^`]*)?`", page.read_text()):
        assert path in paths_of_fields(), f"{page.name} names the field {path}"


def test_what_is_missing_is_missing() -> None:
    """A part that has come must leave the list of parts that are not here."""
    for name in MISSING - {"srun"}:
        if name.startswith("make "):
            assert f"\n{name.removeprefix('make ')}:" not in (REPOSITORY / "Makefile").read_text(), name
        else:
            assert not (REPOSITORY / name).exists(), name


def test_recipes_are_those_there_are() -> None:
    table = README.split("| recipe | what | needs |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+\.\w+)`", table)) == set(names())


def test_targets_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for page in PAGES:
        for name in set(re.findall(r"`make ([a-z-]+)", page.read_text())):
            assert name in targets or f"make {name}" in MISSING, f"{page.name} names make {name}"
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    assert set(phony) == targets


def test_tree_is_the_tree() -> None:
    """Every path of the tree exists, and every tracked folder and file of floor 1 is in it."""
    tree = README.split("## The tree")[1].split("```")[1]
    named = [line.split()[0] for line in tree.strip().splitlines()]
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
    for folder in ("launch", "tools"):
        line = next(line for line in tree.splitlines() if line.startswith(f"{folder}/"))
        scripts = {path.name for path in (REPOSITORY / folder).iterdir() if path.suffix in (".py", ".sh")}
        assert set(re.findall(r"\S+\.(?:py|sh)", line)) == scripts
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    parts = {path.split("/")[0] + "/" for path in tracked.split() if "/" in path and path[0] != "."} - {"vlm/"}
    parts |= {
        f"vlm/{path.split('/')[1]}{'/' * (path.count('/') > 1)}" for path in tracked.split() if path.startswith("vlm/")
    }
    assert parts - {"vlm/__init__.py"} <= set(named)


def test_nine_packages_are_used_where_it_says() -> None:
    table = README.split("Where each of the nine packages is used:")[1].split("\n\n")[1]
    rows = re.findall(r"^\| ([\w-]+) \| (.*) \|$", table, re.M)[1:]
    assert len(rows) == 9
    for package, where in rows:
        for path in re.findall(r"`(vlm/[\w./]+)`", where):
            imported = package.replace("-", "_")
            assert re.search(rf"(import|from) {imported}\b", (REPOSITORY / path).read_text()), f"{path}: no {package}"


def test_json_files_parse_and_are_named() -> None:
    for path in (REPOSITORY / "ds_configs").glob("*.json"):
        json.loads(path.read_text())
        assert f"`ds_configs/{path.name}`" in README
