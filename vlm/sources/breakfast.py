"""Breakfast (Kuehne et al. 2014, https://doi.org/10.1109/CVPR.2014.105): what people do as they make breakfast.

Labels in either form, known by content: MS-TCN's `groundTruth/P03_cam01_P03_cereals.txt`, a label a frame, or the
original lines `1-30 SIL`, in `P03/cam01/P03_cereals.avi.labels` beside the video or in
`segmentation_coarse/cereals/P03_cam01_P03_cereals.txt`. Videos are `P03/cam01/P03_cereals.avi`, below the root or its
folder `BreakfastII_15fps_qvga_sync`; of the two channels of `stereo` the one with labels of its own, else `ch1`.

Splits are `train.split1` … `test.split4`: MS-TCN's lists, or by persons where these are missing; `all` is everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.sources.common_chat import make_chat
from vlm.sources.common_segments import ALL, Tree, open_tree, read_segments
from vlm.sources.common_tables import BadCell
from vlm.types import Rejected, Sample, UserError

ACTIVITIES = ("cereals", "coffee", "friedegg", "juice", "milk", "pancake", "salat", "sandwich", "scrambledegg", "tea")
ACTIONS = (
    "SIL", "pour_cereals", "pour_milk", "stir_cereals", "take_bowl", "pour_coffee", "take_cup", "spoon_sugar",
    "stir_coffee", "pour_sugar", "pour_oil", "crack_egg", "add_saltnpepper", "fry_egg", "take_plate", "put_egg2plate",
    "take_eggs", "butter_pan", "take_knife", "cut_orange", "squeeze_orange", "pour_juice", "take_glass",
    "take_squeezer", "spoon_powder", "stir_milk", "spoon_flour", "stir_dough", "pour_dough2pan", "fry_pancake",
    "put_pancake2plate", "pour_flour", "cut_fruit", "put_fruit2bowl", "peel_fruit", "stir_fruit", "cut_bun",
    "smear_butter", "take_topping", "put_toppingOnTop", "put_bunTogether", "take_butter", "stir_egg", "pour_egg2pan",
    "stirfry_egg", "add_teabag", "pour_water", "stir_tea",
)  # fmt: skip
UNCLASSED = ("walk_in", "walk_out")  # in the original labels, but not among the 48 actions
BACKGROUND = ("SIL",)
TEST_PERSONS = {1: range(3, 16), 2: range(16, 29), 3: range(29, 42), 4: range(42, 55)}

_FOLDERS = ("groundTruth", "segmentation_coarse")
_VIDEOS = ("", "BreakfastII_15fps_qvga_sync", "videos", "Videos/BreakfastII_15fps_qvga_sync")
_NAME = re.compile(r"P(\d+)_(cam\d+|webcam\d+|stereo)\d*_P\1_([a-z]+)")
_SPLIT = re.compile(r"(train|test)\.split([1-4])")
_SUFFIXES = (".avi", ".mp4")


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `segments`, and as `label` and `name` what is made; the key is MS-TCN's name of the video.

    Segments may end after the last frame, or before: the labels of a video count for all its cameras.

    Args:
        root: the folder of the dataset.
        split: train.split1 … test.split4, or all.
        annotations: folders of labels, a list (`.bundle`) and `mapping.txt`, each instead of that under `root`.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    tree = open_tree(root, split, annotations, folders=_FOLDERS, classes=ACTIONS)
    bases = tuple(base for name in _VIDEOS if (base := root / name).is_dir())
    for name in tree.names or _listed(root, split, tree, bases):
        try:
            yield _sample(name, tree, bases)
        except BadCell as error:
            yield Rejected(name, str(error))


def _sample(name: str, tree: Tree, bases: Sequence[Path]) -> Sample:
    found = _NAME.fullmatch(name)
    if found is None:
        raise BadCell(f"{tree.bundle or name}: {name!r:.60} is not a name such as 'P03_cam01_P03_cereals'")
    activity = found[3]
    if activity not in ACTIVITIES:
        raise BadCell(f"{name}: {activity!r} is none of {', '.join(ACTIVITIES)}")
    videos = _videos(found)
    beside = [base / f"{video}.avi.labels" for base in bases for video in videos]
    labels = [place for folder in tree.folders for place in (folder / f"{name}.txt", folder / activity / f"{name}.txt")]
    file = next((file for file in (*labels, *beside) if file.is_file()), None)
    if file is None:
        raise BadCell(f"{tree.bundle or name}: no labels of {name!r} ({', '.join(map(str, (*labels, *beside)[:4]))})")
    segments, warnings = read_segments(file, tree.classes, UNCLASSED)
    chat = make_chat(name, segments, activity, background=BACKGROUND)
    return Sample(
        key=name,
        video=_video(file, videos, bases, name),
        annotation={"label": ACTIVITIES.index(activity), "name": activity, "segments": segments, "chat": chat},
        warnings=warnings,
    )


def _videos(found: re.Match[str]) -> list[str]:
    """Paths below the folder of videos, without suffix, best first."""
    person, camera, activity = found.groups()
    channels = ("_ch1", "_ch0") if camera == "stereo" else ("",)
    return [f"P{person}/{camera}/P{person}_{activity}{channel}" for channel in channels]


def _video(labels: Path, videos: Sequence[str], bases: Sequence[Path], name: str) -> Path:
    if labels.suffix == ".labels" and labels.with_suffix("").is_file():
        return labels.with_suffix("")
    places = [base / f"{video}{suffix}" for base in bases for video in videos for suffix in _SUFFIXES]
    for place in places:
        if place.is_file():
            return place
    raise BadCell(f"no video of {name!r} ({', '.join(map(str, places[:4]))}, …)")


def _listed(root: Path, split: str, tree: Tree, bases: Sequence[Path]) -> list[str]:
    """Names of the videos of a split that no list gives: of all that have labels, by persons."""
    found = _SPLIT.fullmatch(split)
    if found is None and split != ALL:
        raise UserError(
            f"{root} has no list splits/{split}.bundle: splits are train.split1 … test.split4, or all; or give a list "
            "with --annotations"
        )
    names = {file.stem for folder in tree.folders for file in folder.rglob("P*.txt")}
    for base in () if names else bases:
        for file in base.glob("P*/*/P*.avi.labels"):
            person, _, activity = re.sub(r"_ch\d", "", file.name.partition(".")[0]).partition("_")
            camera = file.parent.name
            names.add(f"{person}_{camera}{'01' if camera == 'stereo' else ''}_{person}_{activity}")
    if found is not None:
        test = TEST_PERSONS[int(found[2])]
        names = {name for name in names if (_person(name) in test) == (found[1] == "test")}
    if not names:
        raise UserError(
            f"{root} has no labels (groundTruth/*.txt, segmentation_coarse/*/*.txt, P03/cam01/*.avi.labels) of split "
            f"{split!r}: give their folder with --annotations"
        )
    return sorted(names)


def _person(name: str) -> int:
    found = re.match(r"P(\d+)_", name)
    return int(found[1]) if found else -1
