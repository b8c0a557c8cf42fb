"""JSON lists read item after item: the same items and the same errors whatever the size of the pieces read."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from vlm.sources import common_json
from vlm.sources.common_json import read_items
from vlm.types import Rejected, UserError

ITEMS: list[Any] = [
    {"a": 1, "text": 'é "quoted" \\ / \n 漢字 😀', "deep": [{"b": [1, 2.5e-3, -7, None, True]}]},
    {"long": "x" * 90},
    {},
    {"number": 12345678901234567890},
]


def objects(file: Path, names: tuple[str, ...] = ()) -> list[Any]:
    return [item if isinstance(item, Rejected) else item[1] for item in read_items(file, names)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("escaped", [True, False])
def test_items_are_those_of_json(
    chunk: int, indent: int | None, escaped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common_json, "_CHUNK", chunk)
    file = tmp_path / "items.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ITEMS, indent=indent, ensure_ascii=escaped).encode() + b"\r\n ")
    assert objects(file) == ITEMS
    whole = {"info": {"annotations": [1]}, "annotations": ITEMS, "after": [1, 2], "n": 3}
    file.write_text(json.dumps(whole, indent=indent, ensure_ascii=escaped))
    assert objects(file, ("annotations",)) == ITEMS


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_every_cut_is_an_error_that_names_the_place(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common_json, "_CHUNK", chunk)
    text = json.dumps([{"a": ["b", 12, True]}, {"c": "d"}], indent=1)
    file = tmp_path / "items.json"
    for end in range(1, len(text)):
        file.write_text(text[:end])
        with pytest.raises(UserError, match=r"items.json is not JSON \(line \d+, column \d+: ") as error:
            objects(file)
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text[:end])
        line = int(str(error.value).split("line ")[1].split(",")[0])
        assert expected.value.lineno - 1 <= line <= expected.value.lineno


def test_damage_in_the_middle_is_named_at_once(tmp_path: Path) -> None:
    file = tmp_path / "items.json"
    rows = [json.dumps({"row": row, "text": "word " * 20}) for row in range(30000)]
    rows[2] = rows[2].replace(": 2", ": 2 2")
    file.write_text("[\n" + ",\n".join(rows) + "\n]")
    reader = read_items(file)
    assert [next(reader)[1]["row"] for _ in range(2)] == [0, 1]
    tracemalloc.start()
    with pytest.raises(UserError, match=r"line 4, column 11"):
        next(reader)
    assert tracemalloc.get_traced_memory()[1] < 2**20  # the 3 MB behind it are not read
    tracemalloc.stop()


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "items.json"
    item = json.dumps({"image_id": "GCC_train_000000000", "caption": "a man on a horse " * 5})
    file.write_text('{"annotations": [' + ", ".join([item] * 30_000) + "]}")
    assert file.stat().st_size > 3 * 2**20
    monkeypatch.setattr(common_json, "_CHUNK", 2**16)
    tracemalloc.start()
    count = sum(1 for _ in read_items(file, ("annotations",)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000
    assert peak < 2**20, f"{peak / 2**20:.1f} MiB"


def test_single_items_are_rejected_and_the_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "items.json"
    file.write_bytes(b'[{"a": 1}, 7, {"a": "caf\xe9"}, {"a": "\\udce9"}]')
    first, second, third, fourth = read_items(file)
    assert first == (f"{file} item 1", {"a": 1})
    assert second == Rejected("items.json:2", f"{file} item 2: 7 is not an object", str(file))
    assert isinstance(third, Rejected)
    assert 'item 3: \'{"a": "caf\\xe9"}\' is not UTF-8 (as Latin-1 it would be \'{"a": "café"}\')' in third.reason
    assert fourth == (f"{file} item 4", {"a": "\udce9"})  # written as an escape it is JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("  \n", "must be a JSON list, or an object with the list 'annotations'; it begins with ''"),
        ("[]", "a list without items"),
        ('"text"', "it begins with '\"'"),
        ('{"other": []}', "an object without the list 'annotations'"),
        ('{"annotations": {}}', "an object without the list 'annotations'"),
        ('{"annotations": [{}], "annotations": [{}]}', "a second list 'annotations'"),
        ("[{}] []", "line 1, column 6: nothing may follow the end"),
        ("[{} {}]", "line 1, column 5: ',' is expected"),
        ("[{},]", "line 1, column 5"),
        ("[" * 100_000, "values lie too deep"),
        (f"[{'9' * 5000}]", "line 1, column 2: a number of thousands of digits"),
    ],
)
def test_damaged_files(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "items.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"items\.json") as error:
        objects(file, ("annotations",))
    assert message in str(error.value)


def test_items_of_random_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    items = [{"n": row, "text": 'é\\"\n' * rng.randrange(40)} for row in range(50)]
    file = tmp_path / "items.json"
    file.write_text(json.dumps(items, ensure_ascii=False))
    for chunk in range(1, 200, 13):
        monkeypatch.setattr(common_json, "_CHUNK", chunk)
        assert objects(file) == items
