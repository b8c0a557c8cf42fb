"""Checkpoints of runs that trained some of the frozen base: what was trained takes its place, wherever there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.models import small_video
from tests.run.restoring import BASE, recipe, start, step
from tools import convert_ckpt
from vlm.config import to_dict
from vlm.distributed import World, join
from vlm.models.freezing import choose
from vlm.models.trained import put, tensors_of
from vlm.run import checkpoint, restore

pytestmark = pytest.mark.filterwarnings("ignore:the frozen .* RANDOM weights")


@pytest.fixture(scope="module")
def world() -> World:
    return join()


def convert(*arguments: str | Path) -> int:
    return convert_ckpt.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run folder of ViT-LLaMA that trained one matrix of its LLaMA, at ZeRO 2; and all its weights."""
    folder = tmp_path_factory.mktemp("unfrozen")
    engine, _ = start(world, "2", ("unfreeze=llama.layers.0.mlp.up_proj",))
    step(engine, 0)
    progress = checkpoint.Progress(step=1)
    checkpoint.save(folder / "checkpoints", engine, progress, {"recipe": to_dict(recipe())}, keep=1, is_best=False)
    return folder, {name: value.detach().clone() for name, value in engine.model.state_dict().items()}


def test_to_hugging_face_and_to_the_original(run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, want = run
    assert convert(folder, tmp_path / "hf", "--from", "vlm", "--to", "hf") == 0
    assert convert(tmp_path / "hf", tmp_path / "x.pth", "--from", "hf", "--to", "vit_llama") == 0
    assert convert(folder, tmp_path / "y.pth", "--from", "vlm", "--to", "vit_llama") == 0
    back = tmp_path / "back"
    assert convert(tmp_path / "y.pth", back, "--from", "vit_llama", "--to", "vlm") == 0
    found = {n: t for file in convert_ckpt.WEIGHT_FILES for n, t in load_file(back / file).items()}
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(found[name], value), name
    both = [torch.load(tmp_path / f"{name}.pth", weights_only=True)["model"] for name in "xy"]
    assert all(torch.equal(both[0][name], value) for name, value in both[1].items())


def test_to_ours_it_stays_as_training_wrote_it(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, want = run
    assert convert(folder, tmp_path / "ours", "--from", "vlm", "--to", "vlm") == 0
    assert f"holds 1 tensor of the frozen base that the run trained too ({BASE}" in capsys.readouterr().out
    model = recipe().model.build()
    restore.load_weights(tmp_path / "ours", model)
    assert torch.equal(model.get_parameter(BASE), want[BASE])
    assert BASE in model.carried


def test_another_base_is_still_refused(
    run: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    other = ("--recipe", "vit_llama.debug", "model.llama.random_seed=5")
    assert convert(folder, tmp_path / "hf", "--from", "vlm", "--to", "hf", *other) == 1
    assert "not those it was trained with" in capsys.readouterr().err


def test_a_format_without_a_place_for_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_video.video_llama()
    choose(model, (), ("llm.model.norm",))
    with torch.no_grad():
        model.get_parameter("llm.model.norm.weight").fill_(0.5)
    tensors = {name: value.detach().clone() for name, value in tensors_of(model).items()}
    state = {"step": 3, "recipe": {"model": to_dict(model.config)}}
    folder = checkpoint.write(tmp_path / "run", state, tensors, {}, model.frozen_hash())
    assert convert(folder, tmp_path / "x.pth", "--from", "vlm", "--to", "video_llama") == 1
    said = capsys.readouterr().err
    assert "holds 1 tensor of the frozen base that the run trained too (llm.model.norm.weight)" in said
    assert "Mend: --to vlm" in said
    assert convert(folder, tmp_path / "ours", "--from", "vlm", "--to", "vlm") == 0
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    again = small_video.video_llama()
    put(again, load_file(tmp_path / "ours" / "model.safetensors"), manifest, "it")
    assert bool((again.carried["llm.model.norm.weight"] == 0.5).all())
