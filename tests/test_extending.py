"""docs/extending_*.md are followed: what they tell to write is written, and what they tell to run is run.

A block of code whose first line is `# path` is the file at that path, or (diff) a change to it; `sh` blocks are
commands.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open

import vlm.metrics
import vlm.models
import vlm.recipes
import vlm.sources
from tools import make_shards, score
from vlm.data.rng import SampleRng
from vlm.data.shards import ShardSet
from vlm.metrics import own
from vlm.recipe import Recipe
from vlm.recipes import video_chatgpt
from vlm.types import Record, Visit

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = (vlm.metrics, vlm.models, vlm.recipes, vlm.sources)
DEBUG = video_chatgpt.debug().inputs
SHAPE = (DEBUG.num_video_tokens, DEBUG.frame_tokens, DEBUG.frame_dim)  # of the features of a video that it reads


class Block(NamedTuple):
    language: str
    path: str  # "": it is no file
    text: str


def blocks(page: str) -> list[Block]:
    """The code of a page of docs/."""
    found = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", (REPOSITORY / "docs" / page).read_text(), re.M | re.S):
        path = re.match(r"# (\S+)\n", text)
        found.append(Block(language, path[1] if path else "", text[path.end() :] if path else text))
    return found


def apply(page: str, root: Path) -> list[Path]:
    """Write and change the files of a page below `root`; returns them."""
    done = []
    for block in (block for block in blocks(page) if block.path):
        file = root / block.path
        file.parent.mkdir(parents=True, exist_ok=True)
        if block.language == "diff":
            lines = [line if line.strip() else f" {line}" for line in block.text.splitlines(keepends=True)]
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            text = file.read_text()
            assert text.count(before) == 1, f"{page}: what it changes in {block.path} is not there, or not once"
            file.write_text(text.replace(before, after))
        else:
            assert not file.exists(), f"{page}: {block.path} is there already"
            file.write_text(block.text)
        done.append(file)
    return done


def commands(page: str) -> list[list[str]]:
    return [shlex.split(line) for block in blocks(page) if block.language == "sh" for line in block.text.splitlines()]


def write_features(root: Path) -> None:
    folder = root / "data" / "assembly" / "features"
    folder.mkdir(parents=True)
    for number in range(1, 4):
        features = np.random.default_rng(number).standard_normal(SHAPE)
        np.save(folder / f"toy_{number:02d}.npy", features.astype("float16"))


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose vlm/… holds further files of the packages; the working directory."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    for package in PACKAGES:
        folder = tmp_path / package.__name__.replace(".", "/")
        folder.mkdir(parents=True)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        package, _, module = name.rpartition(".")
        if package in {one.__name__ for one in PACKAGES} and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
            delattr(sys.modules[package], module)


# Each page alone --------------------------------------------------------------------------------------------


def make_example(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Shards of the page on layouts; what the command printed."""
    apply("extending_dataset.md", root)
    write_features(root)
    (words,) = commands("extending_dataset.md")
    assert make_shards.main([*words[2:], "--workers", "1"]) == 0
    return capsys.readouterr().out


def test_a_layout(plugged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = make_example(plugged, capsys)
    (promised,) = (block.text.strip() for block in blocks("extending_dataset.md") if block.language == "text")
    for part in promised.split("…"):
        assert part.strip() in said
    shards = ShardSet(plugged / "data/assembly/shards/train")
    assert [shards.key(row) for row in range(len(shards))] == ["toy_01", "toy_02"]
    record = shards.read(0)
    assert record.annotation["segments"][1] == {"start": 30, "end": 142, "label": 1, "name": "take_wheel"}
    chat = record.annotation["chat"]
    assert chat[0]["answer"] == "<t:0>-<t:30> nothing\n<t:30>-<t:142> take wheel\n<t:142>-<t:300> screw wheel"
    assert {row["kind"] for row in chat} >= {"segments", "at", "order", "counts"}
    manifest = (plugged / "data/assembly/shards/train/manifest.json").read_text()
    assert "train.csv row 9, column 'start': 5.0 is before the end of take_wheel" in manifest
    (example,) = DEBUG.train(record, SampleRng(0), Visit(part=0))
    assert example.frame_tokens is not None
    assert example.frame_tokens.shape == SHAPE


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("toy_04,3.0,2.0,nothing", "column 'end': 2.0 is not after column 'start' (3.0)"),
        ("toy_04,1.0,2.0,sleep", "column 'action': 'sleep' is none of nothing, take_wheel"),
        ("toy_04,x,2.0,nothing", "column 'start'"),
    ],
)
def test_a_layout_names_what_is_wrong(plugged: Path, row: str, says: str) -> None:
    files = apply("extending_dataset.md", plugged)
    table = next(file for file in files if file.suffix == ".csv")
    table.write_text(table.read_text() + row + "\n")
    rejected = [item for item in module("vlm.sources.assembly").read(table.parent, "train") if hasattr(item, "reason")]
    assert [item.key for item in rejected] == ["toy_03", "toy_04"]
    assert says in rejected[1].reason
    assert "train.csv row 10" in rejected[1].reason


def module(name: str) -> ModuleType:
    importlib.invalidate_caches()
    return importlib.import_module(name)


RUN = [
    {"truth": [[0, 40, "a"], [40, 90, "b"], [90, 120, "a"]], "prediction": [[0, 47, "a"], [47, 120, "b"]]},
    {"truth": [[0, 60, "a"], [60, 90, "b"]], "prediction": [], "problem": "not of the grammar"},
]


def write_run(folder: Path) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"key": f"v{n}", "text": "", "num_frames": row["truth"][-1][1], "kind": "", "video": f"v{n}", "question": "",
         "problem": "", "probes": {}, **row} for n, row in enumerate(RUN)]  # fmt: skip
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_metric(plugged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(REPOSITORY / "vlm/metrics/own.py", plugged / "vlm/metrics/own.py")
    apply("extending_metric.md", plugged)
    spec = importlib.util.spec_from_file_location("patched_own", plugged / "vlm/metrics/own.py")
    assert spec is not None
    assert spec.loader is not None
    patched = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "patched_own", patched)
    spec.loader.exec_module(patched)
    monkeypatch.setitem(own.OWN, "segments", patched.OWN["segments"])
    assert own.chosen_by("segments") == ("borders_found",)
    write_run(plugged / "runs/assembly")
    (words,) = commands("extending_metric.md")
    assert score.main(words[2:]) == 0
    assert "missing" in capsys.readouterr().out
    metrics = json.loads((plugged / "runs/assembly/metrics.json").read_text())
    assert metrics["borders_found"] == pytest.approx(1 / 3)  # 40 found at 47; 90, and 60 of what was not read, are not
    assert {"mof", "edit", "f1_10"} <= metrics.keys()
    assert score.main([*words[2:], "--check"]) == 0


def test_a_module(plugged: Path) -> None:
    """It begins as the model that it is in, learns, and its recipe is one."""
    apply("extending_module.md", plugged)
    recipes = module("vlm.recipes.neighbours")
    recipe: Recipe = recipes.debug()
    plain = video_chatgpt.debug()
    assert recipe.model.reach == 4
    assert {f: getattr(recipe.model, f) for f in plain.model.__dataclass_fields__} == {
        f: getattr(plain.model, f) for f in plain.model.__dataclass_fields__
    }
    assert isinstance(recipes.breakfast(), Recipe)
    with pytest.raises(ValueError, match=r"model\.reach is 0"):
        type(recipe.model)(reach=0)
    batch = _batch(recipe)
    losses = {}
    for name, config in (("plain", plain.model), ("ours", recipe.model)):
        torch.manual_seed(0)
        model: Any = config.build()
        losses[name] = sum(term.total for term in model(batch).values())
    assert torch.equal(losses["plain"], losses["ours"])
    losses["ours"].backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(trained) >= {"neighbours.weight", "neighbours.bias", "mm_projector.weight"}
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in trained.items() if name.startswith("neighbours"))
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= 0.1 * parameter.grad
        assert sum(term.total for term in model(batch).values()) != losses["ours"]


def _batch(recipe: Recipe) -> Any:
    inputs = recipe.inputs
    tokens = torch.randn(inputs.num_video_tokens, inputs.frame_tokens, inputs.frame_dim).half()
    record = Record(key="a", shard="", row=0, video=None, num_frames=300, fps=15.0, decoders=(), annotation={
        "name": "x", "segments": [], "chat": [{"kind": "segments", "question": "what?", "answer": "<t:0>-<t:300> a"}]},
        members={f"{inputs.features}.npy": _npy(tokens.numpy())})  # fmt: skip
    return inputs.collate(inputs.train(record, SampleRng(0), Visit(part=0)), SampleRng(0))


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# All of them, as a user would ---------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's programs, to be changed."""
    for name in ("vlm", "tools", "launch", "ds_configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.slow
def test_the_pages_one_after_another(copy: Path) -> None:
    """A layout, shards of it, a module that trains on them and is tested, and a metric of what it wrote."""
    write_features(copy)
    environment = {**os.environ, "PYTHONPATH": str(copy), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    said = {}
    for page in ("extending_dataset.md", "extending_module.md", "extending_metric.md"):
        apply(page, copy)
        for words in commands(page):
            words[0] = sys.executable
            done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            said[page] = done.stdout + done.stderr
    run = copy / "runs" / "assembly"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2]
    about = json.loads((run / "recipe.json").read_text())
    assert about["recipe"] == "neighbours.debug"
    assert about["config"]["model"]["reach"] == 4
    (folder,) = (run / "checkpoints").glob("step-*")
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("neighbours.weight").abs().sum() > 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["borders_found"] <= 1
    assert "borders_found: None -> " in said["extending_metric.md"]
