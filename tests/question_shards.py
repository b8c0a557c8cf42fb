"""Shards of questions about videos, small: a NExT-QA tree with features and captions, written and sharded."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vlm.data.shards import write_shards
from vlm.sources import nextqa

HEADER = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
KINDS = ("CH", "CW", "TN", "TC", "TP", "DL", "DC", "DO")
DIM = 8
CAPTION = "In the video we see these scenes: a dog {0} runs. It stops at a tree. It rests. It goes home. The end. Bye."


def tree(root: Path, videos: int, questions: int, seed: int = 0) -> Path:
    """train.csv and val.csv with `questions` questions of each of `videos` videos, features and captions."""
    root.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    names = [f"{4000 + number}" for number in range(videos)]
    rows = [HEADER]
    for place, video in enumerate(names):
        for qid in range(questions):
            kind = KINDS[(place + qid) % len(KINDS)]
            asked = f"what does dog {place} do at place {qid}"
            rows.append(f"{video},300,640,480,{asked},{qid % 5},{qid},{kind},run,sit,eat,jump,hide")
    for split in ("train", "val"):
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    features = {video: torch.randn(3 + place % 5, DIM, generator=draw).half() for place, video in enumerate(names)}
    torch.save(features, root / "clipvitl14.pth")
    captions = {video: CAPTION.format(place) for place, video in enumerate(names)}
    (root / "llava_v15_13b_n6.json").write_text(json.dumps(captions))
    return root


def shards(folder: Path, videos: int = 6, questions: int = 3) -> Path:
    """folder/shards/{train,test} of such a tree."""
    root = tree(folder / "nextqa", videos, questions)
    for split, name in (("train", "train"), ("val", "test")):
        items = nextqa.read(root, split)
        write_shards(items, folder / "shards" / name, arguments={"source": "nextqa", "split": split})
    return folder / "shards"
