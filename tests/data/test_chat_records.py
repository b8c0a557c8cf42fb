"""Questions of records: their times on the axis, and segments that have no place on it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vlm.data.chat_records import Asked, questions_of
from vlm.data.video import DecodeError
from vlm.types import Record


def record(chat: Any, num_frames: int = 100, **annotation: Any) -> Record:
    return Record(key="a", shard="s", row=0, video=None, annotation={"chat": chat, **annotation},
                  num_frames=num_frames, fps=0.0, decoders=())  # fmt: skip


def test_segments_that_are_shorter_than_a_place_are_not_listed() -> None:
    told = ("0-3 SIL", "3-40 take cup", "40-41 stir 2-2 x", "41-100 pour milk", "100-130 SIL")
    lines = "\n".join(re.sub(r"^(\d+)-(\d+)", r"<t:\1>-<t:\2>", line) for line in told)
    first = {"kind": "segments", "question": "List down all the segments. action is milk", "answer": lines}
    next_ = {
        "kind": "anticipation",
        "question": f"Following are the segments in the video: {lines}\nList down the segments that will occur next.",
        "answer": "<t:100>-<t:130> SIL",
    }
    at = {"kind": "at", "question": "When does SIL happen?", "answer": "<t:0>-<t:3>, <t:100>-<t:130>"}
    asked = questions_of(record([first, next_, at]), 10)
    assert asked[0].answer == "0-4 take cup\n4-10 pour milk"
    assert asked[1].question == next_["question"].replace(lines, "0-4 take cup\n4-10 pour milk")
    assert asked[1].answer == ""
    assert asked[2].answer == "0-0, 10-10"
    assert questions_of(record([first]), 100)[0].answer is not None
    assert questions_of(record([first]), 100)[0].answer.count("\n") == 3  # what is beyond the last frame alone


def test_questions_of_whole_videos_need_no_frames_and_keep_their_ids() -> None:
    rows = [
        {"kind": "qa", "question": "Who?", "answer": "2-2 men", "id": "v/0"},
        {"kind": "", "question": "?", "answer": ""},
    ]
    asked = questions_of(record(rows, num_frames=-1), 10)
    assert asked == [Asked("qa", "Who?", "2-2 men", "v/0"), Asked("", "?", "", "")]
    for damaged in ([], [{"kind": "qa", "question": "Who?"}], {"kind": "qa"}):
        with pytest.raises(DecodeError, match="are damaged"):
            questions_of(record(damaged), 10)
