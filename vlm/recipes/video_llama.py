"""Video-LLaMA (arXiv 2306.02858) in two stages, and LLMVA-GEBC (arXiv 2306.10354), which writes what changes at a
boundary of an action.

Numbers are those of the published configurations; `docs/migrating.md` has them key by key. There is no audio branch.
Where files are expected is what each recipe says (`--help-all`): a path is changed on the command line.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vlm.data.boundaries import BoundaryConfig
from vlm.data.dialogues import IMAGE_LINES, DialogueConfig
from vlm.models.eva import TowerConfig
from vlm.models.generation_config import GenerationConfig
from vlm.models.glimpse import GlimpseEncoder
from vlm.models.llama_base import LlamaBaseConfig, llama
from vlm.models.llmva import LlmvaConfig
from vlm.models.opt_base import opt
from vlm.models.story_dialogues import ASK
from vlm.models.text_base import dialogue_base
from vlm.models.video_llama import VideoLlamaConfig
from vlm.nn.qformer import QFormerConfig
from vlm.recipe import EvalConfig, OptimConfig, Recipe, TrainData

_BLIP2 = Path("pretrained/blip2")
_MINIGPT4 = Path("pretrained/minigpt4")
_PROJECTIONS = {4096: _MINIGPT4 / "pretrained_minigpt4_7b.pth", 5120: _MINIGPT4 / "pretrained_minigpt4.pth"}  # by width


# Video-LLaMA ----------------------------------------------------------------------------------------------------------


def pretrain() -> Recipe:
    """Stage 1 with Vicuna-7B v0: captions of WebVid's clips and of the images of LLaVA-CC3M-595k, 100 to 24."""
    return Recipe(
        model=VideoLlamaConfig(
            tower=TowerConfig(
                path=_BLIP2 / "blip2_pretrained_flant5xxl.pth", vision_path=_BLIP2 / "eva_vit_g.pth", dtype="bfloat16"
            ),
            llama=llama("vicuna_7b_v0", path=Path("pretrained/vicuna-7b-v0"), dtype="bfloat16"),
            projection_from=_PROJECTIONS[4096],
        ),
        inputs=DialogueConfig(tokenizer=Path("pretrained/vicuna-7b-v0")),
        data=TrainData(shards="data/webvid/shards/train:100,data/cc3m/shards/train:24", workers=8),
        optim=_optim(1e-4, 8e-5, warmup=2500, weight_decay=0.05),
        views={"caption": 1.0},
        global_batch_size=256,
        steps=12_500,
        eval=_test("data/webvid/shards/val"),
        run_dir=Path("runs/video_llama/pretrain"),
        checkpoint_every=2500,
    )


def finetune() -> Recipe:
    """Stage 2 with Vicuna-7B v0: MiniGPT-4's detailed captions, LLaVA's and VideoChat's dialogues, a third each.

    A third of the samples are captions and two thirds dialogues, each averaged over its own tokens: hence the weights,
    with which a step is what three steps of the original, each on one of the sets, are together.
    """
    recipe = pretrain()
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, projection_from=None, init_from=Path("runs/video_llama/pretrain")),
        inputs=dataclasses.replace(recipe.inputs, prompts=IMAGE_LINES, caption_end="###", max_caption_length=320),
        data=TrainData(
            shards="data/cc_sbu_align/shards/train:1,data/llava_instruct/shards/train:1,data/videochat/shards/train:1"
        ),
        optim=_optim(3e-5, 1e-5, warmup=1000, weight_decay=0.05),
        views={"caption": 1 / 3, "dialogue": 2 / 3},
        global_batch_size=32,
        steps=3000,
        eval=_test("data/videochat/shards/val", max_new_tokens=300),
        run_dir=Path("runs/video_llama/finetune"),
        checkpoint_every=1000,
    )


def pretrain_vicuna13b() -> Recipe:
    """Stage 1 with Vicuna-13B v0."""
    return _reads(
        pretrain(), llama("vicuna_13b_v0", path=Path("pretrained/vicuna-13b-v0"), dtype="bfloat16"), "vicuna13b"
    )


def finetune_vicuna13b() -> Recipe:
    """Stage 2 with Vicuna-13B v0."""
    return _reads(
        finetune(), llama("vicuna_13b_v0", path=Path("pretrained/vicuna-13b-v0"), dtype="bfloat16"), "vicuna13b"
    )


def pretrain_llama2() -> Recipe:
    """Stage 1 with LLaMA-2-7B-chat."""
    return _reads(pretrain(), llama("llama2_7b", path=Path("pretrained/llama-2-7b-chat"), dtype="bfloat16"), "llama2")


def finetune_llama2() -> Recipe:
    """Stage 2 with LLaMA-2-7B-chat and its template."""
    recipe = _reads(finetune(), llama("llama2_7b", path=Path("pretrained/llama-2-7b-chat"), dtype="bfloat16"), "llama2")
    return dataclasses.replace(recipe, inputs=dataclasses.replace(recipe.inputs, template="llama2", caption_end=None))


def pretrain_ziya() -> Recipe:
    """Stage 1 with Ziya-LLaMA-13B."""
    return _reads(pretrain(), llama("ziya_13b", path=Path("pretrained/ziya-llama-13b-v1"), dtype="bfloat16"), "ziya")


def finetune_ziya() -> Recipe:
    """Stage 2 with Ziya-LLaMA-13B and VideoChat's dialogues in Chinese, in which nothing is told of frames."""
    return _chinese(
        _reads(finetune(), llama("ziya_13b", path=Path("pretrained/ziya-llama-13b-v1"), dtype="bfloat16"), "ziya")
    )


def pretrain_billa() -> Recipe:
    """Stage 1 with BiLLa-7B-SFT."""
    return _reads(pretrain(), llama("billa_7b", path=Path("pretrained/billa-7b-sft"), dtype="bfloat16"), "billa")


def finetune_billa() -> Recipe:
    """Stage 2 with BiLLa-7B-SFT and VideoChat's dialogues in Chinese, in which nothing is told of frames."""
    return _chinese(
        _reads(finetune(), llama("billa_7b", path=Path("pretrained/billa-7b-sft"), dtype="bfloat16"), "billa")
    )


def _reads(recipe: Recipe, llm: LlamaBaseConfig, name: str) -> Recipe:
    """The same stage with another LLaMA, in folders of its own."""
    model = dataclasses.replace(recipe.model, llama=llm)
    if model.projection_from is not None:
        model = dataclasses.replace(model, projection_from=_PROJECTIONS[llm.dim])
    if model.init_from is not None:
        model = dataclasses.replace(model, init_from=Path(f"runs/video_llama/pretrain_{name}"))
    return dataclasses.replace(
        recipe,
        model=model,
        inputs=dataclasses.replace(recipe.inputs, tokenizer=llm.path),
        run_dir=recipe.run_dir.with_name(f"{recipe.run_dir.name}_{name}"),
    )


def _chinese(recipe: Recipe) -> Recipe:
    shards = recipe.data.shards.replace("data/videochat/", "data/videochat_zh/")
    assert recipe.eval is not None
    return dataclasses.replace(
        recipe,
        inputs=dataclasses.replace(recipe.inputs, frames_message=False),
        data=dataclasses.replace(recipe.data, shards=shards),
        eval=dataclasses.replace(recipe.eval, shards="data/videochat_zh/shards/val"),
    )


# LLMVA-GEBC -----------------------------------------------------------------------------------------------------------


def gebc_opt13b() -> Recipe:
    """The winner of LOVEU 2023: OPT-13B, 12 frames, InternVideo, Omnivore and CLIP features. One GPU will do."""
    return Recipe(
        model=LlmvaConfig(
            opt=opt("opt_13b", path=Path("pretrained/opt-13b"), dtype="bfloat16"),
            init_from=Path("pretrained/video_llama/pretrain-vicuna13b"),
        ),
        inputs=BoundaryConfig(tokenizer=Path("pretrained/opt-13b"), placeholders="teach"),
        data=TrainData(shards="data/gebc/shards/train_all"),
        optim=_optim(8e-5, 1e-5, warmup=5000, weight_decay=0.001),
        views={"caption": 1.0},
        global_batch_size=16,
        epochs=5,
        eval=_gebc_test(),
        run_dir=Path("runs/video_llama/gebc_opt13b"),
        checkpoint_every=5000,
        seed=42,
    )


def gebc_opt6_7b() -> Recipe:
    """OPT-6.7B, frames alone."""
    recipe = _frames_alone(gebc_opt13b())
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model, opt=opt("opt_6_7b", path=Path("pretrained/opt-6.7b"), dtype="bfloat16")
        ),
        inputs=dataclasses.replace(recipe.inputs, tokenizer=Path("pretrained/opt-6.7b")),
        optim=_optim(1e-4, 8e-5, warmup=5000, weight_decay=0.001),
        run_dir=Path("runs/video_llama/gebc_opt6_7b"),
    )


def gebc_opt2_7b() -> Recipe:
    """OPT-2.7B, frames alone, of each video the annotator who agrees best with the others (highest_f1)."""
    recipe = gebc_opt6_7b()
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model, opt=opt("opt_2_7b", path=Path("pretrained/opt-2.7b"), dtype="bfloat16")
        ),
        inputs=dataclasses.replace(recipe.inputs, tokenizer=Path("pretrained/opt-2.7b")),
        data=TrainData(shards="data/gebc/shards/train_highest_f1"),
        optim=_optim(1e-4, 8e-5, warmup=1000, weight_decay=0.001),
        run_dir=Path("runs/video_llama/gebc_opt2_7b"),
        checkpoint_every=1000,
    )


def gebc_llama7b() -> Recipe:
    """LLaMA-7B in the place of OPT, frames alone."""
    recipe = gebc_opt6_7b()
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model, opt=None, llama=llama("llama1_7b", path=Path("pretrained/llama-7b"), dtype="bfloat16")
        ),
        inputs=dataclasses.replace(recipe.inputs, tokenizer=Path("pretrained/llama-7b")),
        eval=_gebc_test(repetition_penalty=1.5),
        run_dir=Path("runs/video_llama/gebc_llama7b"),
    )


def _frames_alone(recipe: Recipe) -> Recipe:
    """Without other features."""
    model = dataclasses.replace(recipe.model, other_tokens=0)
    inputs = dataclasses.replace(recipe.inputs, other_features=(), other_dims=(), num_video_tokens=model.places)
    return dataclasses.replace(recipe, model=model, inputs=inputs)


# The demo -------------------------------------------------------------------------------------------------------------


def demo_pretrain() -> Recipe:
    """Stage 1 of `make demo SYSTEM=video_llama`: captions of moving shapes. A tiny LLaMA that learnt to caption and to
    converse from text alone (tools/pretrain_text.py --speech dialogues) stays as it is; a video Q-Former makes it see.
    A frame is one token, which the demo's encoder made of it."""
    base, dim, frames = Path("data/demo/llama_dialogues"), GlimpseEncoder.width, 8
    return Recipe(
        model=VideoLlamaConfig(
            tower=None,
            frame_tokens=1,
            frame_dim=dim,
            num_video_tokens=frames,
            max_frames=frames,
            qformer=QFormerConfig(dim=dim, heads=2, hidden=4 * dim),
            llama=dialogue_base().llama(base),
        ),
        inputs=DialogueConfig(
            tokenizer=base / "tokenizer.model",
            source="features",
            features="features",
            frame_tokens=1,
            frame_dim=dim,
            num_video_tokens=frames,
            num_frames=frames,
            caption_sampling="uniform",
            frames_message=False,
            test_views=("caption",),
        ),
        data=TrainData(shards="data/demo/shards_features/train", workers=1),
        optim=_optim(3e-3, 0.0, warmup=20, weight_decay=0.0),
        views={"caption": 1.0},
        global_batch_size=32,
        steps=600,
        run_dir=Path("runs/demo/video_llama_pretrain"),
        checkpoint_every=200,
        log_every=50,
    )


def demo() -> Recipe:
    """Stage 2: captions that a line asks for, and dialogues about the shapes, from what stage 1 learnt."""
    recipe = demo_pretrain()
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, init_from=recipe.run_dir),
        inputs=dataclasses.replace(recipe.inputs, prompts=(ASK,), caption_end="###"),
        optim=_optim(1e-3, 0.0, warmup=20, weight_decay=0.0),
        views={"caption": 1.0, "dialogue": 1.0},
        steps=200,
        eval=EvalConfig(
            shards="data/demo/shards_features/test",
            workers=1,
            batch_size=32,
            metric="exact_match",
            probes=("blind",),
            generation=GenerationConfig(max_new_tokens=16),
        ),
        run_dir=Path("runs/demo/video_llama"),
    )


# For tests ------------------------------------------------------------------------------------------------------------


def debug() -> Recipe:
    """Tiny random weights, a tokenizer of bytes, a few steps: for tests. Captions and dialogues, so both stages."""
    return Recipe(
        model=VideoLlamaConfig(tower=_tiny_tower(), llama=_tiny_llama(), **_tiny_sizes()),
        inputs=DialogueConfig(num_video_tokens=4, frame_tokens=4, frame_dim=32, num_frames=4, size=28),
        data=TrainData(shards="data/demo/shards/train", workers=0),
        optim=_optim(1e-3, 1e-4, warmup=1, weight_decay=0.05),
        views={"caption": 1.0, "dialogue": 1.0},
        global_batch_size=4,
        steps=4,
        eval=EvalConfig(
            shards="data/demo/shards/test",
            workers=0,
            batch_size=4,
            metric="exact_match",
            probes=("blind",),
            generation=GenerationConfig(max_new_tokens=4),
        ),
        run_dir=Path("runs/debug/video_llama"),
        log_every=1,
    )


def debug_gebc() -> Recipe:
    """As `debug`, of boundaries: frames as pixels, one kind of other features."""
    recipe = debug()
    assert recipe.eval is not None
    return dataclasses.replace(
        recipe,
        model=LlmvaConfig(
            tower=_tiny_tower(),
            opt=None,
            llama=_tiny_llama(),
            other_tokens=2,
            other_dim=8,
            max_other=8,
            **_tiny_sizes(),
        ),
        inputs=BoundaryConfig(
            source="pixels",
            frame_tokens=4,
            frame_dim=32,
            num_video_tokens=6,
            num_frames=4,
            size=28,
            other_features=("clip",),
            other_dims=(8,),
            other_length=6,
            max_caption_length=60,
        ),
        data=TrainData(shards="data/gebc/shards/debug", workers=0),
        views={"caption": 1.0},
        eval=dataclasses.replace(recipe.eval, shards="data/gebc/shards/debug"),
        run_dir=Path("runs/debug/gebc"),
    )


def _tiny_tower() -> TowerConfig:
    return TowerConfig(
        image_size=28,
        dim=32,
        layers=2,
        heads=2,
        hidden=64,
        queries=4,
        query_dim=32,
        query_layers=2,
        query_heads=2,
        query_hidden=64,
    )


def _tiny_llama() -> LlamaBaseConfig:
    return LlamaBaseConfig(dim=32, layers=2, heads=2, hidden=64, vocab_size=320)


def _tiny_sizes() -> dict[str, Any]:
    return {
        "frame_tokens": 4,
        "frame_dim": 32,
        "num_video_tokens": 4,
        "max_frames": 8,
        "qformer": QFormerConfig(dim=32, heads=2, hidden=64),
    }


# Shared ---------------------------------------------------------------------------------------------------------------


def _optim(lr: float, min_lr: float, *, warmup: int, weight_decay: float) -> OptimConfig:
    """The schedule of all of them: from 1e-6 in `warmup` steps, then a cosine that is counted from the first step."""
    return OptimConfig(
        lr=lr,
        min_lr=min_lr,
        warmup_lr=1e-6,
        warmup_steps=warmup,
        warmup_peak_twice=False,
        cosine_from_start=True,
        weight_decay=weight_decay,
    )


def _test(shards: str, max_new_tokens: int = 32) -> EvalConfig:
    """What launch/evaluate.py tests; the published stages had no validation, so training does not."""
    return EvalConfig(
        shards=shards,
        at_end=False,
        metric="cider",
        probes=("blind",),
        generation=GenerationConfig(max_new_tokens=max_new_tokens),
    )


def _gebc_test(repetition_penalty: float = 1.0) -> EvalConfig:
    """Captions of at most 29 tokens by two beams, as published."""
    return EvalConfig(
        shards="data/gebc/shards/val",
        batch_size=8,
        every=5000,
        metric="overall_cider_rouge_l",
        probes=("blind",),
        generation=GenerationConfig(max_new_tokens=29, num_beams=2, repetition_penalty=repetition_penalty),
    )
