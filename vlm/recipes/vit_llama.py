"""ViT-LLaMA and its baselines on SSv2 (arXiv 2310.12973), and the demo on moving shapes.

The published runs start from VideoMAE weights pretrained on SSv2 for 2,400 epochs and train 16-frame clips with
repeated augmentation; learning rates are base * batch / 256, written out for the batch that is stated.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlm.data.clips import ClipConfig
from vlm.models.vit_llama import LlamaLayerConfig, ViTLlamaConfig, vit_base, vit_small
from vlm.recipe import EvalConfig, OptimConfig, Recipe, TrainData


def ssv2_s() -> Recipe:
    """ViT-S without LLaMA: the paper's baseline (64.71 / 89.15 top-1 / top-5 published)."""
    return Recipe(
        model=vit_small(init_from=Path("pretrained/videomae/ssv2_vit_s_2400.pth")),
        inputs=ClipConfig(),
        data=TrainData(shards="data/ssv2/train", workers=8),
        optim=_finetuning(base_lr=1e-3, batch=24, layer_decay=0.7),
        views={"label": 1.0},
        global_batch_size=24,
        epochs=40,
        eval=EvalConfig(shards="data/ssv2/val", workers=8),
        run_dir=Path("runs/vit_llama/ssv2_s"),
        checkpoint_every=2000,
        log_every=50,
    )


def ssv2_s_llama() -> Recipe:
    """ViT-S with one frozen LLaMA-7B layer (65.88 / 89.93 published)."""
    recipe = ssv2_s()
    return dataclasses.replace(recipe, model=_with_llama(recipe.model), run_dir=Path("runs/vit_llama/ssv2_s_llama"))


def ssv2_b() -> Recipe:
    """ViT-B without LLaMA (64.97 / 89.50 published)."""
    return dataclasses.replace(
        ssv2_s(),
        model=vit_base(init_from=Path("pretrained/videomae/ssv2_vit_b_2400.pth")),
        optim=_finetuning(base_lr=5e-4, batch=12, layer_decay=0.75),
        global_batch_size=12,
        epochs=30,
        run_dir=Path("runs/vit_llama/ssv2_b"),
    )


def ssv2_b_llama() -> Recipe:
    """ViT-B with one frozen LLaMA-7B layer (66.03 / 90.25 published)."""
    recipe = ssv2_b()
    return dataclasses.replace(recipe, model=_with_llama(recipe.model), run_dir=Path("runs/vit_llama/ssv2_b_llama"))


def demo() -> Recipe:
    """A small ViT-LLaMA on rendered moving shapes: a laptop trains it in minutes. Its LLaMA layer is random."""
    return Recipe(
        model=ViTLlamaConfig(
            dim=64,
            depth=4,
            heads=4,
            image_size=32,
            patch_size=8,
            num_frames=8,
            num_classes=8,
            drop_path=0.0,
            label_smoothing=0.0,
            init_std=0.06,
            init_scale=1.0,
            llama=LlamaLayerConfig(layer=0, dim=64, heads=2),
        ),
        inputs=ClipConfig(
            num_frames=8,
            size=32,
            short_side=32,
            repeats=1,
            randaugment=None,
            crop_scale=(0.6, 1.0),
            crop_ratio=(0.87, 1.15),
            erase_probability=0.0,
            mixup=0.0,
            cutmix=0.0,
            label_smoothing=0.0,
            num_classes=8,
        ),
        data=TrainData(shards="data/demo/shards/train", workers=1),
        optim=OptimConfig(lr=2e-3, warmup_steps=60, weight_decay=0.05, max_grad_norm=1.0),
        views={"label": 1.0},
        global_batch_size=64,
        steps=600,
        eval=EvalConfig(
            shards="data/demo/shards/test", workers=1, batch_size=16, probes=("one_frame", "shuffled_frames")
        ),
        run_dir=Path("runs/demo/vit_llama"),
        checkpoint_every=200,
        log_every=25,
    )


def debug() -> Recipe:
    """Tiny random weights, a few steps: for tests."""
    recipe = demo()
    model = dataclasses.replace(recipe.model, dim=24, depth=2, heads=2)
    return dataclasses.replace(recipe, model=model, steps=4, global_batch_size=8, run_dir=Path("runs/debug/vit_llama"))


def _with_llama(model: ViTLlamaConfig) -> ViTLlamaConfig:
    return dataclasses.replace(model, llama=LlamaLayerConfig(path=Path("pretrained/llama/7B")))


def _finetuning(base_lr: float, batch: int, layer_decay: float) -> OptimConfig:
    """VideoMAE's fine-tuning schedule, scaled to the global batch."""
    return OptimConfig(
        lr=base_lr * batch / 256,
        min_lr=1e-6 * batch / 256,
        warmup_epochs=5,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        layer_decay=layer_decay,
    )
