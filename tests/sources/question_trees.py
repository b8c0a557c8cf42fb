"""Published trees of questions about videos, small: what the tests of the sources write and read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from vlm.types import Rejected, Sample

NEXTQA = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
NEXTQA_ROWS = (
    "4010069381,369,640,480,how do the two man play the instrument,0,6,CH,roll,tap,strum,hit,pat",
    "4882821564,2697,640,480,why did the boy pick up one present,2,1,CW,share,approach,unwrap,play,gesture",
    "4010069381,369,640,480,what is this,1,7,DO,NA,None,null,12,drum",
)


def write_tree(
    root: Path,
    files: dict[str, str | bytes],
    features: dict[str, tuple[int, int]] | None = None,
    captions: dict[str, dict[str, str]] | None = None,
) -> Path:
    """Files by name, features (video -> shape) as clipvitl14.pth, captions by name of their file."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if features is not None:
        torch.save({video: torch.ones(shape).half() for video, shape in features.items()}, root / "clipvitl14.pth")
    for name, texts in (captions or {}).items():
        (root / name).write_text(json.dumps(texts))
    return root


def csv(header: str, rows: Sequence[str], end: str = "\n") -> str:
    return end.join([header, *rows]) + end


def split(items: Sequence[Sample | Rejected]) -> tuple[list[Sample], list[Rejected]]:
    return [x for x in items if isinstance(x, Sample)], [x for x in items if isinstance(x, Rejected)]


def questions(samples: Sequence[Sample]) -> list[dict]:
    return [question for sample in samples for question in sample.annotation["questions"]]
