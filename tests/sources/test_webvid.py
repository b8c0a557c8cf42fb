"""WebVid's two tables, and every way in which they come damaged."""

from __future__ import annotations

import csv
import io
import shutil
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vlm.data.shards import ShardSet, write_shards
from vlm.sources.webvid import read
from vlm.types import Rejected, Sample, UserError

OFFICIAL = ("videoid", "contentUrl", "duration", "page_dir", "name")
FILTERED = ("videoid", "name", "page_idx", "page_dir", "duration", "contentUrl")
ROW = {
    "videoid": "1066674784",
    "contentUrl": "https://example.org/1066674784.mp4",
    "duration": "PT00H00M17S",
    "page_dir": "000001_000050",
    "name": "A horse, grazing",
    "page_idx": "12",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "webvid" / "videos" / "000001_000050").mkdir(parents=True)
    return tmp_path / "webvid"


def table(file: Path, rows: Sequence[dict[str, str]], columns: Sequence[str] = OFFICIAL, **options: Any) -> Path:
    text = io.StringIO(newline="")
    options = {"delimiter": "\t" if file.suffix == ".tsv" else ",", "lineterminator": "\n"} | options
    writer = csv.DictWriter(text, columns, extrasaction="ignore", **options)
    writer.writeheader()
    writer.writerows(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.getvalue(), newline="")
    return file


def row(**changes: str) -> dict[str, str]:
    return ROW | changes


def captions(items: Iterator[Sample | Rejected]) -> list[str]:
    return [item.annotation["caption"] if isinstance(item, Sample) else item.reason for item in items]


@pytest.mark.parametrize("columns", [OFFICIAL, FILTERED, OFFICIAL[::-1]])
@pytest.mark.parametrize("name", ["results_2M_train.csv", "filter_annotation/0.tsv"])
def test_columns_are_read_by_name(columns: Sequence[str], name: str, root: Path) -> None:
    table(root / name, [row(), row(videoid="7", name='Tab,\tquote " and\nline')], columns)
    first, second = read(root, "train")
    assert first == Sample(
        key="1066674784",
        video=root / "videos" / "000001_000050" / "1066674784.mp4",
        annotation={"caption": "A horse, grazing"},
    )
    assert isinstance(second, Sample)
    assert (second.key, second.annotation["caption"]) == ("7", 'Tab,\tquote " and\nline')


def test_byte_order_mark_and_crlf(root: Path) -> None:
    file = table(root / "results_2M_val.csv", [row(), row(name="two\r\nlines")], lineterminator="\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert captions(read(root, "val")) == ["A horse, grazing", "two\r\nlines"]


def test_places_of_clips(root: Path) -> None:
    (root / "videos" / "1066674784.mp4").write_bytes(b"clip")
    rows = [row(), row(page_dir="000051_000100"), row(page_dir="")]
    paths = [item.video for item in read(root, "train", [table(root / "a.csv", rows)]) if isinstance(item, Sample)]
    flat = root / "videos" / "1066674784.mp4"
    assert paths == [root / "videos" / "000001_000050" / "1066674784.mp4", flat, flat]
    flat.unlink()
    (sample,) = read(root, "train", [table(root / "a.csv", rows[1:2])])
    assert isinstance(sample, Sample)
    assert sample.video == root / "videos" / "000051_000100" / "1066674784.mp4"  # where it should be
    (sample,) = read(root / "videos", "train", [table(root / "a.csv", [row()])])
    assert isinstance(sample, Sample)
    assert sample.video == paths[0]
    (sample,) = read(root, "train", [table(root / "b.tsv", [row()], ("name", "videoid"))])
    assert isinstance(sample, Sample)
    assert sample.video == flat


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": " "}, "row 3, column 'name': is empty"),
        ({"videoid": ""}, "row 3, column 'videoid': is empty"),
        ({"videoid": "../7"}, "row 3, column 'videoid': '../7' is not an id: it would lead to another folder"),
        ({"page_dir": "/etc"}, "row 3, column 'page_dir': '/etc' is not an id"),
        ({"page_dir": ".."}, "row 3, column 'page_dir': '..' is not an id"),
    ],
)
def test_a_damaged_row_is_rejected_by_name(changes: dict[str, str], reason: str, root: Path) -> None:
    for file in (root / "a.csv", root / "a.tsv"):
        kept, rejected, other = read(root, "train", [table(file, [row(), row(**changes), row(videoid="8")])])
        assert isinstance(kept, Sample)
        assert isinstance(rejected, Rejected)
        assert isinstance(other, Sample)
        assert f"{file} {reason}" in rejected.reason


def test_a_caption_that_is_not_utf8_is_named(root: Path) -> None:
    for file in (root / "a.csv", root / "a.tsv"):
        table(file, [row(), row(name="caf\u00e9 here"), row()])
        file.write_bytes(file.read_bytes().replace("\u00e9".encode(), b"\xe9"))
        _, rejected, kept = read(root, "train", [file])
        assert isinstance(rejected, Rejected)
        assert isinstance(kept, Sample)
        assert f"{file} row 3, column 'name': 'caf\\xe9 here' is not UTF-8 (as Latin-1" in rejected.reason


def test_a_damaged_duration_is_warned_of(root: Path) -> None:
    (sample,) = read(root, "train", [table(root / "a.csv", [row(duration="PTxx24S")])])
    assert isinstance(sample, Sample)
    reason = "column 'duration': 'PTxx24S' is not of the form PT00H00M17S"
    assert sample.warnings == (f"{root / 'a.csv'} row 2, {reason}",)


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('"say ""cheese"""', 'say "cheese"'),
        ('the "big" one', 'the "big" one'),
        ('"big" one', '"big" one'),
        ('"a quote that stays open', '"a quote that stays open'),
        ('5" pipe', '5" pipe'),
        ('"two\nlines"', "two\nlines"),
        ("it's", "it's"),
    ],
)
def test_quotes_of_a_tsv(line: str, caption: str, root: Path) -> None:
    file = root / "a.tsv"
    file.write_text(f'videoid\tname\n1\t{line}\n2\tnext\n3\tthe "last"\n')
    assert captions(read(root, "train", [file])) == [caption, "next", 'the "last"']


def test_rows_are_counted_over_cells_of_several_lines(root: Path) -> None:
    for file, separator in ((root / "a.csv", ","), (root / "a.tsv", "\t")):
        file.write_text(f'videoid{separator}name\n1{separator}"a\nb\nc"\n2\n3{separator}d\n')
        _, cut, _ = read(root, "train", [file])
        assert isinstance(cut, Rejected)
        assert f"{file} row 3 (line 5): 1 cells, but 2 columns: the row ends in column 'videoid' ('2')" in cut.reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.tsv", "\n\n", "is empty"),
        ("a.csv", "videoid,name\n", "has a header and no rows"),
        ("a.csv", "videoid,caption\n1,a\n", r"row 1: no column 'name'.*there are videoid, caption"),
        ("a.csv", "videoid\tname\n1\ta\n", r"row 1: no column 'videoid', 'name'"),
        ("a.csv", 'videoid,name\n1,"open\n2,b\n', r"row 2 \(lines 2 to 3\): .*a quote that does not close"),
        ("a.csv", "videoid,name\n1,a\n".encode("utf-16"), "is not UTF-8 text"),
        ("gone.csv", None, "cannot be read: No such file"),
    ],
)
def test_a_damaged_table_is_one_error(name: str, content: str | bytes | None, message: str, root: Path) -> None:
    if content is not None:
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        list(read(root, "train", [root / name]))
    assert name in str(error.value)


def test_tables_are_found_by_their_published_names(root: Path) -> None:
    with pytest.raises(UserError, match=r"no tables of split 'val' \(looked for results_2M_val.csv, results_10M_val"):
        list(read(root, "val"))
    table(root / "filter_annotation" / "1.tsv", [row(name="second")])
    table(root / "filter_annotation" / "0.tsv", [row(name="first")])
    assert captions(read(root, "train")) == ["first", "second"]
    table(root / "results_2M_train.csv", [row(name="official")])
    assert captions(read(root, "train")) == ["official"]
    table(root / "results_10M_train.csv", [row()])
    with pytest.raises(UserError, match="2 tables of split 'train'"):
        list(read(root, "train"))
    with pytest.raises(UserError, match="no such folder; --root"):
        list(read(root / "gone", "train"))


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_memory_does_not_grow_with_the_table(suffix: str, root: Path) -> None:
    file = root / f"a.{suffix}"
    separator = "," if suffix == "csv" else "\t"
    with file.open("w") as text:
        text.write(separator.join(OFFICIAL) + "\n")
        text.writelines(separator.join([str(n), "u" * 40, "PT00H00M17S", "000001_000050", "word " * 200]) + "\n"
                        for n in range(12_000))  # fmt: skip
    assert file.stat().st_size > 12 * 2**20
    tracemalloc.start()
    assert sum(isinstance(item, Sample) for item in read(root, "train", [file])) == 12_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2**20, f"{peak / 2**20:.1f} MiB"


def test_shards_name_clips_that_were_never_downloaded(shape_shards: Path, root: Path, tmp_path: Path) -> None:
    clip = next((shape_shards.parent / "corpus" / "videos" / "test").glob("*.mp4"))
    shutil.copy(clip, root / "videos" / "000001_000050" / "1066674784.mp4")
    rows = [row(), row(videoid="8"), row(name="again")]
    table(root / "results_2M_train.csv", rows)
    written = write_shards(read(root, "train"), tmp_path / "out", arguments={"source": "webvid", "split": "train"})
    shards = ShardSet(tmp_path / "out")
    assert [shards.read(n).annotation for n in range(len(shards))] == [{"caption": "A horse, grazing"}]
    missing, double = written.manifest["rejected"]
    assert missing["reason"] == f"{root / 'videos' / '000001_000050' / '8.mp4'}: No such file or directory"
    assert "duplicate key: item 2 of the list has the key of item 0" in double["reason"]


def test_real_rows(realdata: Path, root: Path) -> None:
    good = list(read(root, "val", [realdata / "annotations" / "webvid" / "results_2M_val_dev.csv"]))
    assert [sample.key for sample in good if isinstance(sample, Sample)] == [
        "1053841541", "5641526", "23720764", "1020335461", "30287869",
    ]  # fmt: skip
    assert all(isinstance(sample, Sample) and not sample.warnings for sample in good)
    assert captions(iter(good))[3] == "Moroccan flag waving in the wind in medieval town essaouira, morocco"
    bad = list(read(root, "val", [realdata / "bad" / "annotations" / "webvid_bad_duration_missing_files.csv"]))
    warnings = [item.warnings for item in bad if isinstance(item, Sample)]
    assert [len(few) for few in warnings] == [0, 1, 0, 0, 0]
    assert "row 3, column 'duration': 'PTxx24S'" in warnings[1][0]
