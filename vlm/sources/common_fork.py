"""The splits of the published fork of Video-ChatGPT on Breakfast and 50Salads, which leak, and how much they do.

Its Breakfast test list names files of videos (`/P03/stereo/P03_tea_ch0.avi`), drawn one by one, so that nearly all show
what training has from another camera, with the same labels. Every file is a video of its own there, both channels of
`stereo` too. Its 50Salads list has ten of the fifty videos; the same ten people made their other salad in training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.sources.common import read_text
from vlm.types import UserError

SPLITS = ("train.fork", "test.fork")
LISTS = ("valid.txt", "video_paths_valid.txt")  # of Breakfast's test videos, under the root
SALADS_TEST = tuple(f"rgb-{person:02d}-2" for person in (1, 3, 5, 8, 10, 11, 15, 18, 24, 27))

_PATH = re.compile(r"(?:.*/)?P(\d+)/(cam\d+|webcam\d+|stereo)/P\1_([a-z]+)(?:_(ch\d))?\.(?:avi|mp4)")


class Take(NamedTuple):
    """One file of Breakfast."""

    person: str  # digits, as in names
    camera: str
    activity: str
    channel: str = ""  # of stereo: ch0 or ch1

    @property
    def name(self) -> str:
        """MS-TCN's name of the video."""
        return f"P{self.person}_{self.camera}{'01' if self.camera == 'stereo' else ''}_P{self.person}_{self.activity}"

    @property
    def key(self) -> str:
        return f"{self.name}_{self.channel}" if self.channel else self.name

    @property
    def performance(self) -> tuple[str, str]:
        """What its other cameras show too."""
        return self.person, self.activity


class ForkSplit(NamedTuple):
    """Breakfast as the fork divides it."""

    file: Path  # the list of test videos
    train: tuple[Take, ...]
    test: tuple[Take, ...]


def is_list(file: Path) -> bool:
    """Whether a file lists videos by their paths."""
    return file.is_file() and _PATH.fullmatch(read_text(file).split("\n", 1)[0].strip()) is not None


def fork_split(root: Path, annotations: Sequence[Path], bases: Iterable[Path]) -> ForkSplit:
    """Breakfast's videos as the list says: those in it, found or not, and all others that are there.

    Augmented copies (`_flip`, …) are no videos of their own. UserError: there is no list, or a row of it is no path.
    """
    lists = [path for path in annotations if is_list(path)] or [
        path for name in LISTS if (path := root / name).is_file()
    ]
    if len(lists) != 1:
        raise UserError(
            f"the fork's split is a list of test videos ({LISTS[0]}, rows such as /P03/cam01/P03_tea.avi), of which "
            f"{', '.join(map(str, lists)) or 'none'} is given: give one with --annotations"
        )
    test: dict[Take, None] = {}
    for number, line in enumerate(read_text(lists[0]).splitlines(), 1):
        found = _PATH.fullmatch(line.strip())
        if line.strip() and found is None:
            raise UserError(f"{lists[0]} row {number}: {line!r:.60} is not a path such as /P03/cam01/P03_tea.avi")
        if found is not None:
            test[_take(found)] = None
    names = ("/".join(file.parts[-3:]) for base in bases for file in base.glob("P*/*/P*"))
    there = {_take(found) for name in names if (found := _PATH.fullmatch(name)) is not None}
    return ForkSplit(lists[0], tuple(sorted(there - test.keys())), tuple(test))


def _take(found: re.Match[str]) -> Take:
    return Take(found[1], found[2], found[3], found[4] or "")


def leak_of(split: ForkSplit) -> dict[str, Any]:
    """How much of the test videos training shows."""
    performances = {take.performance for take in split.train}
    shared = sum(take.performance in performances for take in split.test)
    stereo = [take for take in split.test if take.channel]
    files = set(split.train)
    both = sum(take._replace(channel="ch1" if take.channel == "ch0" else "ch0") in files for take in stereo)
    return {
        "test_videos": len(split.test),
        "same_performance_in_training": shared,
        "stereo_videos": len(stereo),
        "other_channel_in_training": both,
        "warning": (
            f"the published fork's split leaks: {shared} of {len(split.test)} test videos show a performance (the same "
            "person and activity, with the same labels) that training shows from another camera, and of "
            f"{len(stereo)} stereo ones {both} have their other channel in training. What is measured on it is no "
            "measure of new videos: use train.split1 … test.split4"
        ),
    }


def salads_leak_of(names: Iterable[str]) -> dict[str, Any]:
    """How much of the fork's test videos of 50Salads show people whom training shows."""
    there = set(names)
    test = sorted(there & set(SALADS_TEST))
    shared = sum(any(other[:6] == name[:6] for other in there - set(SALADS_TEST)) for name in test)
    return {
        "test_videos": len(test),
        "same_person_in_training": shared,
        "warning": (
            f"the published fork's split leaks: of {len(test)} test videos {shared} show a person whom training shows, "
            "too, as no published split does: use train.split1 … test.split5"
        ),
    }
