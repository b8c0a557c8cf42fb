"""LLMVA-GEBC as a user runs it: training with tests on published captions, captions of the others, and the file that
the challenge takes."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launching import ROOT, run

from tests.encoded import encode, pictures
from vlm.data.shards import write_shards
from vlm.types import Sample

KINDS = ("subject", "status_before", "status_after")


def shards(folder: Path, *, published: bool, videos: int = 3) -> Path:
    """Videos with two boundaries each, and one kind of other features."""
    folder.mkdir(parents=True)
    samples = []
    for number in range(videos):
        name = f"{'val' if published else 'tst'}{number:08d}"
        clip, features = folder / f"{name}.mp4", folder / f"{name}.npy"
        clip.write_bytes(encode(pictures(8, 32, 32, seed=number)))
        np.save(features, np.random.default_rng(number).normal(size=(5 + number, 8)).astype(np.float32))
        samples.append(
            Sample(
                key=name,
                video=clip,
                annotation={
                    "video": name,
                    "duration": 9.5,
                    "boundaries": [boundary(name, n, published) for n in (0, 1)],
                },
                members={"clip.npy": features},
            )
        )
    write_shards(samples, folder / "shards", arguments={"source": "none"})
    return folder / "shards"


def boundary(name: str, number: int, published: bool) -> dict[str, Any]:
    times = {"prev_timestamp": float(number), "timestamp": number + 2.0, "next_timestamp": number + 4.5}
    captions = {kind: f"a man {number} {kind}" for kind in KINDS} if published else {}
    return {"id": f"{name}_{number}", "kind": "Change of Action", **times, **captions}


@pytest.mark.slow
def test_from_training_to_submission(tmp_path: Path) -> None:
    val, test = (shards(tmp_path / name, published=name == "val") for name in ("val", "test"))
    trained, written = tmp_path / "run", tmp_path / "written"
    recipe = ["--recipe", "video_llama.debug_gebc", "eval.generation.num_beams=2"]
    settings = [f"data.shards={val}", f"eval.shards={val}", f"run_dir={trained}", "steps=2", "eval.every=1"]
    settings += ["eval.metric=overall_cider_rouge_l"]
    hardware = ["--deepspeed_config", str(ROOT / "ds_configs" / "cpu.json")]
    printed = run([str(ROOT / "launch" / "train.py"), *hardware, *recipe, *settings])
    assert "step 1: overall_cider_rouge_l" in printed
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {"cider_subject", "mean_rouge_l", "exact_match_blind", "overall_cider_rouge_l"} <= metrics.keys()
    assert metrics["texts"] == 18
    rows = [json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == list(KINDS) * 6
    assert rows[4]["references"] == ["a man 1 status_before"]
    assert rows[4]["id"] == "val00000000_1"

    settings = ["--checkpoint", str(trained), f"eval.shards={test}", f"run_dir={written}"]
    printed = run([str(ROOT / "launch" / "evaluate.py"), *recipe, *settings])
    assert "18 of 18 texts have no published captions to be scored by: there are no metrics" in printed
    assert not (written / "metrics.json").exists()
    for folder in (trained, written):
        score = [str(ROOT / "tools" / "score.py"), str(folder)]
        run([*score, "--check"])
        run([*score, "--submission", str(tmp_path / "gebc.zip")])
    with zipfile.ZipFile(tmp_path / "gebc.zip") as archive:
        parts = {name: pickle.loads(archive.read(name)) for name in archive.namelist()}
    assert sorted(parts["submit_test.pkl"]) == [f"tst{video:08d}_{n}" for video in range(3) for n in range(2)]
    assert parts["submit_val.pkl"]["val00000000_1"]["Status_Before"] == rows[4]["text"]
