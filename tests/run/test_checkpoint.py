"""A checkpoint is whole or it is not there; any stage and any number of processes reads any."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm.config import override
from vlm.data.loader import MicroBatch
from vlm.distributed import join
from vlm.models import trained
from vlm.recipe import load
from vlm.run import checkpoint, restore
from vlm.run.checkpoint import Progress
from vlm.run.engine import Engine, derive
from vlm.tensor_files import seal
from vlm.types import Batch, UserError


@pytest.fixture(scope="module")
def world():
    return join()


def make_engine(world, stage=0, seed=0):
    recipe = override(load("vit_llama.debug"), ["steps=3", "global_batch_size=2"])
    torch.manual_seed(seed)
    model = recipe.model.build()
    hardware = {"train_micro_batch_size_per_gpu": 2, **({"zero_optimization": {"stage": stage}} if stage else {})}
    return model, recipe, derive(hardware, recipe, world.size)


def step(engine, number):
    generator = torch.Generator().manual_seed(number)
    video = torch.randn(2, *engine.model.input_shape, generator=generator)
    batch = Batch(keys=("a", "b"), video=video, label=torch.tensor([1, 2]))
    return engine.step([MicroBatch(batch, 1)], lr=1e-3).loss


def save(engine, root, number, keep=2, is_best=False):
    return checkpoint.save(root, engine, Progress(step=number), {"recipe": {}}, keep=keep, is_best=is_best)


@pytest.mark.parametrize(("writer", "reader"), [(0, 2), (2, 0), (1, 3), (3, 1)])
def test_any_zero_stage_continues_any_other(world, tmp_path, writer, reader):
    first = Engine(*make_engine(world, writer), world)
    step(first, 0)
    step(first, 1)
    folder = save(first, tmp_path, 2)
    expected = [step(first, 2), step(first, 3)]

    model, recipe, config = make_engine(world, reader, seed=9)
    state = restore.load_weights(folder, model)
    second = Engine(model, recipe, config, world)
    restore.load_optimizer(folder, second, state)
    assert [step(second, 2), step(second, 3)] == pytest.approx(expected, rel=1e-6)


def test_layout_manifest_and_no_frozen_weights(world, tmp_path):
    engine = Engine(*make_engine(world), world)
    folder = save(engine, tmp_path, 1)
    manifest = checkpoint.verify(folder)
    names = {name for name, p in engine.model.named_parameters() if p.requires_grad}
    assert set(manifest["tensors"]) == names
    assert not any(name.startswith("llama.") for name in names)
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert manifest["frozen_hash"] == engine.model.frozen_hash()
    assert (tmp_path / "latest").read_text().strip() == folder.name == "step-00000001"


def test_pruning_keeps_the_newest_and_the_best(world, tmp_path):
    engine = Engine(*make_engine(world), world)
    (tmp_path / ".step-00000009.tmp").mkdir()
    for number in range(1, 6):
        save(engine, tmp_path, number, keep=2, is_best=number == 2)
    assert checkpoint.steps(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]
    assert (tmp_path / "best").read_text().strip() == "step-00000002"
    assert not list(tmp_path.glob(".step-*"))


def test_what_was_just_written_stays_where_the_run_went_back_behind_a_damaged_one(world, tmp_path):
    engine = Engine(*make_engine(world), world)
    save(engine, tmp_path, 200, keep=1, is_best=True)
    damaged = save(engine, tmp_path, 300, keep=1)
    (damaged / "model.safetensors").write_bytes(b"")
    found, passed_over = checkpoint.newest(tmp_path)
    assert found.name == "step-00000200"
    assert str(damaged) in passed_over[0]
    save(engine, tmp_path, 250, keep=1)
    assert checkpoint.steps(tmp_path) == ["step-00000200", "step-00000250"]
    assert checkpoint.resolve(tmp_path).name == "step-00000250"


def test_a_checkpoint_whose_manifest_is_gone_is_told(world, tmp_path):
    engine = Engine(*make_engine(world), world)
    whole = save(engine, tmp_path, 1)
    damaged = save(engine, tmp_path, 2)
    (damaged / "manifest.json").unlink()
    found, passed_over = checkpoint.newest(tmp_path)
    assert found == whole
    assert len(passed_over) == 1
    assert f"{damaged}/manifest.json" in passed_over[0]


def test_a_copy_that_somebody_made_is_neither_taken_nor_removed(world, tmp_path):
    engine = Engine(*make_engine(world), world)
    first = save(engine, tmp_path, 1, keep=1)
    copies = [shutil.copytree(first, tmp_path / name) for name in ("step-00000001.good", "step-00000009-old", "step-x")]
    second = save(engine, tmp_path, 2, keep=1)
    assert checkpoint.newest(tmp_path) == (second, [])
    assert checkpoint.steps(tmp_path) == [second.name]
    for copy in copies:
        checkpoint.verify(copy)


def test_garbage_in_latest_and_best_does_not_end_a_run(world, tmp_path):
    engine = Engine(*make_engine(world), world)
    first = save(engine, tmp_path, 1, is_best=True)
    for name in ("latest", "best"):
        (tmp_path / name).write_bytes(b"\0\xff\xfe\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
    fresh = make_engine(world, seed=1)[0]
    with pytest.warns(UserWarning, match=f"{first.name} is taken instead"):
        assert checkpoint.resolve(tmp_path) == first
    with pytest.warns(UserWarning, match=f"{first.name} is taken instead"):
        trained.start_from(fresh, tmp_path / "run")
    assert torch.equal(fresh.head.weight, engine.model.head.weight)
    second = save(engine, tmp_path, 2, keep=1)
    assert checkpoint.newest(tmp_path) == (second, [])
    assert (tmp_path / "latest").read_text() == f"{second.name}\n"


def test_a_damaged_step_that_is_made_again_is_replaced(world, tmp_path):
    engine = Engine(*make_engine(world), world)
    save(engine, tmp_path, 1)
    (save(engine, tmp_path, 2) / "state.json").unlink()
    again = save(engine, tmp_path, 2)
    checkpoint.verify(again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_a_trained_tensor_that_is_not_written_is_an_error_by_name(world, tmp_path, monkeypatch):
    engine = Engine(*make_engine(world), world)
    save(engine, tmp_path, 1)
    whole = checkpoint.zero_state.fragments
    for name, start, cut in (
        ("head.weight", 0, 0),
        ("head.weight", 0, -1),
        ("fc_norm.bias", 1, None),
    ):

        def fragments(engine, name=name, start=start, cut=cut):
            for fragment in whole(engine):
                if fragment.name == name:
                    values = {kind: value[start:cut] for kind, value in fragment.values.items()}
                    fragment = replace(fragment, start=start, values=values)
                yield fragment

        monkeypatch.setattr(checkpoint.zero_state, "fragments", fragments)
        with pytest.raises(
            UserError, match=rf"step-00000002: would not hold what trains.*3 missing or in part.*{name}"
        ):
            save(engine, tmp_path, 2, is_best=True)
        assert (tmp_path / "latest").read_text().strip() == "step-00000001"
        assert not (tmp_path / "best").exists()
    monkeypatch.setattr(checkpoint.zero_state, "fragments", whole)
    save(engine, tmp_path, 3)
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize("trains", [True, False])
def test_what_trains_must_be_what_the_engine_was_built_to_train(world, tmp_path, trains):
    engine = Engine(*make_engine(world), world)
    parameters = dict(engine.model.named_parameters())
    name = "llama.norm.weight" if trains else "head.bias"
    parameters[name].requires_grad_(trains)
    with pytest.raises(UserError, match=rf"not what the engine was built to train(.|\n)*{name}"):
        save(engine, tmp_path, 1)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_damage_is_found_by_name(world, tmp_path, damage):
    folder = save(Engine(*make_engine(world), world), tmp_path, 1)
    target = folder / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = target.read_bytes()
    if damage == "flip":
        target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        target.unlink()
    else:
        target.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        checkpoint.verify(folder)
    assert "manifest.json" in str(caught.value) or target.name in str(caught.value)
    with pytest.raises(UserError, match="no checkpoint of this run is intact"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("files", [[], {}, None, {"model.safetensors": 3}, "model.safetensors"])
def test_a_manifest_that_lists_no_files_verifies_nothing(world, tmp_path, files):
    folder = save(Engine(*make_engine(world), world), tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(seal(manifest | {"files": files})))
    with pytest.raises(UserError, match=r"manifest\.json: lists no files"):
        checkpoint.verify(folder)


def test_what_is_needed_must_be_listed(world, tmp_path):
    model, recipe, config = make_engine(world)
    folder = save(Engine(model, recipe, config, world), tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("optimizer.safetensors", "model.safetensors"):
        del manifest["files"][name]
        (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
        with pytest.raises(UserError, match=rf"{name}: is missing"):
            checkpoint.newest(tmp_path)
        if name.startswith("optimizer"):
            restore.load_weights(folder, model)  # enough for a test
    with pytest.raises(UserError, match=r"model\.safetensors: is missing"):
        restore.load_weights(folder, model)


def test_other_frozen_weights_are_refused(world, tmp_path):
    folder = save(Engine(*make_engine(world), world), tmp_path, 1)
    recipe = override(load("vit_llama.debug"), ["model.llama.random_seed=5"])
    with pytest.raises(UserError, match="other frozen weights"):
        restore.load_weights(folder, recipe.model.build())


def test_another_shape_is_refused_by_name(world, tmp_path):
    folder = save(Engine(*make_engine(world), world), tmp_path, 1)
    recipe = override(load("vit_llama.debug"), ["model.num_classes=9", "inputs.num_classes=9"])
    with pytest.raises(UserError, match=r"head\.weight"):
        restore.load_weights(folder, recipe.model.build())


def test_resolve_takes_a_checkpoint_a_run_or_says_what_is_missing(world, tmp_path):
    folder = save(Engine(*make_engine(world), world), tmp_path / "checkpoints", 1)
    for path in (folder, tmp_path, tmp_path / "checkpoints"):
        assert checkpoint.resolve(path) == folder
    for pointer in ("step-00000009", None):  # `latest` names none that is there, or is gone
        latest = tmp_path / "checkpoints" / "latest"
        latest.write_text(pointer) if pointer else latest.unlink()
        with pytest.warns(UserWarning, match=f"{latest} .*: {folder} is taken instead$"):
            assert checkpoint.resolve(tmp_path) == folder
    with pytest.raises(UserError, match="neither a checkpoint"):
        checkpoint.resolve(Path("nowhere"))
    (tmp_path / "released.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"released\.pth: is a file.*tools/convert_ckpt\.py .*released\.pth FOLDER"):
        checkpoint.resolve(tmp_path / "released.pth")
    assert json.loads((folder / "state.json").read_text())["adam_steps"] == 0
