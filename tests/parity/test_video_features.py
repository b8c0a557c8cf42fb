"""Features of frames as the originals feed them: cut to the span, spread over F frames, zeros where there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm.data.features import cut_span, read_features, spread_frames
from vlm.data.shards import ShardSet, write_shards
from vlm.sources import intentqa, nextqa, perception_test, star, tvqa

CASES = {
    "vamos_vis.pt": nextqa,
    "vamos_ptest.pt": perception_test,
    "vamos_intentqa.pt": intentqa,
    "flipped_star.pt": star,
    "flipped_tvqa.pt": tvqa,
    "vico_star.pt": star,
}


@pytest.mark.parametrize("name", CASES)
def test_features_of_a_batch(
    name: str, load_golden: Callable[[str], Any], golden: Callable[[str], Path], tmp_path: Path
) -> None:
    recording = load_golden(name)
    dataset, count = recording["args"]["dataset"], recording["args"]["max_feats"]
    write_shards(
        CASES[name].read(golden(f"tiny_data/{dataset}"), "train"), tmp_path / "out", arguments={"split": "train"}
    )
    shards = ShardSet(tmp_path / "out")
    records = {shards.key(row): shards.read(row) for row in range(len(shards))}
    batch = recording["train_batch"]
    for number, (video, text) in enumerate(zip(batch["vid"], batch["text"])):
        record = records[str(video)]
        shown = [
            q for q in record.annotation["questions"] if q["question"].strip(" ?").lower() in text["q_text"].lower()
        ]
        if "features.npy" in record.members:
            cut = cut_span(read_features(record), record.annotation, shown[0].get("span"))
            features = spread_frames(cut, count)
        else:
            features = np.zeros((count, 768), np.float32)
            assert str(video) == "1000099"
        assert torch.equal(torch.from_numpy(features), batch["video"][number])
