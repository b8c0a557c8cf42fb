"""Every shipped recipe loads, builds, prints and agrees with what was published."""

import dataclasses
import importlib
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch

from vlm.config import describe, to_dict
from vlm.data.chats import ChatConfig
from vlm.data.questions import QuestionConfig
from vlm.models.llama_base import llama
from vlm.recipe import METRICS, OptimConfig, TrainData, check_files, check_inputs, families, load, names
from vlm.run.train import schedule_of, steps_of
from vlm.types import UserError

SSV2_TRAIN = 168_913
MIGRATING = (Path(__file__).resolve().parent.parent / "docs" / "migrating.md").read_text()


@pytest.mark.parametrize("name", names())
def test_every_recipe_builds_and_documents_itself(name):
    recipe = load(name)
    json.dumps(to_dict(recipe))
    undocumented = [path for path, _, _, text in describe(recipe) if not text]
    assert undocumented == []
    begins = ("init_from", "projection_from")
    overrides = [f"model.{name}=none" for name in begins if hasattr(recipe.model, name)]
    with torch.device("meta"):
        model = load(name, overrides).model.build()
    if isinstance(recipe.inputs, QuestionConfig):
        assert recipe.inputs.use_video == recipe.model.use_video
        sizes = [(part.num_frames, part.feature_dim) for part in (recipe.inputs, recipe.model)]
        assert sizes[0] == sizes[1] or not recipe.model.use_video
        assert ("caption" in recipe.views) == (recipe.inputs.caption_target is not None)
        return
    if isinstance(recipe.inputs, ChatConfig):
        recipe.inputs.check_views(recipe.views)
        assert recipe.eval.metric in METRICS[recipe.inputs.task]
        return
    if recipe.inputs.task == "caption":
        assert recipe.inputs.num_video_tokens == recipe.model.places
        assert recipe.inputs.num_frames <= recipe.model.max_frames
        recipe.inputs.check_views(recipe.views)
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


@pytest.mark.parametrize(
    ("name", "trained", "lr", "min_lr", "warmup", "batch", "length", "weight_decay"),
    [
        ("video_llama.pretrain", 22_104_064, 1e-4, 8e-5, 2500, 256, 12_500, 0.05),
        ("video_llama.pretrain_vicuna13b", 22_891_520, 1e-4, 8e-5, 2500, 256, 12_500, 0.05),
        ("video_llama.finetune", 22_104_064, 3e-5, 1e-5, 1000, 32, 3000, 0.05),
        ("video_llama.finetune_llama2", 22_104_064, 3e-5, 1e-5, 1000, 32, 3000, 0.05),
        ("video_llama.gebc_opt13b", 45_445_376, 8e-5, 1e-5, 5000, 16, None, 0.001),
        ("video_llama.gebc_opt6_7b", 22_696_192, 1e-4, 8e-5, 5000, 16, None, 0.001),
        ("video_llama.gebc_opt2_7b", 21_515_008, 1e-4, 8e-5, 1000, 16, None, 0.001),
        ("video_llama.gebc_llama7b", 22_696_192, 1e-4, 8e-5, 5000, 16, None, 0.001),
    ],
)
def test_published_numbers_of_video_llama(name, trained, lr, min_lr, warmup, batch, length, weight_decay):
    recipe = load(name)
    optim = recipe.optim
    assert (optim.lr, optim.min_lr, optim.warmup_lr, optim.warmup_steps) == (lr, min_lr, 1e-6, warmup)
    assert (optim.betas, optim.weight_decay, recipe.global_batch_size) == ((0.9, 0.999), weight_decay, batch)
    assert (recipe.steps, recipe.epochs) == (length, None if length else 5)
    schedule = schedule_of(recipe, 1_000_000, 20_000)
    assert schedule(0) == pytest.approx(1e-6)
    turn = 0.5 * (1 + math.cos(math.pi * warmup / 20_000))
    assert schedule(warmup) == pytest.approx(min_lr + (lr - min_lr) * turn)
    begins = [f"model.{field}=none" for field in ("init_from", "projection_from") if hasattr(recipe.model, field)]
    with torch.device("meta"):
        model = load(name, begins).model.build()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


@pytest.mark.parametrize(
    ("name", "trained", "lr", "batch", "epochs", "repeats", "places"),
    [
        ("video_chatgpt.instruct", 4_206_592, 2e-5, 32, 3, (1, 1), 356),
        ("video_chatgpt.breakfast_base", 4_206_592, 2e-4, 2, 1, (12, 2), 1000),
        ("video_chatgpt.breakfast", 670_659_009, 2e-4, 2, 1, (12, 2), 1000),
        ("video_chatgpt.salads", 541_097_984, 2e-4, 2, 3, (150, 90), 1000),
    ],
)
def test_published_numbers_of_video_chatgpt(name, trained, lr, batch, epochs, repeats, places):
    recipe = load(name, ["model.projection_from=none", "model.llama.path=none"])
    optim = recipe.optim
    assert (optim.lr, optim.min_lr, optim.betas, optim.eps) == (lr, 0.0, (0.9, 0.999), 1e-8)
    assert (optim.weight_decay, optim.max_grad_norm) == (0.0, 1.0)
    assert (recipe.global_batch_size, recipe.epochs, recipe.seed) == (batch, epochs, 42)
    assert (recipe.inputs.max_length, recipe.inputs.repeats) == (2048, repeats)
    assert (recipe.inputs.num_video_tokens, recipe.inputs.frame_dim) == (places, 1024)
    total = 1001
    schedule, warmup = schedule_of(recipe, 54_190, total), math.ceil(0.03 * total)
    assert [schedule(step) for step in (0, 1, warmup)] == pytest.approx([0, lr / warmup, lr])
    assert schedule(total - 1) == pytest.approx(0.5 * lr * (1 + math.cos(math.pi * (1 - 1 / (total - warmup)))))
    with torch.device("meta"):
        model = recipe.model.build()
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == trained
    writing = recipe.eval.generation
    assert (writing.max_new_tokens, writing.sample, writing.temperature) == (1024, True, 0.2)
    assert writing.top_k == (25 if recipe.inputs.task == "segments" else 50)


def test_what_trains_of_the_variant():
    """As published but for the embedding, of which the two rows of the marks alone learn there too."""
    llama, words = 4096, 32_006
    block = 4 * llama * llama + 3 * llama * 11_008 + 2 * llama
    projector, marks = 1024 * llama + llama, 2 * llama
    parts = {"norm": llama, "lm_head": llama * words, "blocks": 2 * block, "encoding": 1000 * 1024}
    later = projector + marks + sum(parts.values())
    fused = 24 * parts["encoding"] + 25 * (1001 + projector)
    counted = {}
    for name in ("salads", "breakfast"):
        with torch.device("meta"):
            model = load(f"video_chatgpt.{name}", ["model.projection_from=none"]).model.build()
        counted[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counted == {"salads": later, "breakfast": later + fused}
    published = counted["breakfast"] - marks + llama * words
    assert round(published / 1e6, 1) == 801.7


def test_warmup_is_given_in_one_way_or_another():
    by = {
        "optim.warmup_steps=7": 7,
        "optim.warmup_share=0.1": 11,
        "optim.warmup_share=none optim.warmup_epochs=2": 5,
    }
    for changes, warmup in by.items():
        recipe = load("video_chatgpt.debug", changes.split())
        schedule = schedule_of(recipe, 10, 101)
        assert schedule(warmup) == recipe.optim.lr > schedule(warmup - 1)
    with pytest.raises(UserError, match=r"optim\.warmup_share is 1\.5; it must be from 0 to 1"):
        load("video_chatgpt.debug", ["optim.warmup_share=1.5"])


def test_stages_of_video_llama_hand_over_by_their_recipes():
    for name in ("", "_vicuna13b", "_llama2", "_ziya", "_billa"):
        first, second = load(f"video_llama.pretrain{name}"), load(f"video_llama.finetune{name}")
        assert second.model.init_from == first.run_dir
        assert second.model.llama == first.model.llama
        assert second.inputs.tokenizer == first.inputs.tokenizer == first.model.llama.path
    assert load("video_llama.finetune_llama2").inputs.template == "llama2"
    assert not load("video_llama.finetune_ziya").inputs.frames_message


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


@pytest.mark.parametrize(
    "change",
    [
        "optim.lr=0", "optim.lr=nan", "optim.eps=0", "optim.min_lr=-1", "optim.betas=2,3", "optim.betas=0.9,1",
        "optim.warmup_steps=-3", "optim.warmup_epochs=-1", "optim.weight_decay=-1", "optim.max_grad_norm=-1",
        "optim.layer_decay=0", "data.workers=-1", "data.quarantine_share=7", "data.substitutes=-1", "epochs=nan",
        "epochs=inf", "epochs=0", "epochs=-1", "steps=0", "checkpoint_every=-1", "checkpoint_keep=0", "log_every=0",
        "global_batch_size=0", "audit_steps=-1", "views.label=0", "views.label=nan", "views.label=-1",
        "eval.batch_size=0", "eval.workers=-1", "eval.every=-1", "eval.metric=foo", "eval.metric=accuracy",
    ],
)  # fmt: skip
def test_settings_outside_of_their_range_are_refused(change):
    with pytest.raises(UserError) as caught:
        load("vit_llama.demo", [change])
    path, _, value = change.partition("=")
    message = str(caught.value)
    path = path.removesuffix(".label")
    assert path in message
    assert value.split(",")[0].removesuffix(".0") in message
    assert "must be" in message or "finite" in message
    assert message.count(path) == 1, "the path is said once"


def test_ranges_hold_for_recipes_in_code_too():
    for kind, change in (
        (OptimConfig, {"lr": math.nan}),
        (OptimConfig, {"lr": 1.0, "max_grad_norm": math.nan}),
        (TrainData, {"shards": "x", "quarantine_share": math.nan}),
    ):
        with pytest.raises(ValueError, match="must be"):
            kind(**change)
    recipe = load("vit_llama.demo")
    for views in ({}, {"label": math.inf}, {"label": math.nan}, {"label": 0.0, "other": 0.0}):
        with pytest.raises(ValueError, match="views"):
            dataclasses.replace(recipe, views=views)
    assert dataclasses.replace(recipe, views={"label": 1.0, "other": 0.0}).views["other"] == 0


def test_metrics_that_questions_can_have():
    for metric in ("accuracy", "accuracy_CW"):
        assert load("vamos.debug", [f"eval.metric={metric}"]).eval.metric == metric
    with pytest.raises(UserError, match=r"eval\.metric is top1; it must be accuracy or accuracy_KIND"):
        load("vamos.debug", ["eval.metric=top1"])


@pytest.mark.parametrize("name", names())
def test_every_recipe_has_inputs_that_fit_its_model(name):
    check_inputs(load(name))


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("vit_llama.demo", "inputs.num_frames=4", "model.num_frames is 8, but inputs.num_frames is 4"),
        ("vit_llama.demo", "inputs.size=16", "model.image_size is 32, but inputs.size is 16"),
        ("vit_llama.demo", "model.num_classes=9", "model.num_classes is 9, but inputs.num_classes is 8"),
        ("vit_llama.demo", "model.label_smoothing=0.1", "model.label_smoothing is 0.1"),
        ("vit_llama.demo", "eval.probes=blind", "no probe 'blind'"),
        ("video_mae.debug", "inputs.num_frames=4", "model.num_frames is 8, but inputs.num_frames is 4"),
        ("video_mae.debug", "model.patch_size=16", "model.patch_size is 16, but inputs.patch_size is 8"),
        ("video_mae.debug", "inputs.tubelet_size=4", "model.tubelet_size is 2, but inputs.tubelet_size is 4"),
        ("video_mae.debug", "inputs.mean=0,0,0", "model.mean"),
        ("video_mae.debug", "inputs.std=1,1,1", "model.std"),
        ("vamos.debug", "eval.probes=one_frame", "no probe 'one_frame'"),
    ],
)
def test_numbers_of_model_and_inputs_must_agree(name, change, part):
    with pytest.raises(UserError, match=re.escape(part)):
        check_inputs(load(name, [change]))


def test_inputs_of_another_kind_are_refused():
    clips, masked = load("vit_llama.debug"), load("video_mae.debug")
    for recipe, inputs in ((clips, masked.inputs), (masked, clips.inputs)):
        with pytest.raises(UserError, match=type(inputs).__name__):
            check_inputs(dataclasses.replace(recipe, inputs=inputs))


def test_the_list_of_recipes_is_what_their_modules_define():
    for module, functions in families().items():
        loaded = importlib.import_module(f"vlm.recipes.{module}")
        own = {n for n, f in inspect.getmembers(loaded, inspect.isfunction) if f.__module__ == loaded.__name__}
        assert functions == sorted(name for name in own if not name.startswith("_"))
        assert "debug" in functions


def test_missing_files_are_named_by_their_field():
    with pytest.raises(UserError, match=r"model\.init_from=pretrained/videomae/ssv2_vit_s_2400\.pth"):
        check_files(load("vit_llama.ssv2_s"))
    with pytest.raises(UserError, match=r"model\.llama\.path=pretrained/llama/7B"):
        check_files(load("vit_llama.ssv2_s_llama", ["model.init_from=none"]))
    check_files(load("vit_llama.demo"))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match=r"vamos has vamos\.debug, .*vamos\.nextqa_cap"):
        load("vamos")
    with pytest.raises(UserError, match=r"vit_llama\.ssv2_s_llama"):
        load("vit_llama.ssv2_s_lama")
    with pytest.raises(UserError, match="demo"):
        load("demo")


def test_a_missing_starting_point_is_an_error_not_a_random_start():
    with pytest.raises(UserError, match="ssv2_vit_s_2400"):
        load("vit_llama.ssv2_s").model.build()
    with pytest.raises(UserError, match="pretrained/llama/7B"):
        load("vit_llama.ssv2_s_llama", ["model.init_from=none"]).model.build()


@pytest.mark.parametrize(
    ("name", "recipes", "overrides"),
    re.findall(r"^\| `(llama\w+)` \| (.*?) \| `(.*?)` \|$", MIGRATING.partition("### On another LLaMA")[2], re.M),
)
def test_the_page_makes_a_recipe_one_of_another_llama(name, recipes, overrides):
    """Every row of docs/migrating.md's table gives the published sizes, whichever of its recipes it is added to."""
    families_of_row = re.findall(r"`(\w+)\.\*`", recipes)
    chosen = [recipe for recipe in names() if recipe.split(".")[0] in families_of_row]
    chosen = [recipe for recipe in chosen if load(recipe).model.llama.dim == 4096]
    assert len(chosen) >= 7
    for recipe in chosen:
        changed = load(recipe, overrides.split())
        assert changed.model.llama == llama(name, path=changed.model.llama.path)
        assert changed.model.llama.path.parent == changed.inputs.tokenizer.parent


YAML_FILES = re.findall(
    r"^\| `([\w.…]+)` \| `(video_llama\.\w+)` \| (?:`(.*?)`)? ?\|$",
    MIGRATING.partition("### The YAML files of LLMVA-GEBC")[2],
    re.M,
)


@pytest.mark.parametrize(("file", "name", "overrides"), YAML_FILES)
def test_the_page_makes_a_recipe_one_of_a_yaml_file(file, name, overrides):
    recipe = load(name, overrides.split())
    assert recipe.inputs.num_video_tokens == recipe.model.places
    assert sum(recipe.inputs.other_dims) == (recipe.model.other_dim if recipe.model.other_tokens else 0)
    assert bool(recipe.inputs.other_features) == bool(recipe.model.other_tokens)
    assert recipe.inputs.other_length <= recipe.model.max_other
    assert ("highest_f1" in file) == ("highest_f1" in recipe.data.shards)
    assert len(YAML_FILES) == 12


def test_the_page_names_settings_that_there_are():
    page = MIGRATING.partition("## Video-LLaMA, LLMVA-GEBC")[2]
    recipes = ("video_llama.pretrain", "video_llama.gebc_opt13b", "video_chatgpt.breakfast")
    known = {path for name in recipes for path, *_ in describe(load(name))}
    known |= {path.rpartition(".")[0] for path in known}
    named = set(re.findall(r"`((?:model|inputs|optim|eval|data)\.[\w.]+)", page))
    assert named - known == set()
    assert len(named) > 40
