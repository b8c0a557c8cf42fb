"""bench/data.py: the rivals show the same pixels, damage is met, the figures have their names. No timings."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from vlm.data.clips import ClipConfig
from vlm.data.rng import SampleRng

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCH))
    try:  # by its file: other folders are called data too
        spec = importlib.util.spec_from_file_location("bench_data", BENCH / "data.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_data"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def small(bench: ModuleType) -> object:
    return bench.Size(
        clips=3, records=8, drawn=bench.Size().drawn._replace(width=76, height=64, frames=34), side=32, turns=2,
        batches=1, vast_shards=30, vast_rows=3, undecoded=200, decoded=16, workers=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(bench: ModuleType, small: object, tmp_path_factory: pytest.TempPathFactory) -> object:
    clips = [bench.draw(seed, small.drawn) for seed in range(small.clips)]
    return bench.make_corpus(tmp_path_factory.mktemp("corpus"), clips, small.records, shard_samples=3)


def test_drawn_clips_are_the_same_each_time(bench: ModuleType, small: object) -> None:
    assert bench.draw(1, small.drawn) == bench.draw(1, small.drawn)
    assert bench.draw(1, small.drawn) != bench.draw(2, small.drawn)


def test_the_rival_of_each_view_shows_what_we_show(bench: ModuleType, small: object, corpus: object) -> None:
    config: ClipConfig = small.recipe()
    for rounded, apart in ((True, bench.TOLERANCE["train"]), (False, bench.TOLERANCE["test"])):
        exact = replace(config, round_pixels=rounded)
        ours, rival = bench.our_training(corpus.shards, exact, 2), bench.each_view_training(corpus, exact, 2)
        for _ in range(4):
            mine, its = bench.pixels(next(ours)), next(rival)
            assert mine.shape == its.shape == (4, 3, 16, 32, 32)
            torch.testing.assert_close(mine, its, atol=apart, rtol=0)
    mine, its = bench.pixels(next(bench.our_test(corpus.shards, config, 1))), next(bench.each_view_test(corpus, config))
    assert mine.shape == its.shape == (6, 3, 16, 32, 32)
    mean = 1e-5 if not bench.rival_loaders.missing("cv2") else 1.0  # Pillow resizes otherwise
    assert (mine - its).abs().mean() < mean


def test_the_limit_decodes_the_frames_that_we_decode(bench: ModuleType, small: object, corpus: object) -> None:
    config: ClipConfig = small.plain()
    pairs = [
        (bench.our_training(corpus.shards, config), bench.limit_training(corpus.shards, config)),
        (bench.our_test(corpus.shards, config, bench.BATCH), bench.limit_test(corpus.shards, config)),
    ]
    for ours, limit in pairs:
        for _ in range(2):
            assert torch.equal(next(ours).video, next(limit).permute(0, 4, 1, 2, 3))


def test_ours_can_be_finished_in_the_same_process(bench: ModuleType, small: object, corpus: object) -> None:
    config: ClipConfig = small.recipe()
    ours, finished = (bench.our_training(corpus.shards, config, 2) for _ in range(2))
    batch = next(ours)
    assert batch.video.dtype == torch.uint8
    video = next(bench.finished_too(finished))
    assert video.dtype == torch.float32
    assert torch.equal(video, bench.pixels(batch))


def test_webdataset_has_our_batches_and_those_missing_are_named(
    bench: ModuleType, small: object, corpus: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tars = [Path(corpus.shards.path) / name for name in corpus.shards.shard_names]
    config: ClipConfig = small.plain()
    rng = SampleRng(0)
    rng.numpy = np.random.RandomState(0)  # the rival's
    theirs = bench.rival_loaders.webdataset_batches(tars, config, bench.BATCH, 0)
    for first in range(0, len(corpus.shards), bench.BATCH):
        records = [corpus.shards.read(row) for row in range(first, first + bench.BATCH)]
        batch = config.collate([example for record in records for example in config.train(record, rng)], rng)
        assert batch.video is not None
        assert batch.video.dtype == torch.uint8
        mine, its = bench.pixels(batch), next(theirs)
        assert mine.shape == its.shape == (4, 3, 16, 32, 32)
        assert its.dtype == torch.float32
        assert torch.equal(mine, its)
    monkeypatch.setitem(sys.modules, "litdata", None)
    monkeypatch.setitem(sys.modules, "megatron.energon", None)
    monkeypatch.setitem(sys.modules, "megatron", None)
    results = bench.compare_loaders(corpus, small, tmp_path)
    assert set(results["skipped"]) == {"litdata", "energon"}
    assert "litdata          skipped: litdata cannot be imported" in capsys.readouterr().out
    assert {"limit_train", "limit_test", "webdataset", "webdataset_interval", "webdataset_wall"} <= set(results)
    assert {"finished_train", "finished_test", "webdataset_over_finished", "webdataset_over_finished_interval"} <= set(
        results
    )


def test_turns_and_ratio(bench: ModuleType) -> None:
    order: list[str] = []

    def contestant(name: str) -> Iterator[None]:
        while True:
            order.append(name)
            yield

    spent = bench.take_turns({name: contestant(name) for name in "ab"}, turns=3, batches=2)
    assert "".join(order) == "aabbbbaaaabbbbaa"
    assert [len(turns) for turns in spent.values()] == [3, 3]
    found = bench.ratio([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)


def test_a_clip_that_breaks_off_is_named_and_read_to_its_break(
    bench: ModuleType, small: object, corpus: object, tmp_path: Path
) -> None:
    found = bench.cost_of_poison(corpus, replace(small, workers=0), tmp_path)
    assert found["poison_named"] == 1
    assert np.isfinite(found["poison_1_percent_cost"])  # a difference of times, of 8 clips alone


def test_vast_set_and_memory(bench: ModuleType, small: object, corpus: object, tmp_path: Path) -> None:
    found, vast = bench.first_batch(corpus, small, tmp_path)
    assert found["first_batch_0"] > 0
    assert (len(vast), len(vast.shard_names)) == (90, 30)
    assert {vast.shard_name(row) for row in range(90)} == set(vast.shard_names)
    assert vast.read(89).video == corpus.files[0].read_bytes()
    slope = bench.memory_slope("undecoded", vast, bench.Undecoded(), small.undecoded, 4)
    assert slope["memory_samples_undecoded"] == 200
    assert np.isfinite(slope["memory_slope_undecoded"])
    assert bench.bytes_over_needed(corpus, small.plain())["bytes_read_over_needed"] >= 1


def test_runs_and_adds_to_the_figures_of_another(
    bench: ModuleType, small: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "QUICK", small)
    (tmp_path / "figures.json").write_text('{"score": 3}')
    arguments = ["--quick", "--json", str(tmp_path / "figures.json"), "--only", "bytes", "memory", "--decoded", "8"]
    assert bench.main(arguments) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["score"], figures["memory_samples_decoded"]) == (3, 8)
    assert figures["bytes_read_over_needed"] >= 1
