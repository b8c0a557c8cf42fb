"""tools/apply_delta.py: sums equal to the bit, vocabularies that go together, nothing half-written, little memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import released as r
from tools import apply_delta
from vlm.models import llama_delta
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llama_facts import expected_shapes
from vlm.types import UserError
from vlm.weights import open_tensors, read_state_dict, write_safetensors

WORDS = 40
TOKENIZER = {
    "tokenizer.model": b"pieces",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b'{"pad_token": "[PAD]"}',
    "added_tokens.json": b'{"[PAD]": 40}',
}


def folder(
    path: Path, seed: int, words: int = WORDS, *, form: str = "bin", dtype: torch.dtype = torch.float16, **stated: Any
) -> Path:
    """A Hugging Face folder of a tiny LLaMA, or of differences as large."""
    path.mkdir(parents=True)
    sizes = {"dim": 16, "layers": 2, "heads": 2, "hidden": 24} | {n: v for n, v in stated.items() if n != "norm_eps"}
    config = LlamaBaseConfig(vocab_size=words, norm_eps=stated.get("norm_eps", 1e-6), **sizes)
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(s, generator=generator).to(dtype) for n, s in expected_shapes(config).items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    if form == "safetensors":
        write_safetensors(path / "model.safetensors", state)
    else:
        names = list(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, path / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    hf = {"model_type": "llama", "num_attention_heads": 2, "rms_norm_eps": config.norm_eps, "vocab_size": words}
    (path / "config.json").write_text(json.dumps(hf | {"hidden_size": config.dim, "torch_dtype": "float16"}))
    for name, content in TOKENIZER.items():
        (path / name).write_bytes(content)
    return path


def run(base: Path, delta: Path, target: Path, *more: str) -> None:
    words = ["--base", str(base), "--delta", str(delta), "--target", str(target), *more]
    assert apply_delta.main(words) == 0


def refused(capsys: pytest.CaptureFixture[str], base: Path, delta: Path, target: Path, *more: str) -> str:
    capsys.readouterr()
    words = ["--base", str(base), "--delta", str(delta), "--target", str(target), *more]
    assert apply_delta.main(words) == 1
    assert not target.exists()
    return capsys.readouterr().err


def plain(path: Path) -> dict[str, Tensor]:
    return {n: t for n, t in read_state_dict(path).items() if not n.endswith("inv_freq")}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


# ---------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_v11_is_the_sum(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, delta = folder(tmp_path / "base", 0, form=form), folder(tmp_path / "delta", 1, form=form)
    run(base, delta, tmp_path / "whole", "--shard-bytes", "3000")
    one, other = plain(base), plain(delta)
    assert equal(plain(tmp_path / "whole"), {name: one[name] + other[name] for name in one})
    said = capsys.readouterr().out
    assert "40 words, no [PAD]: Vicuna v1.1. It expects USER: … ASSISTANT: … and ends with </s>" in said
    assert "written as float16, as published" in said
    files = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {"config.json", "model.safetensors.index.json", *TOKENIZER} < files
    assert not [name for name in files if name.startswith(".") or "merging" in name]
    assert not list(tmp_path.glob(".*")), "nothing is left beside the target"
    assert (tmp_path / "whole" / "tokenizer.model").read_bytes() == b"pieces"
    # opens as a recipe's LLaMA
    LlamaBaseConfig(path=tmp_path / "whole", dim=16, layers=2, heads=2, hidden=24, vocab_size=40).build()


def test_v0_has_a_word_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, delta = folder(tmp_path / "base", 0), folder(tmp_path / "delta", 1, WORDS + 1)
    run(base, delta, tmp_path / "whole")
    one, other, got = plain(base), plain(delta), plain(tmp_path / "whole")
    for name in llama_delta.WORDS:
        assert torch.equal(got[name][:WORDS], one[name] + other[name][:WORDS])
        assert torch.equal(got[name][WORDS], other[name][WORDS]), "the base has zeros there"
    said = capsys.readouterr().out
    assert "41 words with [PAD]: Vicuna v0. It expects ###Human: … ###Assistant: … and ends with ###" in said
    assert f"model.llama.path={tmp_path / 'whole'} inputs.tokenizer={tmp_path / 'whole'}" in said
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["vocab_size"] == 41


def test_meta_base_of_another_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Meta's rows of q and k are renumbered, and fp32 is rounded before the sum, as the published tool does."""
    meta = r.llama_folder(tmp_path / "meta", 2, dtype=torch.float32, vocab_size=r.WORDS)
    r.convert(meta, tmp_path / "hf", "--from", "meta_llama", "--to", "hf")
    stated = {"dim": r.DIM, "layers": r.LAYERS, "hidden": r.HIDDEN, "kv_heads": r.KEY_HEADS}
    delta = folder(tmp_path / "delta", 1, r.WORDS, **stated)
    config = json.loads((delta / "config.json").read_text())
    (delta / "config.json").write_text(json.dumps(config | {"num_key_value_heads": r.KEY_HEADS}))
    run(meta, delta, tmp_path / "whole")
    one, other = plain(tmp_path / "hf"), plain(delta)
    assert equal(plain(tmp_path / "whole"), {name: one[name].half() + other[name] for name in other})
    assert "the base's float32 rounded" in capsys.readouterr().out


def test_ziya_and_billa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, delta = folder(tmp_path / "base", 0), folder(tmp_path / "delta", 1, WORDS + 7)
    said = refused(capsys, base, delta, tmp_path / "whole")
    assert "has a vocabulary of 40 words" in said
    assert "of 47: 7 more" in said
    assert "--kind ziya" in said
    run(base, delta, tmp_path / "ziya", "--kind", "ziya")
    one, other, got = plain(base), plain(delta), plain(tmp_path / "ziya")
    want = {n: other[n] if n in llama_delta.WORDS else one[n] + other[n] for n in other}
    assert equal(got, want)
    said = refused(capsys, base, delta, tmp_path / "whole", "--kind", "billa")
    assert "is no BiLLa made from" in said
    published = {n: t.clone() for n, t in other.items()}
    for name in one:  # whole, and like LLaMA
        if name not in llama_delta.WORDS:
            published[name] = one[name] + 0.1 * other[name]
    embeddings = published["model.embed_tokens.weight"]
    embeddings[:WORDS] += one["model.embed_tokens.weight"]
    shutil.copytree(delta, tmp_path / "billa_published", ignore=shutil.ignore_patterns("*.bin*"))
    write_safetensors(tmp_path / "billa_published" / "model.safetensors", published)
    run(base, tmp_path / "billa_published", tmp_path / "billa", "--kind", "billa")
    got = plain(tmp_path / "billa")
    trained = embeddings.float()
    trained[:WORDS] -= one["model.embed_tokens.weight"].float()
    assert equal(got, {**published, "model.embed_tokens.weight": trained.half()})
    said = refused(capsys, base, tmp_path / "billa", tmp_path / "again", "--kind", "ziya")
    assert "is no delta but a whole model" in said


def test_the_old_flags(tmp_path: Path) -> None:
    base, delta = folder(tmp_path / "base", 0), folder(tmp_path / "delta", 1)
    words = ["--base-model-path", base, "--target-model-path", tmp_path / "whole", "--delta-path", delta]
    assert apply_delta.main([str(word) for word in words]) == 0
    assert (tmp_path / "whole" / "model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------- no pair


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, delta = folder(tmp_path / "base", 0), folder(tmp_path / "delta", 1)
    padded = folder(tmp_path / "padded", 2, WORDS + 1)
    target = tmp_path / "whole"
    said = refused(capsys, padded, delta, target)
    assert "vocabulary of 41 words" in said
    assert "of 40" in said
    assert "1 words too many" in said
    said = refused(capsys, base, folder(tmp_path / "second", 1, norm_eps=1e-5), target)
    assert "norm_eps: 1e-06 in the base, 1e-05 in the delta" in said
    said = refused(capsys, base, folder(tmp_path / "wide", 1, dim=32), target)
    assert "dim: 16 in the base, 32 in the delta" in said
    said = refused(capsys, base, base, target)
    assert "is no delta but a whole model" in said
    (delta / "tokenizer.model").unlink()
    assert "has none of tokenizer.model, tokenizer.json" in refused(capsys, base, delta, target)
    (delta / "tokenizer.model").write_bytes(b"")
    assert "no such folder" in refused(capsys, base, delta, tmp_path / "no" / "whole")
    target.mkdir()
    assert apply_delta.main(["--base", str(base), "--delta", str(delta), "--target", str(target)]) == 1
    assert "exists" in capsys.readouterr().err
    assert not list(target.iterdir())


def test_a_sum_that_overflows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, delta = folder(tmp_path / "base", 0, form="safetensors"), folder(tmp_path / "delta", 1, form="safetensors")
    state = read_state_dict(delta)
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], float("inf"))
    write_safetensors(delta / "model.safetensors", state)
    said = refused(capsys, base, delta, tmp_path / "whole")
    assert "model.norm.weight: base and delta give numbers beyond torch.float16" in said


def test_room_is_asked_for_beforehand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, delta = folder(tmp_path / "base", 0), folder(tmp_path / "delta", 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(apply_delta.shutil, "disk_usage", lambda _: usage._replace(free=9000))
    monkeypatch.setattr(apply_delta, "stream_safetensors", lambda *_: pytest.fail("nothing may be written"))
    assert "0.00 GB are needed, 0.00 GB are free" in refused(capsys, base, delta, tmp_path / "whole")


# ---------------------------------------------------------------------------------------------- killed, and again


KILLED = """
import os, signal, sys
from tools import apply_delta
write, count = apply_delta.stream_safetensors, 0
def dying(path, described, load, metadata):
    global count
    count += 1
    def die(name):
        if count == 2 and name == sorted(described)[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(name)
    write(path, described, die, metadata)
apply_delta.stream_safetensors = dying
apply_delta.main(sys.argv[1:])
"""


def test_killed_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, delta, target = folder(tmp_path / "base", 0), folder(tmp_path / "delta", 1), tmp_path / "whole"
    words = ["--base", base, "--delta", delta, "--target", target, "--shard-bytes", "3000"]
    words = [str(word) for word in words]
    here = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words], cwd=here, env={**os.environ, "PYTHONPATH": str(here)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    work = tmp_path / ".whole.merging"
    whole = [p.name for p in work.glob("model-*")]
    assert whole == ["model-00001-of-00004.safetensors"]
    assert list(work.glob(".model-00002*")), "begun, and not whole"
    stamp = (work / whole[0]).stat().st_mtime_ns
    assert apply_delta.main(words) == 0
    said = capsys.readouterr().out
    assert f"kept    {whole[0]}" in said
    assert said.count("merged  ") == 3
    assert (target / whole[0]).stat().st_mtime_ns == stamp
    one, other = plain(base), plain(delta)
    assert equal(plain(target), {name: one[name] + other[name] for name in one})
    assert not work.exists()


def test_another_delta_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun with one delta is not finished with another."""
    base, target = folder(tmp_path / "base", 0), tmp_path / "whole"
    write, calls = apply_delta.stream_safetensors, []

    def full(path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(apply_delta, "stream_safetensors", full)
    first, second = folder(tmp_path / "first", 1), folder(tmp_path / "second", 2)
    said = refused(capsys, base, first, target, "--shard-bytes", "3000")
    assert "cannot be written (No space left on device). The files before it are kept" in said
    run(base, second, target, "--shard-bytes", "3000")
    assert "kept" not in capsys.readouterr().out
    one, other = plain(base), plain(second)
    assert equal(plain(target), {name: one[name] + other[name] for name in one})


# ---------------------------------------------------------------------------------------------- memory


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Merging 100 MB onto 100 MB: what the process itself holds (files it maps are not counted) stays below 25 MB."""

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    sizes = {"dim": 512, "layers": 14, "hidden": 1536, "form": "safetensors"}
    base, delta = folder(tmp_path / "base", 0, 512, **sizes), folder(tmp_path / "delta", 1, 513, **sizes)
    total = sum(load().nbytes for load in open_tensors(delta).values())
    assert total > 90_000_000
    before, most, stop = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            most = max(most, held())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run(base, delta, tmp_path / "whole")
    finally:
        stop.set()
        watcher.join()
    assert most - before < 25_000_000, f"{(most - before) / 1e6:.0f} MB"


def test_a_pair_is_compared_when_it_is_made(tmp_path: Path) -> None:
    base = llama_delta.open_llama(folder(tmp_path / "base", 0))
    with pytest.raises(UserError, match="dim: 16 in the base, 32 in the delta"):
        llama_delta.Merge(base, llama_delta.open_llama(folder(tmp_path / "delta", 1, dim=32)), "vicuna")
