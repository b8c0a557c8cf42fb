"""What a run may go on with, what is kept of its beginning, and what an evaluation must not replace."""

import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm.config import override
from vlm.distributed import World
from vlm.nn.attention import AttentionChoice
from vlm.recipe import load
from vlm.run import record
from vlm.run.record import Launch
from vlm.types import UserError

DEEPSPEED = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}


def launch(run_dir: Path, *overrides: str, name="vit_llama.debug", deepspeed=DEEPSPEED, processes=1) -> Launch:
    recipe = override(load(name), [f"run_dir={run_dir}", *overrides])
    world = World(0, processes, 0, torch.device("cpu"), "single")
    return Launch(recipe, name, list(overrides), deepspeed, world, AttentionChoice("sdpa", ""))


def checkpoint_at(run_dir: Path, step: int) -> Path:
    """What record.py looks at of a checkpoint: complete, and intact."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    files = {}
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (folder / name).write_text(name)
        files[name] = {"bytes": len(name), "sha256": hashlib.sha256(name.encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return folder


def begin(run: Launch) -> dict:
    """Begin a run and let it write a checkpoint. Returns its record."""
    run.folder.mkdir(parents=True, exist_ok=True)
    found, about = record.open_training(run, "fingerprint")
    assert found is None
    record.write(run, about)
    checkpoint_at(run.folder, 4)
    return json.loads((run.folder / "recipe.json").read_text())


def test_a_continued_run_keeps_its_first_record_and_tells_what_changed(tmp_path, capsys):
    first = begin(launch(tmp_path / "run"))
    assert first["attention"] == "sdpa"
    assert first["shards"] == "fingerprint"
    capsys.readouterr()
    other = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    again = launch(
        tmp_path / "run", "data.shards=moved/train", "eval.workers=0", "log_every=7", deepspeed=other, processes=2
    )
    for times in (1, 2):
        found, about = record.open_training(again, "fingerprint")
        said = capsys.readouterr().out.splitlines()
        assert found.name == "step-00000004"
        record.write(again, about)
        written = json.loads((tmp_path / "run" / "recipe.json").read_text())
        assert {name: written[name] for name in first} == first
        assert len(written["resumed"]) == times
    entry = written["resumed"][0]
    assert (entry["step"], entry["world_size"], entry["deepspeed"]) == (4, 2, other)
    assert said == [f"changed since the run began: {text}" for text in entry["changed"]]
    settings = {text.split(":")[0] for text in entry["changed"]}
    assert {"data.shards", "eval.workers", "log_every", "world_size"} <= settings
    assert {"deepspeed.train_micro_batch_size_per_gpu", "deepspeed.zero_optimization.stage"} <= settings
    assert "deepspeed.zero_optimization.stage: 1 -> 3" in entry["changed"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("optim.lr=0.5", "optim.lr: "),
        ("model.llama.random_seed=3", "model.llama.random_seed: 0 -> 3"),
        ("data.substitutes=3", "data.substitutes: 16 -> 3"),
    ],
)
def test_what_changes_the_course_of_a_run_is_refused(tmp_path, change, says):
    begin(launch(tmp_path / "run"))
    with pytest.raises(UserError, match=f"holds a run with other settings .*{says}"):
        record.open_training(launch(tmp_path / "run", change), "fingerprint")


def test_other_records_and_another_recipe_are_refused(tmp_path):
    begin(launch(tmp_path / "run"))
    with pytest.raises(UserError, match=r"content of .*: fingerprint -> another"):
        record.open_training(launch(tmp_path / "run"), "another")
    with pytest.raises(UserError, match=r"recipe: vit_llama\.debug -> video_mae\.debug"):
        record.open_training(launch(tmp_path / "run", name="video_mae.debug"), "fingerprint")


def test_another_plan_of_packs_is_refused(tmp_path):
    _, about = record.open_training(launch(tmp_path / "run"), "content packs one")
    old = dict(about)
    record.compare(tmp_path, old, about)
    with pytest.raises(UserError, match=r"packs of .*: one -> two, planned .* another --tokenizer"):
        record.compare(tmp_path, old, {**about, "shards": "content packs two"})
    with pytest.raises(UserError, match=r"packs of .*: not known -> two"):
        record.compare(tmp_path, {**about, "shards": "content"}, {**about, "shards": "content packs two"})
    with pytest.raises(UserError, match=r"content of .*: content packs one -> other packs one"):
        record.compare(tmp_path, old, {**about, "shards": "other packs one"})


def test_a_setting_is_not_free_for_sharing_letters_with_one_that_is():
    assert record._within("eval.workers: 1 -> 2", record.MAY_CHANGE)
    assert not record._within("evaluation_x: 1 -> 2", record.MAY_CHANGE)
    assert not record._within("data.shards_of_another: 1 -> 2", record.MAY_CHANGE)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_tokenizer_may_move_but_not_change(tmp_path, kind):
    def tokenizer(folder: str, text: str) -> str:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "tokenizer.model"
        path.write_text(text)
        return f"inputs.tokenizer={path if kind == 'file' else path.parent}"

    first, moved, other = tokenizer("a", "words"), tokenizer("b", "words"), tokenizer("c", "other words")
    begin(launch(tmp_path / "run", first, name="vamos.debug"))
    assert record.open_training(launch(tmp_path / "run", moved, name="vamos.debug"), "fingerprint")[0]
    with pytest.raises(UserError, match="content of the tokenizer"):
        record.open_training(launch(tmp_path / "run", other, name="vamos.debug"), "fingerprint")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ('{"recipe": "vit', "is not JSON"),
        ("[]", "holds list"),
        ("{}", "recipe is missing or damaged"),
        ('{"recipe": "vit_llama.debug", "config": 3}', "config is missing or damaged"),
    ],
)
def test_checkpoints_whose_record_is_gone_or_damaged(tmp_path, text, says):
    begin(launch(tmp_path / "run"))
    path = tmp_path / "run" / "recipe.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=rf"recipe\.json.* {says}.*give another run_dir=DIR"):
        record.open_training(launch(tmp_path / "run"), "fingerprint")


def test_a_run_whose_only_checkpoint_is_damaged_does_not_begin_anew_unsaid(tmp_path):
    begin(launch(tmp_path / "run"))
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint of this run is intact: .*step-00000004/manifest\.json"):
        record.open_training(launch(tmp_path / "run"), "fingerprint")


def evaluate(run: Launch, source: Path | None) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    record.write(run, record.open_evaluation(run, source))


def test_an_evaluation_never_replaces_the_results_of_training(tmp_path):
    trained = launch(tmp_path / "run")
    begin(trained)
    source = tmp_path / "run" / "checkpoints" / "step-00000004"
    with pytest.raises(UserError, match=f"holds a training run, .* add run_dir={tmp_path}/run/evaluation or another"):
        evaluate(trained, source)
    killed = launch(tmp_path / "killed")  # before its first checkpoint
    killed.folder.mkdir()
    record.write(killed, record.open_training(killed, "fingerprint")[1])
    with pytest.raises(UserError, match="holds a training run"):
        evaluate(killed, source)
    assert "checkpoint" not in json.loads((tmp_path / "killed" / "recipe.json").read_text())


def test_an_evaluation_can_be_repeated_but_not_mixed_with_another(tmp_path, capsys):
    folder, source = tmp_path / "run" / "again", tmp_path / "run" / "checkpoints" / "step-00000004"
    evaluate(launch(folder), source)
    evaluate(launch(folder, "eval.workers=0", "optim.lr=0.5"), source)  # neither decides what is scored
    assert capsys.readouterr().out == ""
    assert json.loads((folder / "recipe.json").read_text())["overrides"] == ["eval.workers=0", "optim.lr=0.5"]
    evaluate(launch(folder), None)
    assert "replaces the evaluation of" in capsys.readouterr().out
    for change, name in (("eval.shards=other", "vit_llama.debug"), ("model.num_classes=9", "vit_llama.debug")):
        more = ["inputs.num_classes=9"] if "classes" in change else []
        with pytest.raises(UserError, match=change.split("=")[0]):
            evaluate(launch(folder, change, *more, name=name), source)
    with pytest.raises(UserError, match="holds an evaluation, whose results training would replace"):
        record.open_training(launch(folder), "fingerprint")


def test_one_switch_decides_the_precision():
    assert record.precision({}) == record.precision({"bf16": {"enabled": False}}) == torch.float32
    assert record.precision({"bf16": {"enabled": True}}) == torch.bfloat16


@pytest.mark.parametrize(
    "place",
    ["model.projection_from", "model.tower.path", "model.tower.vision_path", "model.llama.path", "model.opt.path"],
)
def test_weights_may_lie_elsewhere(place):
    """What they are is compared by hash when a checkpoint is loaded."""
    for free in (record.MAY_CHANGE, record.NOT_EVALUATED):
        assert record._within(f"{place}: a -> b", free)
        assert not record._within(f"{place.rpartition('.')[0]}.dtype: a -> b", free)


def test_a_run_goes_on_with_towers_weights_elsewhere(tmp_path):
    begin(launch(tmp_path / "run", "model.tower.path=a.pth", name="video_llama.debug"))
    moved = launch(tmp_path / "run", "model.tower.path=b.pth", name="video_llama.debug")
    assert record.open_training(moved, "fingerprint")[0]


def test_a_stop_is_noted_and_kept(tmp_path, capsys):
    run = launch(tmp_path / "run")
    record.note_stop(run, begin(run), 4, "SIGUSR1")
    _, about = record.open_training(run, "fingerprint")
    record.write(run, about)
    record.note_stop(run, about, 6, "SIGTERM")
    written = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert written["stopped"] == [{"step": 4, "why": "SIGUSR1"}, {"step": 6, "why": "SIGTERM"}]
    assert len(written["resumed"]) == 1
    capsys.readouterr()
    record.note_stop(launch(tmp_path / "gone"), about, 8, "SIGTERM")
    assert "that SIGTERM ended this run is not noted: " in capsys.readouterr().out


def test_others_leave_when_a_stop_is_noted(tmp_path, monkeypatch):
    """Else a launcher that sees them end ends rank 0 before it has told; but they wait for some seconds at most."""
    run = launch(tmp_path / "run", processes=2)
    other = replace(run, world=replace(run.world, rank=1))
    about = begin(run)
    monkeypatch.setattr(record, "_NOTED_SECONDS", 60.0)
    waits = threading.Thread(target=record.note_stop, args=(other, about, 4, "SIGTERM"), daemon=True)
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    record.note_stop(run, about, 4, "SIGTERM")
    waits.join(60)
    assert not waits.is_alive()
    monkeypatch.setattr(record, "_NOTED_SECONDS", 0.1)
    record.note_stop(other, json.loads((tmp_path / "run" / "recipe.json").read_text()), 6, "SIGTERM")
