"""Conceptual Captions (Sharma et al. 2018, https://aclanthology.org/P18-1238) and lists of images laid out like it.

Annotations:

- `filter_cap.json`, {"annotations": [{image_id, caption}]}: CC3M and LLaVA-CC3M-595k as Video-LLaMA reads them, and
  MiniGPT-4's `cc_sbu_align`. The image is `{root}/image/{image_id}.jpg`;
- LLaVA's `metadata.json`, a list of {image, caption};
- the official TSV, lines `caption<TAB>url` without header, or with one that names `caption` and `url`. It has no names
  of images: they are numbered by its rows from 0, as downloaders do (`GCC_train_000000000.jpg`,
  `00000/000000000.jpg` of img2dataset, `000000000.jpg`). What was not downloaded is rejected, row by row.

An image is a video of one frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.sources.common_json import read_items
from vlm.sources.common_media import IMAGE_SUFFIXES, file_id, image_file, media_folder
from vlm.sources.common_tables import BadCell, TableRow, not_utf8, open_text, read_tsv, text_of
from vlm.types import Rejected, Sample, UserError

_FILES = ("filter_cap.json", "metadata.json")
_OFFICIAL = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `caption`, row after row; the key is the name of the image.

    Args:
        root: the folder of the dataset; images are in its folder `image` or `images`, or in itself.
        split: part of the names of images of a TSV; else only used to find the annotations where none are given.
        annotations: `.json` or `.tsv`.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    images = media_folder(root, "image", "images")
    for file in annotations or _default_files(root, split):
        if file.suffix.lower() == ".tsv":
            yield from _read_table(file, images, split)
        else:
            yield from _read_json(file, images)


def _read_json(file: Path, images: Path) -> Iterator[Sample | Rejected]:
    for item in read_items(file, ("annotations",)):
        if isinstance(item, Rejected):
            yield item
            continue
        where, cells = item
        column = "image" if "image" in cells and "image_id" not in cells else "image_id"
        try:
            name = file_id(cells, column)
            caption = text_of(cells, "caption")
        except BadCell as error:
            yield Rejected(str(cells.get(column) or where.rpartition("/")[2])[:200], f"{where}, {error}", str(file))
            continue
        video = image_file(images, name)
        yield Sample(key=_stem(name), video=video, annotation={"caption": caption})


def _stem(name: str) -> str:
    return name.rpartition(".")[0] if name.lower().endswith(IMAGE_SUFFIXES) else name


def _read_table(file: Path, images: Path, split: str) -> Iterator[Sample | Rejected]:
    finder = _Numbered(images, split)
    for number, row in enumerate(_rows(file)):
        key = f"GCC_{split}_{number:09d}"
        if isinstance(row, Rejected):
            yield row._replace(key=key)
            continue
        try:
            caption = text_of(row.cells, "caption")
        except BadCell as error:
            yield Rejected(key, f"{row.where}, {error}", str(file))
            continue
        video = finder.find(number)
        if isinstance(video, str):
            yield Rejected(key, f"{row.where}: {video}", str(file))
        else:
            yield Sample(key=key, video=video, annotation={"caption": caption})


def _rows(file: Path) -> Iterator[TableRow | Rejected]:
    """The rows with `caption` and `url`. The official file has no header, and quotes in it are letters."""
    with open_text(file, "\n") as text:
        first = text.readline().rstrip("\r\n").split("\t")
        if {"caption", "url"} <= {cell.strip().strip('"') for cell in first}:
            yield from read_tsv(file, ("caption", "url"))
            return
        text.seek(0)
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            where, key = f"{file} row {number}", f"{file.name}:{number}"
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) < 2 or "://" not in cells[1]:
                reason = f"{where}: {line.rstrip()!r:.80} is not of the form `caption<TAB>url`"
                yield Rejected(key, reason, str(file))
            elif not_utf8(cells[0]):
                yield Rejected(key, f"{where}, column 'caption': {not_utf8(cells[0])}", str(file))
            else:
                yield TableRow(where, {"caption": cells[0], "url": cells[1]})


class _Numbered:
    """Finds images by the number of their row. The first that is found shows how all are named."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        names = (f"GCC_{split}_{{0:09d}}", "{1:05d}/{0:09d}", "{0:09d}")
        self.names = [name + suffix for name in names for suffix in IMAGE_SUFFIXES]

    def find(self, number: int) -> Path | str:
        """The file, or why there is none."""
        for name in self.names:
            file = self.folder / name.format(number, number // 10000)
            if file.is_file():
                self.names = [name]
                return file
        tried = ", ".join(name.format(number, number // 10000) for name in self.names[:: len(IMAGE_SUFFIXES)])
        return f"no image of it in {self.folder} ({tried}): it was not downloaded"


def _default_files(root: Path, split: str) -> list[Path]:
    names = (*_FILES, *([_OFFICIAL[split]] if split in _OFFICIAL else []))
    found = [file for name in names if (file := root / name).is_file()]
    if len(found) != 1:
        raise UserError(
            f"{root}: {len(found) or 'no'} annotation files (looked for {', '.join(names)}): give one with "
            "--annotations"
        )
    return found
