"""A recipe: everything that decides the science of one run. Hardware settings live in `ds_configs/*.json`.

`load("vit_llama.demo", ["steps=100"])` imports `vlm.recipes.vit_llama` and calls its function `demo` (the one dynamic
import of the project), then applies the overrides.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from vlm.config import override
from vlm.models.system import System
from vlm.types import UserError


class ModelConfig(Protocol):
    """What a recipe's `model` must offer."""

    def build(self) -> System: ...


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warmup and cosine decay, one value a step."""

    lr: float
    """Peak learning rate, already scaled for the global batch size."""
    min_lr: float = 0.0
    """Where the cosine ends."""
    warmup_steps: int | None = None
    """Steps of linear warmup; none: `warmup_epochs` decides."""
    warmup_epochs: float = 0.0
    """Warmup in epochs, used where `warmup_steps` is none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.05
    """Decoupled decay; biases, norms and other one-dimensional parameters have none."""
    layer_decay: float = 1.0
    """Learning-rate factor from layer to layer, counted from the head down; 1: off."""
    max_grad_norm: float = 0.0
    """Clip gradients to this global L2 norm; 0: off."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr is {self.lr}; it must be above 0")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay is {self.layer_decay}; it must be in (0, 1]")


@dataclass(kw_only=True, slots=True)
class TrainData:
    """Where training records come from."""

    shards: str
    """Folder that tools/make_shards.py wrote."""
    workers: int = 4
    """Loader processes a rank; 0: load in the training process. Does not change the order."""
    quarantine_share: float = 0.005
    """The run stops when more than this share of the records has turned out to be unusable."""
    substitutes: int = 16
    """How many substitutes to try, one after the other, for an unusable record."""


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """The test at the end of training, and of launch/evaluate.py."""

    shards: str
    """Folder of test shards."""
    workers: int = 4
    """Loader processes a rank."""
    batch_size: int = 8
    """Videos scored in one forward pass (each gives all its views, or all its questions)."""
    probes: tuple[str, ...] = ()
    """Extra conditions that show what the model uses: one_frame, shuffled_frames (clips), blind (questions)."""
    kinds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name in the metrics -> kinds of questions that papers report together; each kind alone is reported anyway."""
    at_start: bool = False
    """Evaluate before the first step too (ViCo's --init_eval), into the folder `before_training`."""
    at_end: bool = True
    """Evaluate when training ends."""
    every: int = 0
    """Also evaluate (without probes) every so many steps, to know the best checkpoint; 0: never."""
    metric: str = "top1"
    """Which metric decides the best checkpoint (larger is better)."""


@dataclass(kw_only=True, slots=True)
class Recipe:
    """Everything a run is made of, apart from hardware."""

    model: Any
    """Architecture: a config dataclass with build()."""
    inputs: Any
    """From record to example: a config dataclass of vlm.data.clips or vlm.data.questions."""
    data: TrainData
    optim: OptimConfig
    views: dict[str, float]
    """Loss name -> weight. A view's name is its loss's name and its log key."""
    global_batch_size: int
    """Samples (videos; of question sets: questions) an optimizer step, over all processes."""
    eval: EvalConfig | None = None
    """None: this system has no test (masked pretraining)."""
    epochs: float | None = None
    """Length of training in passes over the shards; decides where `steps` is none."""
    steps: int | None = None
    """Length of training in optimizer steps; where given, it decides."""
    seed: int = 0
    """Decides initial weights, order, augmentation and dropout."""
    run_dir: Path = Path("runs/default")
    """Everything a run writes goes here."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end. 0: only at the end."""
    checkpoint_keep: int = 2
    """Newest checkpoints kept."""
    log_every: int = 10
    """Steps between console lines (metrics.jsonl has every step)."""
    audit_steps: int = 3
    """Steps without a gradient after which a trainable tensor is an error that names it (docs/training.md); 0: no
    audit."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases mode; whatever it does, the run goes on without it."""

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise ValueError("a recipe needs steps or epochs")
        for name in ("global_batch_size", "log_every", "checkpoint_keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.audit_steps < 0:
            raise ValueError(f"audit_steps is {self.audit_steps}; it must be 0 (no audit) or more")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        self.run_dir = Path(self.run_dir)


def names() -> list[str]:
    """Every shipped recipe, as `module.function`."""
    found = []
    for module in _modules():
        found += [f"{module}.{name}" for name in _recipes_of(importlib.import_module(f"vlm.recipes.{module}"))]
    return sorted(found)


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe called `name` (for example "vit_llama.demo") with `key.path=value` overrides applied.

    Raises:
        UserError: no such recipe (with the nearest names), or a wrong override.
    """
    module_name, _, function_name = name.partition(".")
    if module_name in _modules() and function_name:
        functions = _recipes_of(importlib.import_module(f"vlm.recipes.{module_name}"))
        if function_name in functions:
            recipe = override(functions[function_name](), list(overrides))
            if recipe.steps is not None and any(o.startswith("epochs=") for o in overrides):
                raise UserError(f"epochs is given, but {name} runs for steps={recipe.steps}: add steps=none")
            return recipe
    close = difflib.get_close_matches(name, names(), n=3, cutoff=0.4) or names()
    raise UserError(f"there is no recipe {name!r}; did you mean {', '.join(close)}?")


def check_inputs(recipe: Recipe) -> None:
    """Refuse inputs that do not fit the model (UserError), before anything is loaded."""
    check = getattr(recipe.model, "check_inputs", None)
    if check is not None:
        check(recipe.inputs)


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module("vlm.recipes").__path__)]


def _recipes_of(module: Any) -> dict[str, Callable[[], Recipe]]:
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


__all__ = ["EvalConfig", "ModelConfig", "OptimConfig", "Recipe", "TrainData", "check_inputs", "load", "names"]
