"""An original's checkpoint and LLaMA through tools/convert_ckpt.py: what is loaded here reproduces its numbers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import text_rows as t
import torch
from torch.testing import assert_close

from tools import convert_ckpt
from vlm.models.gated_files import stored_config
from vlm.run import restore
from vlm.weights import state_hash

FILES = ["vamos_vis_cap.pt", "vamos_vis_mlp.pt", "flipped_all.pt", "vico_star.pt"]


@pytest.mark.parametrize("layout", ["meta_llama", "hf"])
@pytest.mark.parametrize("name", FILES)
def test_recorded_numbers(tmp_path: Path, name: str, layout: str, load_golden: Callable[[str], Any]) -> None:
    """Released .pth and Meta's LLaMA as files, converted with no recipe named; blocks are skipped in three of four."""
    values = load_golden(name)
    system = values["meta"]["system"]
    base, best, ours = tmp_path / "meta", tmp_path / "best.pth", tmp_path / "ours"
    base.mkdir()
    torch.save(values["base_state"], base / "consolidated.00.pth")
    (base / "params.json").write_text(json.dumps(values["params_json"]))
    args = argparse.Namespace(**values["args"])
    torch.save({"model": values["adapter_state"], "epoch": 0, "scaler": {}, "args": args}, best)
    if layout == "hf":
        run(base, tmp_path / "hf", "--from", "meta_llama", "--to", "hf")
        base = tmp_path / "hf"
    run(best, ours, "--from", system, "--to", "vlm", "--base", base)

    manifest = json.loads((ours / "manifest.json").read_text())
    model = stored_config(manifest["recipe"]["model"], name).build()
    restore.load_weights(ours, model)
    batch = t.batch_of(values, values["eval_batch"], [], video=t.uses_video(values), options=True, shared=True)
    with torch.no_grad():
        scores = model.predict(batch)
        terms = model(t.batch_of(values, values["train_batch"], t.objectives_of(values), video=t.uses_video(values)))
    assert_close(-scores, values["eval_scores"], **t.LOSS)
    assert torch.equal(scores.argmax(dim=1), values["eval_pred"])
    for view, weight in t.weights_of(values).items():
        objective = next(o for o in t.VIEWS if t.VIEWS[o] == view)
        assert_close(weight * float(terms[view].total) / terms[view].count, values["losses"][objective], **t.LOSS)

    run(ours, tmp_path / "back.pth", "--from", "vlm", "--to", system)
    back = torch.load(tmp_path / "back.pth", weights_only=False)
    assert list(back["model"]) == list(values["adapter_state"])
    assert state_hash(back["model"]) == state_hash(values["adapter_state"])
    assert back["args"] == args


@pytest.mark.parametrize("system", ["vamos", "flipped", "vico"])
def test_the_originals_own_files(tmp_path: Path, system: str, golden: Callable[[str], Path]) -> None:
    """Files that the original code wrote itself, optimizer and Namespace included."""
    folder = golden("tiny_ckpt") / system
    base = folder / ("llama3" if system == "vamos" else "llama") / "tiny"
    run(folder / "checkpoint_best.pth", tmp_path / "ours", "--from", system, "--to", "vlm", "--base", base)
    run(tmp_path / "ours", tmp_path / "back.pth", "--from", "vlm", "--to", system)
    back, original = (
        torch.load(f, weights_only=False) for f in (tmp_path / "back.pth", folder / "checkpoint_best.pth")
    )
    assert list(back) == [key for key in original if key != "optimizer"]
    assert list(back["model"]) == list(original["model"])
    assert state_hash(back["model"]) == state_hash(original["model"])
    assert (back["args"], back["epoch"], back["scaler"]) == (original["args"], original["epoch"], original["scaler"])
    run(base, tmp_path / "base", "--from", "meta_llama", "--to", "vlm")
    run(tmp_path / "base", tmp_path / "meta", "--from", "vlm", "--to", "meta_llama")
    one, two = (torch.load(f / "consolidated.00.pth", weights_only=True) for f in (base, tmp_path / "meta"))
    assert list(one) == list(two)
    assert state_hash(one) == state_hash(two)
    assert (tmp_path / "meta" / "params.json").read_bytes() == (base / "params.json").read_bytes()


def run(*words: str | Path) -> None:
    assert convert_ckpt.main([str(word) for word in words]) == 0
