"""A recipe: everything that decides the science of one run. Hardware settings live in `ds_configs/*.json`.

`load("vit_llama.demo", ["steps=100"])` imports `vlm.recipes.vit_llama` and calls its function `demo` (the one dynamic
import of the project), then applies the overrides. What recipes there are is read from their source, so that a list of
them, or a wrong name, costs no import.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from vlm.config import override
from vlm.errors import UserError
from vlm.models.generation_config import GenerationConfig

if TYPE_CHECKING:
    from vlm.models.system import System

# What decides the best checkpoint, by the task of a recipe's inputs: the metrics that every evaluation has.
METRICS = {
    "classes": ("top1", "top5"),
    "choice": ("accuracy",),
    "caption": ("exact_match", "bleu4", "rouge_l", "cider", "overall_cider_rouge_l"),
    "segments": ("mof", "edit", "f1_10", "f1_25", "f1_50"),
}
WRITES = ("caption", "segments")  # tasks in which the model writes


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
    """Steps of linear warmup; none: `warmup_share` decides, or `warmup_epochs`."""
    warmup_epochs: float = 0.0
    """Warmup in epochs, used where `warmup_steps` and `warmup_share` are none."""
    warmup_share: float | None = None
    """Warmup as a share of all steps, rounded up (transformers' warmup_ratio), used where `warmup_steps` is none."""
    warmup_peak_twice: bool = True
    """Whether the last step of warmup has the peak already, as VideoMAE's; without, step k of W has k/W of it, as
    LLaMA-Adapter's and all systems after it."""
    warmup_lr: float = 0.0
    """Where warmup begins."""
    warmup_restart: int = 0
    """Steps after which a warmup that is still on begins anew, as in the published code of Video-LLaMA, which counts it
    within its epochs (iters_per_epoch); 0: it goes on to its end."""
    cosine_from_start: bool = False
    """Count the cosine from the first step, so that after warmup the rate goes on a little below its peak, as
    Video-LLaMA's and LLMVA-GEBC's; without, from the end of warmup."""
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
        for name in ("lr", "eps"):
            _require(0 < getattr(self, name) < inf, f"optim.{name}", getattr(self, name), "a finite number above 0")
        for name in ("min_lr", "warmup_epochs", "warmup_lr", "weight_decay", "max_grad_norm"):
            _require(0 <= getattr(self, name) < inf, f"optim.{name}", getattr(self, name), "a finite number from 0")
        if self.warmup_steps is not None:
            _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more, or none")
        if self.warmup_share is not None:
            _require(0 <= self.warmup_share <= 1, "optim.warmup_share", self.warmup_share, "from 0 to 1, or none")
        _require(self.warmup_restart >= 0, "optim.warmup_restart", self.warmup_restart, "0 or more")
        _require(self.warmup_lr <= self.lr, "optim.warmup_lr", self.warmup_lr, f"at most optim.lr={self.lr}")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(good, "optim.betas", self.betas, "two numbers from 0 to below 1")
        _require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "above 0 and at most 1")


@dataclass(kw_only=True, slots=True)
class TrainData:
    """Where training records come from."""

    shards: str
    """Folder that tools/make_shards.py wrote; several with their shares of the samples: A:100,B:24 (without shares, by
    their sizes)."""
    pack_length: int | None = None
    """Put samples together in packs of up to so many tokens, planned from the index; a pack then is what
    global_batch_size counts. None: no packs."""
    workers: int = 4
    """Loader processes a rank; 0: load in the training process. Does not change the order."""
    sample_seconds: float = 60.0
    """A loader process that is longer at one sample, of training or test, is ended, and the sample is unusable."""
    worker_memory: int = 0
    """Bytes that a loader process may have; one with more is replaced between two batches. 0: no limit."""
    retries: int = 3
    """How often a file of shards that is missing or does not come is tried again."""
    cache: Path | None = None
    """Folder for pieces of shards that lie elsewhere; none: the user's folder for caches."""
    cache_bytes: int = 20 << 30
    """Most that this folder may take."""
    quarantine_share: float = 0.005
    """The run stops when more than this share of the records of a shard has turned out to be unusable."""
    substitutes: int = 16
    """How many substitutes to try, one after the other, for an unusable record."""
    gone: Literal["stop", "quarantine"] = "stop"
    """What a shard means that vanished or was replaced in training. quarantine: its records are unusable ones."""

    def __post_init__(self) -> None:
        if self.pack_length is not None:
            _require(self.pack_length >= 1, "data.pack_length", self.pack_length, "1 or more, or none")
        self.cache = None if self.cache is None else Path(self.cache)
        _require(0 < self.sample_seconds < inf, "data.sample_seconds", self.sample_seconds, "a finite number above 0")
        for name in ("workers", "substitutes", "worker_memory", "retries", "cache_bytes"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "0 or more")
        _require(0 <= self.quarantine_share <= 1, "data.quarantine_share", self.quarantine_share, "from 0 to 1")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """The test at the end of training, and of launch/evaluate.py."""

    shards: str
    """Folder of test shards."""
    workers: int = 4
    """Loader processes a rank."""
    batch_size: int = 8
    """Videos scored in one forward pass (each gives all its views, or all its questions); texts written together."""
    probes: tuple[str, ...] = ()
    """Extra conditions that show what the model uses: one_frame, shuffled_frames (clips), blind (questions, texts)."""
    kinds: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Name in the metrics -> kinds of questions that papers report together; each kind alone is reported anyway."""
    at_start: bool = False
    """Evaluate before the first step too (ViCo's --init_eval), into the folder `before_training`."""
    at_end: bool = True
    """Evaluate when training ends."""
    every: int = 0
    """Also evaluate (without probes) every so many steps, to know the best checkpoint; 0: never."""
    metric: str = "top1"
    """Which metric decides the best checkpoint (larger is better): top1 or top5 (clips); accuracy or accuracy_KIND
    (questions); exact_match, bleu4, rouge_l, cider, or overall_cider_rouge_l of GEBC's kinds (texts); mof, edit, f1_10,
    f1_25 or f1_50 (segmentations)."""
    generation: GenerationConfig | None = None
    """How texts are written; none where nothing is."""

    @property
    def in_training(self) -> bool:
        """Whether a training run tests at all."""
        return bool(self.at_start or self.at_end or self.every)

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("batch_size", 1), ("every", 0)):
            _require(getattr(self, name) >= least, f"eval.{name}", getattr(self, name), f"{least} or more")


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """What is done about numbers that go wrong (docs/training.md): a loss or a gradient that is not finite, a spike."""

    skip_budget: int = 8
    """Steps that may be skipped within `budget_steps`; one more, and the run goes back to a checkpoint, or ends. 0: the
    first one ends the run."""
    budget_steps: int = 200
    """Steps that the budget is for, the newest one included."""
    spike_factor: float = 10.0
    """A gradient norm above so many times the largest of the last `window` ones is a spike; 0: none is."""
    window: int = 128
    """Accepted steps whose gradient norms are remembered."""
    least: int = 32
    """Norms that must be known before one can be a spike."""
    rollbacks: int = 2
    """How often the run may go back to a checkpoint; then it ends."""

    def __post_init__(self) -> None:
        for name, least in (("skip_budget", 0), ("budget_steps", 1), ("window", 1), ("least", 1), ("rollbacks", 0)):
            _require(getattr(self, name) >= least, f"guard.{name}", getattr(self, name), f"{least} or more")
        allowed = f"at most guard.window={self.window}, or no spike is ever seen"
        _require(self.least <= self.window, "guard.least", self.least, allowed)
        factor = self.spike_factor
        _require(factor == 0 or 1 < factor < inf, "guard.spike_factor", factor, "a finite number above 1, or 0 (off)")


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
    freeze: tuple[str, ...] = ()
    """Modules or parameters, by name or pattern (`blocks.[01]`, `*`), that do not train though by the model's nature
    they would. They stay as they are, and checkpoints hold them."""
    unfreeze: tuple[str, ...] = ()
    """Modules or parameters that train though `freeze` or the model's nature says otherwise."""
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
    checkpoint_seconds: float = 1800.0
    """Writing one, in the background, may take so long; then the file system counts as stuck and the run ends. Above
    0."""
    log_every: int = 10
    """Steps between console lines (metrics.jsonl has every step)."""
    audit_steps: int = 3
    """Steps without a gradient after which a trainable tensor is an error that names it (docs/training.md); 0: no
    audit."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """What is done about steps whose numbers go wrong."""
    hang_seconds: float = 600.0
    """A rank that gives no sign of life for so long has stalled: all ranks report where they are, and end with status
    86 (docs/training.md); 0: nobody watches."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases mode; whatever it does, the run goes on without it."""

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise ValueError("a recipe needs steps or epochs")
        for name in ("global_batch_size", "log_every", "checkpoint_keep"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("checkpoint_every", "audit_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 (never) or more")
        _require(0 < self.checkpoint_seconds < inf, "checkpoint_seconds", self.checkpoint_seconds, "a number above 0")
        _require(0 <= self.hang_seconds < inf, "hang_seconds", self.hang_seconds, "a finite number from 0 (off)")
        if self.steps is not None:
            _require(self.steps >= 1, "steps", self.steps, "1 or more")
        if self.epochs is not None:
            _require(0 < self.epochs < inf, "epochs", self.epochs, "a finite number above 0")
        for name, weight in self.views.items():
            _require(0 <= weight < inf, f"views.{name}", weight, "a finite number from 0")
        _require(any(self.views.values()), "views", self.views, "at least one weight above 0, or nothing is learnt")
        if self.eval is not None:
            _check_eval(self.eval, getattr(self.inputs, "task", None))
        self.run_dir = Path(self.run_dir)


def _require(holds: bool, name: str, value: Any, allowed: str) -> None:
    """ValueError with name, value and what is allowed. Comparisons with nan do not hold, so nan is refused by them."""
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {allowed}")


def _check_eval(config: EvalConfig, task: str | None) -> None:
    """ValueError where a test has settings that are not its task's."""
    metric = config.metric
    writes = task in WRITES
    if writes and config.generation is None:
        raise ValueError("eval.generation is none, but these inputs want texts written: give a GenerationConfig")
    if task is not None and not writes and config.generation is not None:
        raise ValueError(f"eval.generation is given, but these inputs ({task}) want nothing written: set it to none")
    if writes and config.kinds:
        raise ValueError("eval.kinds: texts are scored by kind anyway, and are not grouped; set it to {}")
    of_kind = task == "choice" and metric.startswith("accuracy_")  # which kinds there are, the shards know
    if task not in METRICS or metric in METRICS[task] or of_kind:
        return
    from vlm.metrics.own import chosen_by  # with whatever their functions import, which other recipes need not load

    names = (*METRICS[task], *chosen_by(task))
    if metric not in names:
        allowed = " or ".join((*names, "accuracy_KIND") if task == "choice" else names)
        raise ValueError(f"eval.metric is {metric}; it must be {allowed}")


def families() -> dict[str, list[str]]:
    """Every shipped recipe: module of vlm.recipes -> its public functions."""
    (folder,) = importlib.import_module("vlm.recipes").__path__
    files = sorted(Path(folder).glob("[!_]*.py"))
    return {file.stem: sorted(_public_functions(file)) for file in files}


def _public_functions(file: Path) -> Iterator[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name


def names() -> list[str]:
    """Every shipped recipe, as `module.function`."""
    return sorted(f"{module}.{name}" for module, functions in families().items() for name in functions)


def check_name(name: str) -> None:
    """UserError with the nearest names where there is no recipe called `name`."""
    known = names()
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}"
    if name in families():
        hint = f"{name} has {', '.join(one for one in known if one.startswith(f'{name}.'))}"
    raise UserError(f"there is no recipe {name!r}; {hint}")


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe called `name` (for example "vit_llama.demo") with `key.path=value` overrides applied.

    Raises:
        UserError: no such recipe (with the nearest names), or a wrong override.
    """
    check_name(name)
    module, _, function = name.partition(".")
    recipe = override(getattr(importlib.import_module(f"vlm.recipes.{module}"), function)(), list(overrides))
    if recipe.steps is not None and any(o.startswith("epochs=") and o != "epochs=none" for o in overrides):
        raise UserError(f"epochs is given, but {name} runs for steps={recipe.steps}: add steps=none")
    return recipe


def check_inputs(recipe: Recipe) -> None:
    """Refuse inputs that do not fit the model, and probes that they do not have (UserError), before anything is
    loaded."""
    check = getattr(recipe.model, "check_inputs", None)
    if check is not None:
        check(recipe.inputs)
    check_views = getattr(recipe.inputs, "check_views", None)
    if check_views is not None:
        check_views(tuple(recipe.views))
    known = getattr(recipe.inputs, "probes", ())
    for probe in recipe.eval.probes if recipe.eval is not None else ():
        if probe not in known:
            close = difflib.get_close_matches(probe, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"these inputs have {', '.join(known) or 'none'}"
            raise UserError(f"eval.probes: there is no probe {probe!r}; {hint}")


def check_files(recipe: Recipe) -> None:
    """Refuse weights and tokenizers that are not there (UserError), before processes are joined and models built."""
    for group in ("model", "inputs"):
        for path, value in _paths(getattr(recipe, group), group):
            if not value.exists():
                raise UserError(f"{path}={value}: there is no such file or folder")


def as_continued(recipe: Recipe) -> Recipe:
    """The recipe for a checkpoint that replaces every trained tensor: what training began with is neither looked for
    nor loaded."""
    names = {f.name for f in dataclasses.fields(recipe.model)} & {"init_from", "projection_from"}
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **dict.fromkeys(names)))


def _paths(config: Any, where: str) -> Iterator[tuple[str, Path]]:
    """Every path that a config names, with the name of its field."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if isinstance(value, Path):
            yield f"{where}.{f.name}", value
        elif dataclasses.is_dataclass(value):
            yield from _paths(value, f"{where}.{f.name}")


__all__ = [
    "EvalConfig",
    "GenerationConfig",
    "GuardConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "TrainData",
    "as_continued",
    "check_files",
    "check_inputs",
    "check_name",
    "families",
    "load",
    "names",
]
