"""tools/inspect_stream.py: what it says is what training does, for any number of processes, with mixes and packs."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from vlm.data.order import batch_digest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "run"))
from launching import run, train_arguments

from tools import inspect_stream


def lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict]:
    assert inspect_stream.main([str(argument) for argument in arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def chain(rows: list[dict]) -> list[list[str]]:
    return [list(itertools.chain(*row["batches"].values())) for row in rows]


@pytest.mark.parametrize("more", [(), ("--pack", 100)])
def test_any_world_and_start_give_the_same_chain(shape_shards, capsys, more) -> None:
    mix = ("--shards", shape_shards / "train", "--shards", f"{shape_shards / 'test'}:0.5", "--seed", 3, *more)
    whole = lines(capsys, *mix, "--global-batch-size", 7, "--steps", 9)
    assert [row["step"] for row in whole] == list(range(9))
    assert all(list(row["batches"]) == ["0"] for row in whole)
    for world in (2, 3, 64):
        rows = lines(
            capsys, *mix, "--global-batch-size", 7, "--start-step", 4, "--steps", 5, "--world", world,
            "--micro-batch-size", 2,
        )  # fmt: skip
        assert chain(rows) == chain(whole)[4:]
        assert [row["epoch"] for row in rows] == [row["epoch"] for row in whole][4:]
        if not more:
            assert all(
                max(map(len, row["batches"].values())) - min(map(len, row["batches"].values())) <= 1 for row in rows
            )
        else:
            sizes = [[len(packs) for packs in row["packs"].values()] for row in rows]
            assert all(max(some) - min(some) <= 1 and sum(some) == 7 for some in sizes)
            assert all(sum(row["packs"][rank]) == len(keys) for row in rows for rank, keys in row["batches"].items())


def test_loader_processes_change_nothing(shape_shards, capsys) -> None:
    asked = ("--shards", shape_shards / "train", "--global-batch-size", 10, "--steps", 3, "--world", 3)
    assert lines(capsys, *asked, "--workers", 2) == lines(capsys, *asked)


def test_digests_are_those_that_training_logs(shape_shards, tmp_path, capsys) -> None:
    mix = f"data.shards={shape_shards / 'train'}:3,{shape_shards / 'test'}:1"
    run(train_arguments(shape_shards, tmp_path / "run", mix, "seed=5", "steps=4", "eval.at_end=false"))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    size = json.loads((tmp_path / "run" / "recipe.json").read_text())["config"]["global_batch_size"]
    asked = ("--shards", f"{shape_shards / 'train'}:3", "--shards", f"{shape_shards / 'test'}:1", "--seed", 5)
    told = lines(capsys, *asked, "--global-batch-size", size, "--steps", 4, "--world", 3, "--digest")
    assert [row["batch_digest"] for row in told] == [row["batch_digest"] for row in logged]
    assert [row["epoch"] for row in told] == [row["epoch"] for row in logged]
    shown = lines(capsys, *asked, "--global-batch-size", size, "--steps", 4)
    assert [batch_digest(keys) for keys in chain(shown)] == [row["batch_digest"] for row in told]
    by_recipe = lines(capsys, "--recipe", "vit_llama.debug", "--steps", 4, "--digest", mix, "seed=5")
    assert by_recipe == told
    assert len({row["digest"] for row in told}) == 4


def test_what_is_missing_or_wrong_is_said(shape_shards, capsys) -> None:
    for arguments, part in (
        ((), "--shards DIR is missing"),
        (("--shards", shape_shards / "train"), "--global-batch-size N is missing"),
        (("--shards", shape_shards / "train", "--global-batch-size", 0), "--global-batch-size 0"),
        (("--shards", shape_shards / "train", "--global-batch-size", 4, "--world", 0), "--world 0"),
        (("--shards", shape_shards / "train", "--global-batch-size", 4, "--pack", 0), "--pack 0"),
        (("--shards", "nowhere", "--global-batch-size", 4), "nowhere: no such folder"),
        (("--shards", shape_shards / "train", "--global-batch-size", 4, "seed=3"), "add --recipe NAME"),
    ):
        assert inspect_stream.main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert part in said
        assert said.startswith("error: ")
