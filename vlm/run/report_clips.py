"""The report's strips of frames: which test clips to show, and their frames as inline JPEG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from vlm.data.shard_format import ShardError
from vlm.data.shards import ShardSet
from vlm.data.video import DecodeError, count_frames, decode
from vlm.types import Prediction, Record, UserError

NUM_CLIPS = 12
MOST_WRONG = 4
FRAMES_A_CLIP = 6
FRAME_HEIGHT = 72  # pixels in the page


class TestClips:
    """The test shards behind a run's predictions, as far as they can be read.

    Args:
        path: folder of the test shards; None where the recipe names none.
    `missing` says in a sentence why nothing can be read ("" where it can).
    """

    __test__ = False  # not a test class

    def __init__(self, path: Path | None) -> None:
        self.missing, self._rows = "", {}
        if path is None:
            self.missing = "the recipe names no test shards"
            return
        try:
            self._shards = ShardSet(path)
            self._rows = {self._shards.key(row): row for row in range(len(self._shards))}
        except (UserError, OSError) as error:
            self.missing = str(error)

    def read(self, key: str) -> Record:
        """The record of a clip; raises KeyError where the shards have none of that key."""
        return self._shards.read(self._rows[key])

    def class_names(self, predictions: Sequence[Prediction]) -> list[str]:
        """The name of each class (K,), from one clip of each; `class k` where no clip tells."""
        names = [f"class {k}" for k in range(len(predictions[0].scores))]
        first: dict[int, str] = {}
        for prediction in predictions:
            if prediction.key in self._rows:
                first.setdefault(prediction.truth, prediction.key)
        for truth, key in first.items():
            try:
                names[truth] = str(self.read(key).annotation.get("name", names[truth]))
            except (ShardError, OSError):  # said where its frames would stand
                continue
        return names


def choose(predictions: Sequence[Prediction]) -> list[Prediction]:
    """A dozen clips: up to MOST_WRONG wrong ones, the surest first, then right ones, one class after the other."""
    wrong = sorted((p for p in predictions if p.truth != p.prediction), key=lambda p: -p.scores[p.prediction])
    right: list[Prediction] = []
    by_class: dict[int, list[Prediction]] = {}
    for prediction in predictions:
        if prediction.truth == prediction.prediction:
            by_class.setdefault(prediction.truth, []).append(prediction)
    while any(by_class.values()) and len(right) < NUM_CLIPS:
        for _, clips in sorted(by_class.items()):
            if clips:
                right.append(
                    clips.pop(len(right) % len(clips))
                )  # not the same place in each class: neighbours are alike
    shown = wrong[:MOST_WRONG]
    shown += right[: NUM_CLIPS - len(shown)]
    return shown + wrong[MOST_WRONG : MOST_WRONG + NUM_CLIPS - len(shown)]


def strips(predictions: Sequence[Prediction], clips: TestClips, names: Sequence[str]) -> str:
    """HTML of a dozen clips: frames, truth, prediction, and what the probes made of them."""
    return "".join(_strip(prediction, clips, names) for prediction in choose(predictions))


def _strip(prediction: Prediction, clips: TestClips, names: Sequence[str]) -> str:
    right = prediction.truth == prediction.prediction
    said = f"{escape(names[prediction.prediction])} ({prediction.scores[prediction.prediction]:.2f})"
    lines = [
        f'<b class="{"good" if right else "bad"}">{"✓ right" if right else "✗ wrong"}</b> '
        f"<code>{escape(prediction.key)}</code>",
        f"truth: {escape(names[prediction.truth])}",
        f"prediction: {said}",
    ]
    for probe, scores in prediction.probes.items():
        best = int(np.argmax(scores))
        lines.append(f'<span class="quiet">{escape(probe.replace("_", " "))}: {escape(names[best])}</span>')
    frames = frames_of(prediction.key, clips)
    return f'<div class="clip"><div class="frames">{frames}</div><p>{"<br>".join(lines)}</p></div>'


def frames_of(key: str, clips: TestClips) -> str:
    """HTML of a few frames of a record's video, or a sentence that says why there are none."""
    if clips.missing:
        return f'<p class="missing">{escape(clips.missing)}</p>'
    try:
        record = clips.read(key)
        if record.video is None:
            return '<p class="quiet">the shards hold features of this video, not the video</p>'
        count = record.num_frames if record.num_frames > 0 else count_frames(record.video)
        picked = np.linspace(0, count - 1, FRAMES_A_CLIP).round().astype(int).tolist()
        frames = decode(record.video, picked, decoders=record.decoders)
    except KeyError:
        return f'<p class="missing">{escape(key)} is not in the test shards any more</p>'
    except (DecodeError, ShardError, OSError) as error:
        return f'<p class="missing">{escape(str(error))}</p>'
    return "".join(
        f'<img src="data:image/jpeg;base64,{_jpeg(frame)}" height="{FRAME_HEIGHT}" alt="frame {index}" '
        f'title="frame {index} of {count}">'
        for index, frame in zip(picked, frames)
    )


def _jpeg(frame: np.ndarray) -> str:
    """A frame (H, W, 3) uint8 as base64 JPEG, at most twice as high as shown (sharp on dense screens)."""
    picture = Image.fromarray(frame)
    height = min(picture.height, 2 * FRAME_HEIGHT)
    picture = picture.resize((max(1, round(picture.width * height / picture.height)), height))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()
