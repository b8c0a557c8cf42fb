"""Every shipped recipe loads, builds, prints and agrees with what was published."""

import json
import math

import pytest
import torch

from vlm.config import describe, to_dict
from vlm.data.questions import QuestionConfig
from vlm.recipe import load, names
from vlm.run.train import schedule_of, steps_of
from vlm.types import UserError

SSV2_TRAIN = 168_913


@pytest.mark.parametrize("name", names())
def test_every_recipe_builds_and_documents_itself(name):
    recipe = load(name)
    json.dumps(to_dict(recipe))
    undocumented = [path for path, _, _, text in describe(recipe) if not text]
    assert undocumented == []
    overrides = ["model.init_from=none"] if hasattr(recipe.model, "init_from") else []
    with torch.device("meta"):
        model = load(name, overrides).model.build()
    if isinstance(recipe.inputs, QuestionConfig):
        assert recipe.inputs.use_video == recipe.model.use_video
        sizes = [(part.num_frames, part.feature_dim) for part in (recipe.inputs, recipe.model)]
        assert sizes[0] == sizes[1] or not recipe.model.use_video
        assert ("caption" in recipe.views) == (recipe.inputs.caption_target is not None)
        return
    assert set(recipe.views) == ({"pixels"} if name.startswith("video_mae") else {"label"})
    assert model.input_shape[1] == recipe.inputs.num_frames
    assert model.input_shape[2:] == (recipe.inputs.size, recipe.inputs.size)
    if hasattr(recipe.model, "num_classes"):
        assert recipe.model.num_classes == recipe.inputs.num_classes


@pytest.mark.parametrize(
    ("name", "lr", "batch", "epochs", "layer_decay", "trained"),
    [
        ("vit_llama.ssv2_s", 9.375e-5, 24, 40, 0.7, 21_946_926),
        ("vit_llama.ssv2_s_llama", 9.375e-5, 24, 40, 0.7, 25_092_654),
        ("vit_llama.ssv2_b", 2.34375e-5, 12, 30, 0.75, 86_361_006),
        ("vit_llama.ssv2_b_llama", 2.34375e-5, 12, 30, 0.75, 92_652_462),
    ],
)
def test_published_fine_tuning_numbers(name, lr, batch, epochs, layer_decay, trained):
    recipe = load(name, ["model.init_from=none"])
    assert recipe.optim.lr == pytest.approx(lr)
    assert (recipe.global_batch_size, recipe.epochs, recipe.optim.layer_decay) == (batch, epochs, layer_decay)
    with torch.device("meta"):
        model = recipe.model.build()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert (recipe.inputs.repeats, recipe.inputs.test_clips, recipe.inputs.test_crops) == (2, 2, 3)
    assert not recipe.inputs.flip
    total = steps_of(recipe, SSV2_TRAIN)
    assert total == math.ceil(epochs * SSV2_TRAIN / batch)
    schedule = schedule_of(recipe, SSV2_TRAIN, total)
    warmup = int(5 * SSV2_TRAIN / batch)
    assert schedule(0) == 0
    assert schedule(warmup - 1) == schedule(warmup) == pytest.approx(lr)
    assert schedule(total - 1) == pytest.approx(1e-6 * batch / 256, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "max_length", "batch", "epochs", "frames", "lr", "weight_decay"),
    [
        ("vamos.nextqa_cap", 1200, 64, 10, 6, 0.0225, 0.14),
        ("vamos.nextqa_vis", 128, 64, 5, 6, 0.0225, 0.14),
        ("vamos.nextqa_vis_cap", 1200, 64, 10, 6, 0.0225, 0.14),
        ("vamos.intentqa_cap", 512, 64, 5, 6, 0.0225, 0.14),
        ("vamos.intentqa_vis", 128, 64, 5, 6, 0.0225, 0.14),
        ("vamos.intentqa_vis_cap", 1200, 64, 10, 6, 0.0225, 0.14),
        ("vamos.ptest_cap", 1200, 64, 10, 10, 0.0225, 0.14),
        ("vamos.ptest_vis", 256, 64, 5, 10, 0.0225, 0.14),
        ("vamos.ptest_vis_cap", 1200, 64, 10, 10, 0.0225, 0.14),
        ("vico.nextqa", 160, 128, 10, 10, 0.045, 0.14),
        ("vico.star", 160, 128, 10, 10, 0.045, 0.14),
        ("vico.tvqa", 160, 128, 10, 10, 0.045, 0.14),
        ("vico.intentqa", 160, 128, 10, 10, 0.045, 0.14),
        ("llama_vqa.nextqa", 128, 64, 5, 10, 0.0225, 0.14),
        ("llama_vqa.star", 128, 32, 5, 10, 0.01125, 0.16),
        ("llama_vqa.tvqa", 650, 32, 5, 10, 0.00875, 0.02),
    ],
)
def test_published_numbers_of_question_answering(name, max_length, batch, epochs, frames, lr, weight_decay):
    recipe = load(name)
    assert (recipe.inputs.max_length, recipe.global_batch_size, recipe.epochs) == (max_length, batch, epochs)
    assert recipe.inputs.num_frames == frames
    assert recipe.optim.lr == pytest.approx(lr)
    assert (recipe.optim.weight_decay, recipe.optim.betas, recipe.optim.warmup_epochs) == (weight_decay, (0.9, 0.95), 2)
    family, _, run = name.partition(".")
    views = {
        "vamos": {"answer": 1.0},
        "vico": {"answer": 1.0, "caption": 0.5},
        "llama_vqa": {"answer": 1.0, "question": 1.0, "video_order": 1.0},
    }
    assert recipe.views == views[family]
    assert recipe.inputs.alternate == run.endswith("vis_cap")
    assert recipe.model.use_video != (run.endswith("_cap") and not run.endswith("vis_cap"))
    assert recipe.model.temporal_embedding == (recipe.model.video_bias is not None) == (family != "vamos")
    with torch.device("meta"):
        model = recipe.model.build()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    projector = 4096 * 768 if recipe.model.use_video else 0
    extra = 0 if family == "vamos" else 32 * 32 + 10 * 4096
    assert trained == 10 * 32 * 4096 + projector + 32 * 32 + extra


def test_pretraining_numbers():
    recipe = load("video_mae.ssv2_s")
    assert recipe.optim.lr == pytest.approx(1.2e-3)
    assert recipe.optim.betas == (0.9, 0.95)
    assert (recipe.inputs.stride, recipe.inputs.mask_ratio, recipe.epochs) == (2, 0.9, 2400)


def test_steps_decide_over_epochs_only_where_they_are_given():
    assert steps_of(load("vit_llama.ssv2_s", ["steps=7"]), SSV2_TRAIN) == 7
    with pytest.raises(UserError, match="steps=none"):
        load("vit_llama.demo", ["epochs=3"])
    assert load("vit_llama.demo", ["epochs=3", "steps=none"]).epochs == 3
    assert steps_of(load("vit_llama.ssv2_s", ["epochs=1"]), 25) == 2, "an epoch holds every record"
    assert steps_of(load("vit_llama.ssv2_s", ["epochs=2"]), 24) == 2


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match=r"vit_llama\.ssv2_s_llama"):
        load("vit_llama.ssv2_s_lama")
    with pytest.raises(UserError, match="demo"):
        load("demo")


def test_a_missing_starting_point_is_an_error_not_a_random_start():
    with pytest.raises(UserError, match="ssv2_vit_s_2400"):
        load("vit_llama.ssv2_s").model.build()
    with pytest.raises(UserError, match="pretrained/llama/7B"):
        load("vit_llama.ssv2_s_llama", ["model.init_from=none"]).model.build()
