"""Chat JSON against what the original converters of Video-ChatGPT and of its fork wrote, of toy trees in their layout.

Measured: rows, their order, sides of the video, repeats and both number helpers agree exactly, faults included.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tools import fork_chat
from vlm.sources.breakfast import read
from vlm.sources.common_fork_chat import breakfast_divider, divided, multiplied
from vlm.types import Sample


@pytest.fixture(scope="module")
def recorded(load_golden: Callable[[str], Any]) -> dict[str, Any]:
    return load_golden("vllama_data_conversion.json")


@pytest.fixture(scope="module")
def tree(recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy files; each video with labels is there too, as an empty file."""
    folder = tmp_path_factory.mktemp("fork")
    for name, text in recorded["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        if "/Videos/" in name:
            (folder / name).with_suffix("").write_text("v")
    (folder / "vid_frames_breakfast.json").write_text(json.dumps(recorded["vid_frames"]))
    return folder


def converted(tree: Path, form: str, root: str, *options: str) -> list[dict[str, Any]]:
    out = tree / f"{form}.json"
    assert fork_chat.main([form, "--root", str(tree / root), "--out", str(out), *options]) == 0
    return json.loads(out.read_text())


def folded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies one after another as one row with their number, as recorded."""

    def told(row: dict[str, Any]) -> tuple[str, ...]:
        human, gpt = (turn["value"] for turn in row["conversations"])
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        assert human.startswith("<video>\n") != human.endswith("\n<video>")
        return row["id"], row["video"], human.removeprefix("<video>\n").removesuffix("\n<video>"), gpt

    found = []
    for (name, video, question, answer), copies in groupby(rows, key=told):
        first, *others = copies
        before = first["conversations"][0]["value"].startswith("<video>")
        found.append({"id": name, "video": video, "question": question, "answer": answer,
                      "repeats": 1 + len(others), "first_copy_video_before_question": before})  # fmt: skip
    return found


def test_breakfast_rows(recorded: dict[str, Any], tree: Path) -> None:
    rows = converted(tree, "breakfast", "LLM/Breakfast", "--frames", str(tree / "vid_frames_breakfast.json"))
    assert len(rows) == recorded["breakfast_rows"]
    assert rows[: len(recorded["breakfast_first6"])] == recorded["breakfast_first6"]
    assert folded(rows) == recorded["breakfast_compressed"]


def test_salads_rows(recorded: dict[str, Any], tree: Path) -> None:
    """The frames of its videos are not recorded: of all whole numbers that could divide, one gives the rows."""
    names = [Path(name).name for name in recorded["files"] if name.startswith("s50/")]
    (tree / "without.txt").write_text("\n".join(recorded["salads_skip"]))
    right = []
    for divider in range(1, 25):
        (tree / "vid_frames.json").write_text(json.dumps(dict.fromkeys(names, 1000 * divider)))
        arguments = ("salads", "s50", "--frames", str(tree / "vid_frames.json"))
        rows = converted(tree, *arguments)
        assert rows == converted(tree, *arguments, "--without", str(tree / "without.txt"))
        assert len(rows) == recorded["salads_rows"]
        if folded(rows) == recorded["salads_compressed"]:
            right.append(divider)
    assert len(right) == 1


def test_rows_of_the_base(recorded: dict[str, Any], tree: Path) -> None:
    (tree / "instruct_rows.json").write_text(json.dumps(recorded["base_convert"]["input"]))
    assert converted(tree, "instruct", "instruct_rows.json") == recorded["base_convert"]["output"]


def test_number_helpers(recorded: dict[str, Any]) -> None:
    for case in recorded["divide_numbers"]:
        assert divided(case["input"], breakfast_divider(case["max_frame"])) == case["output"], case
    for case in recorded["multiply_numbers"]:
        assert multiplied(case["input"], case["seg_size"]) == case["output"], case


def test_the_same_tree_as_it_was_meant(tree: Path) -> None:
    """What the source makes of it: one axis of time, no copies, no answer that is not in the files."""
    found = {item.key: item for item in read(tree / "LLM" / "Breakfast", "all")}
    assert found
    for item in found.values():
        assert isinstance(item, Sample)
        rows = item.annotation["chat"]
        assert rows[0]["answer"].count("\n") + 1 == len(item.annotation["segments"])
        written = [row for row in rows if row["kind"] == "written"]
        assert len(written) > 1
        start, end = item.annotation["segments"][1]["start"], item.annotation["segments"][1]["end"]
        assert any(f"between <t:{start}> and <t:{end}>" in row["question"] for row in written)
        assert any("hands" in row["answer"] and "<t:" not in row["answer"] for row in written)
