"""Freezing and unfreezing between a run and its continuation: values, moments, step counts, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.run.launching import ROOT, run, train_arguments
from tests.run.restoring import BASE, HEAD, LR, save, start, step
from vlm.distributed import World, join
from vlm.models.trained import start_from
from vlm.run import checkpoint, restore, zero_state
from vlm.run.restore import Tensors
from vlm.types import UserError

OTHER = ("unfreeze=llama.layers.0.mlp.up_proj", "freeze=head")


@pytest.fixture(scope="module")
def world() -> World:
    return join()


def values(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def slow(*forms: str) -> Any:
    """A pair of engines that is tried in the slow tier."""
    return pytest.param(forms, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "forms", [("0", "2"), *(slow(*forms) for forms in (("2", "3"), ("3", "0"), ("2_bf16", "0_bf16"), ("0", "0")))]
)
def test_another_choice_at_a_continuation(world: World, tmp_path: Path, forms: tuple[str, str]) -> None:
    writer, reader = forms
    first, _ = start(world, writer)
    base = dict(first.model.named_parameters())[BASE]
    frozen = (base.ds_tensor if hasattr(base, "ds_tensor") else base.detach()).float().flatten().clone()
    for number in range(3):
        step(first, number)
    one = save(first, tmp_path, 3)

    second, chosen = start(world, reader, OTHER, one)
    assert chosen.sentences[2:] == [
        "newly trains: 1 tensor (llama.layers.0.mlp.up_proj.weight; 16,384 parameters), from the values they had, with "
        "optimizer state that begins anew",
        "trains no more: 2 tensors (head.weight, head.bias; 200 parameters), kept as trained and carried on; its "
        "optimizer state is left behind",
    ]
    counts = zero_state.step_counts(second)
    assert counts.pop(BASE) == 0
    assert set(counts.values()) == {3}
    assert not set(HEAD) & counts.keys()
    before = save(second, tmp_path / "again", 3)
    assert set(values(before)) == {*values(one), BASE}
    for name, value in values(one).items():
        assert torch.equal(values(before)[name], value), name
    assert torch.equal(values(before)[BASE].bfloat16().float().flatten(), frozen.bfloat16().float())
    step(second, 3)
    two = save(second, tmp_path, 4)
    # Adam's first step of a tensor is the learning rate in the direction of its gradient, wherever that is not 0
    # (weight decay is 0): right only where its own steps are counted.
    moved = (values(two)[BASE] - values(before)[BASE]).abs()
    assert float(moved.max()) == pytest.approx(LR, rel=1e-3)
    assert float(moved.median()) == pytest.approx(LR, rel=1e-2)
    for name in HEAD:
        assert torch.equal(values(two)[name], values(one)[name]), name
    assert state(two)["adam_steps"] == 4
    assert state(two)["adam_steps_of"] == {BASE: 1}
    moments = load_file(two / "optimizer.safetensors")
    assert f"exp_avg/{BASE}" in moments
    assert not any("head" in name for name in moments)
    manifest = checkpoint.verify(two)
    assert manifest["frozen_hash"] == first.model.frozen_hash()
    assert manifest["frozen"] == first.model.frozen_hashes()

    third, chosen = start(world, writer, (), two)  # as at first: what was unfrozen stays as it was trained
    assert [sentence.split(":")[0] for sentence in chosen.sentences] == ["newly trains", "trains no more"]
    step(third, 4)
    three = save(third, tmp_path, 5)
    assert torch.equal(values(three)[BASE], values(two)[BASE])
    assert not torch.equal(values(three)[HEAD[0]], values(two)[HEAD[0]])
    assert state(three)["adam_steps_of"] == dict.fromkeys(HEAD, 1)


@pytest.mark.parametrize("form", ["1_bf16", *(pytest.param(form, marks=pytest.mark.slow) for form in ("0", "2", "3"))])
def test_a_run_with_several_step_counts_goes_on_to_the_bit(world: World, tmp_path: Path, form: str) -> None:
    first, _ = start(world, form)
    step(first, 0)
    second, _ = start(world, form, OTHER, save(first, tmp_path, 1))
    step(second, 1)
    middle = save(second, tmp_path, 2)
    expected = [step(second, number) for number in (2, 3)]
    end = save(second, tmp_path, 4)

    again, chosen = start(world, form, OTHER, middle)
    assert len(chosen.sentences) == 2  # what freeze and unfreeze do; nothing is new
    assert [step(again, number) for number in (2, 3)] == expected
    other = save(again, tmp_path / "again", 4)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (end / name).read_bytes() == (other / name).read_bytes()
    assert state(end)["adam_steps_of"] == state(other)["adam_steps_of"] == {BASE: 3}


def test_frozen_from_the_start_is_held_by_checkpoints(world: World, tmp_path: Path) -> None:
    """What has no other source must be in the checkpoint, though it does not train; in fp32 in a bf16 engine too."""
    engine, chosen = start(world, "2_bf16", ("freeze=patch_embed",))
    assert chosen.sentences[0].startswith("freeze: 2 tensors (patch_embed.proj.weight, patch_embed.proj.bias;")
    kept = {name: value.clone() for name, value in engine.model.carried.items()}
    step(engine, 0)
    folder = save(engine, tmp_path, 1)
    for name, value in kept.items():
        assert torch.equal(values(folder)[name], value), name
        assert not torch.equal(value.bfloat16().float(), value) or value.ndim == 1
    again, _ = start(world, "0", ("freeze=patch_embed",), folder)
    for name, value in kept.items():
        assert torch.equal(again.model.get_parameter(name), value), name


def test_another_base_is_refused_by_name_also_where_some_of_it_was_trained(world: World, tmp_path: Path) -> None:
    engine, _ = start(world, "0", ("unfreeze=llama.layers.0.mlp",))
    step(engine, 0)
    folder = save(engine, tmp_path, 1)
    with pytest.raises(UserError, match=r"other frozen weights .*: llama\.layers\.0\.self_attn\.q_proj\.weight, "):
        start(world, "0", ("model.llama.random_seed=5",), folder)


def test_a_base_that_differs_in_what_the_checkpoint_holds_alone_will_do(world: World, tmp_path: Path) -> None:
    engine, _ = start(world, "0", ("unfreeze=llama.layers.0.mlp.up_proj",))
    step(engine, 0)
    folder = save(engine, tmp_path, 1)
    fresh, _ = start(world, "0")
    with torch.no_grad():
        fresh.model.get_parameter(BASE).add_(1)
    fresh.model.freeze()
    assert fresh.model.frozen_hash() != engine.model.frozen_hash()
    restore.load_weights(folder, fresh.model)
    assert torch.equal(fresh.model.get_parameter(BASE), values(folder)[BASE])


def test_init_from_brings_what_was_unfrozen(world: World, tmp_path: Path) -> None:
    """A stage that trained some of the base, and the stages after it: as it was trained there, training or not."""
    engine, _ = start(world, "0", ("unfreeze=llama.layers.0.mlp.up_proj",))
    step(engine, 0)
    folder = save(engine, tmp_path, 1)
    fresh, _ = start(world, "0")
    model = fresh.model
    start_from(model, folder)
    assert torch.equal(model.get_parameter(BASE), values(folder)[BASE])
    assert torch.equal(model.carried[BASE], values(folder)[BASE])
    assert not model.get_parameter(BASE).requires_grad
    chosen = restore.choose(model, fresh.recipe, None, {})
    assert "of the base as they were trained there" in chosen.sentences[0]
    model.train_only({BASE, *HEAD})
    assert BASE not in model.carried
    assert HEAD[0] not in model.carried
    assert "fc_norm.weight" in model.carried
    assert torch.equal(model.get_parameter(BASE), values(folder)[BASE])


@pytest.mark.parametrize("given", ["unfreeze=llama.layers.0.mpl", "freeze=heads", "freeze=*"])
def test_names_without_meaning_are_refused(world: World, given: str) -> None:
    with pytest.raises(UserError, match=rf"{given.replace('*', '.')}"):
        start(world, "0", (given,))


def test_elements_are_read_where_they_stand(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5).bfloat16(), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    file = Tensors(tmp_path / "x.safetensors")
    assert set(file.names()) == {"a", "b", "c"}
    assert torch.equal(file.part("a", 3, 5), torch.arange(3.0, 8.0))
    assert torch.equal(file.part("b", 0, 5), tensors["b"])
    assert file.part("c", 0, 0).numel() == 0
    with pytest.raises(AssertionError):
        file.part("a", 8, 5)
    (tmp_path / "y").write_bytes(b"\x07\x00\x00\x00\x00\x00\x00\x00no json")
    with pytest.raises(UserError, match="y: cannot be read"):
        Tensors(tmp_path / "y")


@pytest.mark.slow
def test_two_processes_at_every_stage(tmp_path: Path) -> None:
    """ZeRO 2 and 3 in two processes, and from one to the other, as one process at stage 0 does."""
    printed = run([str(ROOT / "tests" / "run" / "restore_worker.py"), str(tmp_path)], processes=2)
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT "))[7:])
    assert len(found) == 3
    world = join()
    first, _ = start(world, "0")
    want = [step(first, number) for number in range(2)]
    second, _ = start(world, "0", OTHER, save(first, tmp_path / "alone", 2))
    want += [step(second, number) for number in (2, 3)]
    last = values(save(second, tmp_path / "alone", 4))
    for way, losses in found.items():
        assert losses == pytest.approx(want, rel=1e-5), way
        held = values(tmp_path / way / "step-00000004")
        assert held.keys() == last.keys()
        for name, value in held.items():
            torch.testing.assert_close(value, last[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_the_command_says_what_changes(shape_shards: Path, tmp_path: Path) -> None:
    """The real command, two processes at ZeRO 3: three steps, then five with another choice."""
    run_dir = tmp_path / "run"
    common = ["checkpoint_every=1", "eval.at_end=false", "audit_steps=1"]
    config = ROOT / "ds_configs" / "zero3.json"
    hardware = json.loads(config.read_text()) | {"bf16": {"enabled": False}, "train_micro_batch_size_per_gpu": 2}
    (tmp_path / "zero3.json").write_text(json.dumps(hardware))

    def go(*settings: str, expect: int = 0) -> str:
        arguments = train_arguments(shape_shards, run_dir, *common, *settings)
        arguments[arguments.index("--deepspeed_config") + 1] = str(tmp_path / "zero3.json")
        return run(arguments, processes=2, expect=expect)

    go("steps=8", "freeze=head", "checkpoint_keep=9")
    kept = values(run_dir / "checkpoints" / "step-00000003")["head.weight"]
    for number in range(4, 9):
        folder = run_dir / "checkpoints" / f"step-{number:08d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    printed = go("steps=8", "unfreeze=llama.layers.0.mlp")
    assert "changed since the run began: freeze: ['head'] -> []" in printed
    assert "newly trains: 5 tensors (" in printed
    assert "resuming from" in printed
    latest = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()
    assert latest.name == "step-00000008"
    assert not torch.equal(values(latest)["head.weight"], kept)
    assert BASE in values(latest)
    told = go("steps=8", "unfreeze=llama.layers.0.mpl", expect=1)  # torchrun's; the processes' own is 2
    assert "did you mean llama.layers.0.mlp" in told
