"""Breakfast (Kuehne et al. 2014, https://doi.org/10.1109/CVPR.2014.105): what people do as they make breakfast.

Labels in either form, known by content: MS-TCN's `groundTruth/P03_cam01_P03_cereals.txt`, a label a frame, or the
original lines `1-30 SIL`, in `P03/cam01/P03_cereals.avi.labels` beside the video or in
`segmentation_coarse/cereals/P03_cam01_P03_cereals.txt`. Videos are `P03/cam01/P03_cereals.avi`, below the root or its
folder `BreakfastII_15fps_qvga_sync`; of the two channels of `stereo` the one with labels of its own, else `ch1`.

Splits are `train.split1` … `test.split4`: MS-TCN's lists, or by persons where these are missing; `all` is everything.
`train.fork` and `test.fork` are those of the published fork of Video-ChatGPT, which leak (`common_fork`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.sources.common_chat import Row, make_chat
from vlm.sources.common_features import take_features
from vlm.sources.common_fork import SPLITS as FORK_SPLITS
from vlm.sources.common_fork import Take, fork_split, is_list, leak_of
from vlm.sources.common_segments import ALL, Segment, Tree, open_tree, read_segments
from vlm.sources.common_tables import BadCell
from vlm.sources.common_written import is_written, read_written
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

FPS = 15.0

_FOLDERS = ("groundTruth", "segmentation_coarse")
VIDEO_FOLDERS = ("", "BreakfastII_15fps_qvga_sync", "videos", "Videos/BreakfastII_15fps_qvga_sync")
_WRITTEN = ("Breakfast", "LLM/Breakfast/Breakfast", "LLM/Breakfast")
_NAME = re.compile(r"P(\d+)_(cam\d+|webcam\d+|stereo)\d*_P\1_([a-z]+)")
_SPLIT = re.compile(r"(train|test)\.split([1-4])")
_SUFFIXES = (".avi", ".mp4")
_BESIDE = "P*/*/P*.avi.labels"


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `segments`, `chat`, and as `label` and `name` what is made; the key is MS-TCN's name of the video.

    Segments may end after the last frame, or before: the labels of a video count for all its cameras.

    Args:
        root: the folder of the dataset.
        split: train.split1 … test.split4, all, or train.fork and test.fork.
        annotations: folders of labels, a list (`.bundle`, or the fork's) and `mapping.txt`, each instead of that under
            `root`; a folder of questions that a language model wrote (P03/cam01/P03_tea.avi.labels); features.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    annotations, features = take_features(annotations)
    written = [path for path in annotations if _is_written(path)]
    lists = [path for path in annotations if is_list(path)]
    tree = open_tree(
        root,
        split,
        [path for path in annotations if path not in (*written, *lists)],
        folders=_FOLDERS,
        classes=ACTIONS,
    )
    bases = _bases(root)
    places = _Places(tree, bases, written, [folder for name in _WRITTEN if (folder := root / name).is_dir()])
    for take in _takes(root, split, annotations, tree, bases):
        name = take if isinstance(take, str) else take.key
        try:
            sample = _sample(take, places)
            missing = sample.warnings[0] if sample.video is None else ""
            features.add_to(sample, FPS)
            if missing and not sample.members:
                raise BadCell(f"{missing}; features in its place are given with --annotations")
            if missing:  # the times of questions are parts of a whole
                sample.annotation["num_frames"] = sample.annotation["segments"][-1]["end"]
            yield sample
        except BadCell as error:
            yield Rejected(name, str(error))


def notes(root: Path, split: str, annotations: Sequence[Path] = ()) -> dict[str, Any]:
    """What a user should know of a split as a whole: how much the fork's leaks."""
    return {"leak": leak_of(fork_split(root, annotations, _bases(root)))} if split in FORK_SPLITS else {}


def unlabelled(root: Path) -> Iterator[Sample]:
    """The videos of a tree that has no labels at all, for what needs none (features); else nothing."""
    bases = _bases(root)
    if any((root / folder).is_dir() for folder in _FOLDERS) or any(next(base.glob(_BESIDE), None) for base in bases):
        return
    files: dict[str, Path] = {}
    for base in bases:
        for suffix in reversed(_SUFFIXES):
            for file in sorted(base.glob(f"P*/*/P*{suffix}")):  # of two channels ch1, as with labels
                name = _name_of(file)
                if (found := _NAME.fullmatch(name)) and found[3] in ACTIVITIES:
                    files[name] = file
    for name in sorted(files):
        yield Sample(key=name, video=files[name], annotation={})


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the files of a video are looked for."""

    tree: Tree
    bases: tuple[Path, ...]
    written: Sequence[Path]  # folders of questions, as the user gave them
    published: Sequence[Path]  # or where they may be


def _bases(root: Path) -> tuple[Path, ...]:
    return tuple(base for name in VIDEO_FOLDERS if (base := root / name).is_dir())


def _is_written(folder: Path) -> bool:
    return folder.is_dir() and next(folder.glob("P*/*/P*.labels"), None) is not None


def _takes(
    root: Path, split: str, annotations: Sequence[Path], tree: Tree, bases: Sequence[Path]
) -> Sequence[str | Take]:
    """What a split has: names of videos, or the fork's files."""
    if split in FORK_SPLITS:
        divided = fork_split(root, annotations, bases)
        return divided.train if split == FORK_SPLITS[0] else divided.test
    return tree.names or _listed(root, split, tree, bases)


def _sample(take: str | Take, places: _Places) -> Sample:
    """Without a video where there is none; why is its first warning then."""
    key, name, channel = (take, take, "") if isinstance(take, str) else (take.key, take.name, take.channel)
    found = _NAME.fullmatch(name)
    tree, bases = places.tree, places.bases
    if found is None:
        raise BadCell(f"{tree.bundle or name}: {name!r:.60} is not a name such as 'P03_cam01_P03_cereals'")
    activity = found[3]
    if activity not in ACTIVITIES:
        raise BadCell(f"{name}: {activity!r} is none of {', '.join(ACTIVITIES)}")
    videos = _videos(found, channel)
    beside = [base / f"{video}.avi.labels" for base in bases for video in videos]
    labels = [place for folder in tree.folders for place in (folder / f"{name}.txt", folder / activity / f"{name}.txt")]
    file = next((file for file in (*labels, *beside) if file.is_file()), None)
    if file is None:
        raise BadCell(f"{tree.bundle or name}: no labels of {name!r} ({', '.join(map(str, (*labels, *beside)[:4]))})")
    segments, warnings = read_segments(file, tree.classes, UNCLASSED)
    if not segments:
        raise BadCell(f"{file}: has no action in it")
    chat, warned = _chat(key, segments, activity, videos, places)
    video = _video(file, videos[:1] if channel else videos, bases, name)
    return Sample(
        key=key,
        video=video if isinstance(video, Path) else None,
        annotation={"label": ACTIVITIES.index(activity), "name": activity, "segments": segments, "chat": chat},
        warnings=(*(() if isinstance(video, Path) else (video,)), *warnings, *warned),
    )


def _chat(
    key: str, segments: Sequence[Segment], activity: str, videos: Sequence[str], places: _Places
) -> tuple[list[Row], tuple[str, ...]]:
    rows = make_chat(key, segments, activity, background=BACKGROUND)
    files = [folder / f"{video}.avi.labels" for folder in (*places.written, *places.published) for video in videos]
    for file in files:
        if file.is_file() and (file.parents[2] in places.written or is_written(file)):
            written, warnings = read_written(file, segments)
            return [*rows, *written], warnings
    lacking = f"no questions about {key!r} in {', '.join(map(str, places.written))}"
    return rows, (lacking,) if places.written else ()


def _videos(found: re.Match[str], channel: str = "") -> list[str]:
    """Paths below the folder of videos, without suffix, best first."""
    person, camera, activity = found.groups()
    channels = ["_ch1", "_ch0"] if camera == "stereo" else [""]
    if channel:
        channels.sort(key=lambda name: name != f"_{channel}")
    return [f"P{person}/{camera}/P{person}_{activity}{name}" for name in channels]


def _video(labels: Path, videos: Sequence[str], bases: Sequence[Path], name: str) -> Path | str:
    """The file, or why there is none."""
    own = labels.with_suffix("")
    if labels.suffix == ".labels" and own.is_file() and any(own.stem == Path(video).name for video in videos):
        return own
    places = [base / f"{video}{suffix}" for base in bases for video in videos for suffix in _SUFFIXES]
    found = next((place for place in places if place.is_file()), None)
    return found or f"no video of {name!r} ({', '.join(map(str, places[:4]))}, …)"


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
        names |= {_name_of(file) for file in base.glob(_BESIDE)}
    if found is not None:
        test = TEST_PERSONS[int(found[2])]
        names = {name for name in names if (_person(name) in test) == (found[1] == "test")}
    if not names:
        raise UserError(
            f"{root} has no labels (groundTruth/*.txt, segmentation_coarse/*/*.txt, P03/cam01/*.avi.labels) of split "
            f"{split!r}: give their folder with --annotations"
        )
    return sorted(names)


def _name_of(file: Path) -> str:
    """MS-TCN's name of a video, by the path of its file or of that of its labels."""
    person, _, activity = re.sub(r"_ch\d", "", file.name.partition(".")[0]).partition("_")
    camera = file.parent.name
    return f"{person}_{camera}{'01' if camera == 'stereo' else ''}_{person}_{activity}"


def _person(name: str) -> int:
    found = re.match(r"P(\d+)_", name)
    return int(found[1]) if found else -1
