"""Evaluation of systems that write: one text for each prompt, however they are grouped and over however many processes;
scored where people wrote some; shown in the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import writing_worker as w
from launching import ROOT
from launching import run as launch

from tools import score
from vlm.data import loader
from vlm.distributed import World
from vlm.recipe import EvalConfig, GenerationConfig, Recipe
from vlm.run import eval_tasks, evaluate
from vlm.run.checkpoint import Progress
from vlm.run.eval_tasks import Captions
from vlm.run.report import write_report
from vlm.run.report_texts import choose
from vlm.run.standalone import Replica
from vlm.types import Ask, Example, Record, Row, UserError, Writing

WORLD = World(0, 1, 0, torch.device("cpu"), "single")


class Secret(w.Ending):
    """Nobody's captions are published."""

    def asks(self, record: Record) -> tuple[Ask, ...]:
        return tuple(ask._replace(references=()) for ask in super().asks(record))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return w.shards(tmp_path_factory.mktemp("writing") / "clips")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_every_prompt_gets_its_text_however_they_are_grouped(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    metrics = w.alone(w.recipe(shards, tmp_path / "three"), told)
    rows = lines(tmp_path / "three")
    assert [row["key"] for row in rows] == [row["video"] for row in rows] == [f"clip{n}" for n in range(w.CLIPS)]
    assert rows[1]["references"] == ["a <b>clip</b>, 1"]
    assert len({row["text"] for row in rows}) > 3
    assert len({len(row["text"].split()) for row in rows}) > 2
    assert len({row["probes"]["blind"] for row in rows}) == 1  # nothing tells them apart but the video
    assert metrics["exact_match"] == 0.0
    assert {"exact_match_blind", "bleu4", "rouge_l", "cider"} <= metrics.keys()
    about = json.loads((tmp_path / "three" / "evaluation.json").read_text())
    assert (about["records"], about["scored"], about["unscored"]) == (w.CLIPS, w.CLIPS, 0)
    assert about["protocol"]["eval"]["generation"]["max_new_tokens"] == 12
    for size in (1, 16):
        w.alone(w.recipe(shards, tmp_path / str(size), batch_size=size), told)
        assert lines(tmp_path / str(size)) == rows
    assert score.main([str(tmp_path / "three"), "--check"]) == 0
    (tmp_path / "three" / "metrics.json").write_text('{"spice": 1}')
    assert score.main([str(tmp_path / "three"), "--check"]) == 1
    assert "it has SPICE: give --spice DIR" in capsys.readouterr().err
    assert score.main([str(tmp_path / "three"), "--spice", str(tmp_path)]) == 2
    assert "stanford-corenlp-3.6.0.jar" in capsys.readouterr().err


def test_settings_of_generation_matter(shards: Path, tmp_path: Path) -> None:
    found = {}
    for name, way in w.WAYS.items():
        w.alone(w.recipe(shards, tmp_path / name, probes=(), **way), [])
        found[name] = [row["text"] for row in lines(tmp_path / name)]
    assert len({tuple(texts) for texts in found.values()}) == len(w.WAYS)


@pytest.mark.slow
def test_the_command_line_says_how_texts_are_written(shards: Path, tmp_path: Path) -> None:
    def evaluate_with(name: str, *settings: str, expect: int = 0) -> str:
        command = [str(ROOT / "launch" / "evaluate.py"), "--recipe", "video_llama.debug", "--untrained"]
        return launch([*command, f"eval.shards={shards}", f"run_dir={tmp_path / name}", *settings], expect=expect)

    evaluate_with("greedy")
    evaluate_with("beams", "eval.generation.num_beams=5", "eval.generation.max_new_tokens=9")
    greedy, beams = (lines(tmp_path / name) for name in ("greedy", "beams"))
    assert [row["key"] for row in greedy] == [row["key"] for row in beams]
    assert [row["text"] for row in greedy] != [row["text"] for row in beams]
    refused = evaluate_with("no", "eval.generation.top_p=0.5", expect=2)
    assert (
        "eval.generation.top_p=0.5: generation.top_p is 0.5; it must be 1 unless generation.sample is true" in refused
    )


@pytest.mark.slow
def test_processes_that_share_weights_write_what_one_alone_does(shards: Path, tmp_path: Path) -> None:
    """ZeRO-3: four records on one rank, three on the other, so that it has nothing left while the first still writes;
    texts end at different steps."""
    launch([str(Path(w.__file__)), str(shards), str(tmp_path / "two"), "3"], processes=2)
    for name, way in w.WAYS.items():
        w.alone(w.recipe(shards, tmp_path / name, **way), [])
        assert lines(tmp_path / "two" / name) == lines(tmp_path / name), name


def test_texts_that_nobody_published_are_written_and_not_scored(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    settings = w.recipe(shards, tmp_path / "run", inputs=Secret)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("{}")  # of an evaluation before
    assert w.alone(settings, told) == {}
    assert f"{w.CLIPS} of {w.CLIPS} texts have no published captions to be scored by: there are no metrics" in told
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert all(row["references"] == [] and row["text"] is not None for row in lines(tmp_path / "run"))
    about = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (about["scored"], about["written_without_references"]) == (0, w.CLIPS)
    assert score.main([str(tmp_path / "run"), "--check"]) == 0
    assert "nothing to score" in capsys.readouterr().out
    (tmp_path / "run" / "metrics.json").write_text("{}")
    assert score.main([str(tmp_path / "run"), "--check"]) == 1
    assert score.main([str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "metrics.json").exists()
    page = write_report(tmp_path / "run").read_text()
    assert "7 texts, 7 of them without published captions, so not scored" in page
    assert "truth: not published" in page
    assert "metrics.json is missing" not in page
    replica = Replica(w.model_of(settings), WORLD, torch.float32)
    with pytest.raises(UserError, match=r"no published captions, so eval\.every cannot tell"):
        evaluate.is_best(settings, replica, WORLD, Progress(step=1), told.append)


def test_the_best_checkpoint_is_told_by_a_metric_of_texts(shards: Path, tmp_path: Path) -> None:
    settings = w.recipe(shards, tmp_path, metric="rouge_l")
    replica = Replica(w.model_of(settings), WORLD, torch.float32)
    progress = Progress(step=1)
    assert evaluate.is_best(settings, replica, WORLD, progress, lambda text: None)
    assert not evaluate.is_best(settings, replica, WORLD, progress, lambda text: None)
    assert progress.best_metric is not None


def test_the_report_shows_texts(shards: Path, tmp_path: Path) -> None:
    w.alone(w.recipe(shards, tmp_path / "run"), [])
    page = write_report(tmp_path / "run").read_text()
    assert "7 texts." in page
    assert "truth: a &lt;b&gt;clip&lt;/b&gt;, 1" in page
    assert "<b>clip" not in page
    assert f"text: {lines(tmp_path / 'run')[0]['text']}" in page
    assert "blind: " in page
    assert "data:image/jpeg;base64," in page
    assert "share of the texts that are, word for word, one that people wrote" in page


def test_the_report_shows_every_kind() -> None:
    kinds = ("subject", "status_before", "status_after")
    written = [Writing(key=str(n), text="a", references=["A." if n % 2 else "b"], kind=kinds[n % 3]) for n in range(90)]
    shown = choose(written)
    assert len(shown) == len({one.key for one in shown}) == 12
    assert {one.kind for one in shown[4:]} == set(kinds)
    assert all(one.references == ["b"] for one in shown[:4])
    assert choose(written[:3]) == [written[0], written[2], written[1]]


class Several:
    """Inputs with several prompts and several examples a record; a text is its prompt's first id."""

    ends = ((0,),)

    def decode(self, ids: list[int]) -> str:
        return str(ids[0])

    def blank(self) -> Example:
        return example("", 99)

    def test_batch(self, examples: list[Example]) -> list[Example]:
        return examples


def example(key: str, *numbers: int) -> Example:
    return Example(key=key, prompts=tuple(Row((number,), (-100,)) for number in numbers))


def test_groups_have_no_more_texts_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples with more prompts are cut; texts stay in the order of what was asked."""
    seen: list[list[int]] = []

    def echo(model: Any, batch: Any, config: Any, *, keys: list[str], **_: Any) -> list[list[int]]:
        ids = [row.ids[0] for one in batch for row in one.prompts]
        seen.append(ids)
        assert keys == [f"k{number}" for number in ids]
        return [[number] for number in ids]

    monkeypatch.setattr(eval_tasks, "generate", echo)
    monkeypatch.setattr(Captions, "batch", lambda self, group: Group(group))
    task = object.__new__(Captions)
    settings = EvalConfig(shards="", batch_size=4, generation=GenerationConfig())
    task.recipe, task.world = type("R", (), {"inputs": Several(), "eval": settings, "seed": 0})(), WORLD
    task.engine = type("E", (), {"model": None})()
    examples = [[example("a", 0, 1, 2), example("a", 3, 4, 5)], [example("b", *range(6, 15))]]
    items = [
        loader.TestItem(
            several[0].key,
            tuple(Ask(f"k{row.ids[0]}", None) for one in several for row in one.prompts),
            {"": several},
        )
        for several in examples
    ]
    assert [row.text for row in task.rows(items, ())] == [str(number) for number in range(15)]
    assert [len(ids) for ids in seen] == [4, 4, 4, 3]
    assert [row.video for row in task.rows(items[1:], ())] == ["b"] * 9


class Group(list):
    """A group of examples in the place of a batch."""

    prompts = True


def test_a_test_that_writes_needs_to_know_how(tmp_path: Path) -> None:
    def recipe(**changes: Any) -> Recipe:
        good = w.recipe(tmp_path, tmp_path)
        return replace(good, eval=replace(good.eval, **changes))

    with pytest.raises(ValueError, match=r"eval\.generation is none, but these inputs want texts written"):
        recipe(generation=None)
    with pytest.raises(ValueError, match=r"eval\.metric is top1; it must be exact_match or bleu4 or rouge_l or cider"):
        recipe(metric="top1")
    with pytest.raises(ValueError, match=r"eval\.kinds: texts are scored by kind anyway"):
        recipe(kinds={"C": ("a",)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"references": "a"}, "line 2: references is 'a', expected a list of texts"),
        ({"references": [1]}, "expected a list of texts"),
        ({"text": 3}, "line 2: text is 3, expected a text"),
        ({"probes": {"blind": 1}}, "expected an object of texts"),
        ({"probes": {}}, r"has the probes \[\], the first row \['blind'\]"),
        ({"key": "a"}, "key 'a' came in line 1 already"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    row = {"key": "a", "text": "x", "references": ["x"], "kind": "", "probes": {"blind": "y"}}
    rows = [row, {**row, "key": "b", **change}]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(UserError, match=says):
        score.score(tmp_path, True)
    rows[1] = {"key": "b", "truth": 0, "prediction": 0, "scores": [1.0]}
    for both in (rows, rows[::-1]):
        (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in both))
        with pytest.raises(UserError, match="rows of texts and rows of scores do not go together"):
            score.score(tmp_path, True)
