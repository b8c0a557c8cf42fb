"""WebVid (Bain et al. 2021, https://arxiv.org/abs/2104.00650): a caption for each of millions of clips.

Two tables are published, and read by the names of their columns, in any order: `results_2M_{train,val}.csv` (videoid,
contentUrl, duration, page_dir, name) and Video-LLaMA's `filter_annotation/*.tsv`. The clip of a row is
`{root}/videos/{page_dir}/{videoid}.mp4`, as the official download script writes it. Where there is no folder `videos`,
the root is that folder; where there is no `page_dir`, clips lie flat in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from vlm.sources.common_media import file_id, media_folder
from vlm.sources.common_tables import BadCell, TableRow, read_csv, read_tsv, text_of
from vlm.types import Rejected, Sample, UserError

_DURATION = re.compile(r"PT(\d+H)?(\d+M)?(\d+(\.\d+)?S)?")  # such as PT00H00M17S


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `caption`, row after row; the key is the `videoid`.

    Whether the clip is there is seen when shards are written: what was never downloaded is rejected there by its path.

    Args:
        root: the folder of the dataset.
        split: only used to find the tables where none are given.
        annotations: the tables: `.tsv` with tabs, all others with commas.

    Raises UserError for a table that is missing or damaged as a whole.
    """
    videos = media_folder(root, "videos")
    is_folder = lru_cache(maxsize=1024)(Path.is_dir)
    for file in annotations or _default_files(root, split):
        for row in (read_tsv if file.suffix.lower() == ".tsv" else read_csv)(file, ("videoid", "name")):
            if isinstance(row, Rejected):
                yield row
                continue
            try:
                key = file_id(row.cells, "videoid")
                page_dir = file_id(row.cells, "page_dir") if row.cells.get("page_dir", "").strip() else ""
                caption = text_of(row.cells, "name")
            except BadCell as error:
                yield Rejected(row.cells["videoid"].strip() or f"{file.name}", f"{row.where}, {error}", str(file))
                continue
            video, flat = videos / page_dir / f"{key}.mp4", videos / f"{key}.mp4"
            if not is_folder(video.parent) and flat.is_file():
                video = flat
            yield Sample(key=key, video=video, annotation={"caption": caption}, warnings=_warnings(row))


def _warnings(row: TableRow) -> tuple[str, ...]:
    """The table's duration is not used, since clips are decoded; but a damaged one is a sign that others may be."""
    duration = row.cells.get("duration", "").strip()
    if not duration or (_DURATION.fullmatch(duration) and duration != "PT"):
        return ()
    return (f"{row.where}, column 'duration': {duration!r:.60} is not of the form PT00H00M17S",)


def _default_files(root: Path, split: str) -> list[Path]:
    """The tables of a split by the names under which they are published."""
    names = [f"results_{size}_{split}.csv" for size in ("2M", "10M")]
    found = [file for name in names if (file := root / name).is_file()]
    if not found and split == "train":
        found = sorted(file for kind in ("csv", "tsv") for file in root.glob(f"filter_annotation/*.{kind}"))
    if not found or (len(found) > 1 and found[0].parent == root):
        raise UserError(
            f"{root}: {len(found) or 'no'} tables of split {split!r} (looked for {', '.join(names)} and, for train, "
            "filter_annotation/*.tsv): give them with --annotations"
        )
    return found
