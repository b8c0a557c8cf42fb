"""A tiny Video-LLaMA that captions seven clips. Started by test_writing.py in several processes, it does so in each of
the ways below at a ZeRO stage:

python writing_worker.py SHARDS FOLDER STAGE
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.encoded import encode, pictures
from vlm.data.dialogues import DialogueConfig
from vlm.data.shards import write_shards
from vlm.distributed import World, end, join
from vlm.models.generation_config import GenerationConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.video_llama import VideoLlamaConfig
from vlm.nn.qformer import QFormerConfig
from vlm.recipe import EvalConfig, OptimConfig, Recipe, TrainData
from vlm.run import evaluate
from vlm.run.engine import Engine, derive
from vlm.run.standalone import Replica
from vlm.types import Sample

SIZE, CLIPS = 28, 7
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sample": True, "top_p": 0.95},
    "beams": {"num_beams": 3},
    "beams_428": {"num_beams": 2, "rules": "4.28", "batch_size": 1},  # whose rows depend on their neighbours
}


class Ending(DialogueConfig):
    """Every eleventh word ends a text, so that texts have lengths of their own; a text is its ids."""

    @property
    def ends(self) -> tuple[tuple[int, ...], ...]:
        return tuple((word,) for word in range(2, self.vocab_size, 11))

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def shards(folder: Path) -> Path:
    """Clips with captions and what a tower might have made of four of their frames."""
    folder.mkdir(parents=True)
    samples = []
    for number in range(CLIPS):
        clip = folder / f"{number}.mp4"
        clip.write_bytes(encode(pictures(6 + number, SIZE, SIZE, seed=number)))
        tokens = folder / f"{number}.npy"
        np.save(tokens, np.random.default_rng(number).normal(0, 3, (4, 3, 16)).astype(np.float32))
        caption = {"caption": f"A <b>clip</b>, {number}"}
        samples.append(Sample(key=f"clip{number}", video=clip, annotation=caption, members={"q_former.npy": tokens}))
    write_shards(samples, folder / "shards", arguments={"source": "none"})
    return folder / "shards"


def recipe(path: Path, folder: Path, *, inputs: type[DialogueConfig] = Ending, **settings: Any) -> Recipe:
    """`settings` are GenerationConfig's, and `batch_size`, `probes`."""
    test = {name: settings.pop(name) for name in ("batch_size", "probes", "metric") if name in settings}
    return Recipe(
        model=VideoLlamaConfig(
            tower=None,
            frame_tokens=3,
            frame_dim=16,
            num_video_tokens=4,
            qformer=QFormerConfig(dim=16, heads=2, hidden=24),
            llama=LlamaBaseConfig(dim=32, layers=2, heads=2, hidden=48, vocab_size=259),
        ),
        inputs=inputs(source="features", frame_tokens=3, frame_dim=16, num_video_tokens=4, num_frames=4),
        data=TrainData(shards=str(path)),
        optim=OptimConfig(lr=1e-3),
        views={"caption": 1.0},
        global_batch_size=2,
        steps=1,
        eval=EvalConfig(
            shards=str(path),
            workers=0,
            **{"probes": ("blind",), "metric": "cider", "batch_size": 3, **test},
            generation=GenerationConfig(**{"max_new_tokens": 12, **settings}),
        ),
        run_dir=folder,
    )


def model_of(settings: Recipe) -> Any:
    """A model that sees more of its clips than a fresh one does."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
        model = settings.model.build()
    with torch.no_grad():
        for parameter in (model.llama_proj.weight, model.video_query_tokens):
            parameter.mul_(20)
        for name, parameter in model.video_Qformer.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                parameter.mul_(15)
    return model


def alone(settings: Recipe, told: list[str]) -> dict[str, float]:
    """Evaluate in this process."""
    world = World(0, 1, 0, torch.device("cpu"), "single")
    replica = Replica(model_of(settings), world, torch.float32)
    return evaluate.run(settings, replica, world, settings.run_dir, told.append)


def main(path: Path, folder: Path, stage: int) -> None:
    world = join()
    settings = recipe(path, folder)
    hardware = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    engine = Engine(model_of(settings), settings, derive(hardware, settings, world.size), world)
    for name, way in WAYS.items():
        settings = recipe(path, folder / name, **way)
        evaluate.run(settings, engine, world, settings.run_dir, lambda text: print(text, flush=True))
    end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
