"""VideoMAE masked pretraining (arXiv 2203.12602) on SSv2: no labels, 90 % of each clip hidden."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from vlm.data.clips import MaskedClipConfig
from vlm.models.video_mae import VideoMAEConfig, video_mae_base, video_mae_small
from vlm.recipe import OptimConfig, Recipe, TrainData


def ssv2_s() -> Recipe:
    """ViT-S, 2,400 epochs at batch 2,048."""
    return Recipe(
        model=video_mae_small(),
        inputs=MaskedClipConfig(stride=2),
        data=TrainData(shards="data/ssv2/train", workers=8),
        optim=OptimConfig(
            lr=1.5e-4 * 2048 / 256,
            min_lr=1e-5 * 2048 / 256,
            warmup_epochs=40,
            betas=(0.9, 0.95),
            weight_decay=0.05,
        ),
        views={"pixels": 1.0},
        global_batch_size=2048,
        epochs=2400,
        run_dir=Path("runs/video_mae/ssv2_s"),
        checkpoint_every=1000,
        log_every=20,
    )


def ssv2_b() -> Recipe:
    """ViT-B, 2,400 epochs at batch 2,048."""
    return dataclasses.replace(ssv2_s(), model=video_mae_base(), run_dir=Path("runs/video_mae/ssv2_b"))


def debug() -> Recipe:
    """Tiny random weights, a few steps: for tests."""
    return dataclasses.replace(
        ssv2_s(),
        model=VideoMAEConfig(
            dim=24,
            depth=2,
            heads=2,
            decoder_dim=16,
            decoder_depth=1,
            decoder_heads=2,
            image_size=32,
            patch_size=8,
            num_frames=8,
        ),
        inputs=MaskedClipConfig(num_frames=8, size=32, stride=1, patch_size=8, mask_ratio=0.75),
        data=TrainData(shards="data/demo/shards/train", workers=0),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        global_batch_size=8,
        epochs=None,
        steps=4,
        run_dir=Path("runs/debug/video_mae"),
        log_every=1,
    )
