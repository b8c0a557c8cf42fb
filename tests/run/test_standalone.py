"""A model in the place that evaluation gives it."""

from dataclasses import replace

import pytest
import torch

from vlm.distributed import World
from vlm.models.opt_base import OptBaseConfig
from vlm.recipe import as_continued, load
from vlm.run.standalone import Replica

ALONE = World(0, 1, 0, torch.device("cpu"), "single")
OPT = OptBaseConfig(dim=32, layers=2, heads=2, hidden=64, vocab_size=320, dtype="bfloat16")


@pytest.mark.parametrize("which", ["llama", "opt"])
def test_frozen_weights_stay_as_they_are_stored(which):
    if which == "llama":
        config = load("video_llama.debug", ["model.llama.dtype=bfloat16"]).model
    else:
        config = replace(load("video_llama.debug_gebc").model, llama=None, opt=OPT)
    model = Replica(config.build(), ALONE, torch.float32).model
    assert {p.dtype for p in model.llm.parameters()} == {torch.bfloat16}
    assert {p.dtype for n, p in model.named_parameters() if model.trainable(n)} == {torch.float32}
    model = Replica(model, ALONE, torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("which", ["", "_vicuna13b", "_llama2", "_ziya", "_billa"])
def test_published_stages_store_all_that_is_frozen_in_bf16(stage, which):
    model = load(f"video_llama.{stage}{which}").model
    assert (model.tower.dtype, model.llama.dtype) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    "name", ["video_llama.finetune", "video_llama.pretrain", "vamos.nextqa_cap", "vit_llama.ssv2_s"]
)
def test_a_checkpoint_stands_for_what_training_began_with(name):
    model = as_continued(load(name)).model
    assert model.init_from is None
    assert getattr(model, "projection_from", None) is None
