"""recipe.json, what a run is made of: written when it begins, kept as it is when it goes on, and what may differ then.

    {recipe, config, deepspeed, world_size, overrides, versions, git_commit, device, attention, starter, command}
    of a training run also {shards: their fingerprint, tokenizer: sha256, resumed: [{step, world_size, changed, …}],
        stopped: [{step, why: the signal}]},
    of an evaluation {checkpoint: its folder or null}

Settings of an evaluation are those of launch/evaluate.py; the one that ends training has no record of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from vlm import checkpoint_folders
from vlm.config import differences, to_dict
from vlm.data.tokenizers import content_hash
from vlm.distributed import World, from_main
from vlm.files import sole_writer, write_json, write_text
from vlm.nn.attention import AttentionChoice
from vlm.recipe import Recipe
from vlm.run import checkpoint
from vlm.run.log import command_line, git_commit, versions
from vlm.run.run_folder import read_json
from vlm.types import UserError

NAME = "recipe.json"
_NOTED_SECONDS = 5.0  # that other ranks wait for the note of a stop

# Where weights are read from.
WEIGHT_PLACES = (
    *("model.init_from", "model.projection_from"),
    *("model.llama.path", "model.opt.path", "model.tower.path", "model.tower.vision_path"),
)
# What may differ between a run and its continuation without changing its course.
MAY_CHANGE = (
    "run_dir",
    "log_every",
    "wandb",
    *("freeze", "unfreeze"),  # vlm.run.restore says what becomes of weights and moments
    "audit_steps",
    "hang_seconds",
    "guard",
    "checkpoint_every",
    "checkpoint_keep",
    "checkpoint_seconds",
    "eval",
    "data.workers",
    "data.quarantine_share",
    *("data.gone", "data.sample_seconds", "data.worker_memory", "data.retries", "data.cache", "data.cache_bytes"),
    # Places: what lies there is compared by content (fingerprint of the shards, hashes of tokenizer and of frozen
    # weights), and what trains comes from the checkpoint.
    "data.shards",
    "inputs.tokenizer",
    *WEIGHT_PLACES,
)
# What decides the results of an evaluation.
EVALUATED = ("model", "inputs", "eval", "seed")
NOT_EVALUATED = (
    *("eval.workers", "eval.batch_size", "eval.at_start", "eval.at_end", "eval.every", "eval.metric"),
    *WEIGHT_PLACES,
    "inputs.tokenizer",
)


@dataclass(frozen=True, slots=True)
class Launch:
    """What was started: a recipe, what it is called and what the command line changed, the DeepSpeed dict (of training:
    the derived one), this process among all, and the attention kernel that was chosen."""

    recipe: Recipe
    name: str
    overrides: list[str]
    deepspeed: dict[str, Any]
    world: World
    attention: AttentionChoice

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir

    @property
    def device_name(self) -> str:
        """The GPU's name, or how many cores the CPU has."""
        if self.world.device.type == "cuda":
            return torch.cuda.get_device_name(self.world.device)
        return f"cpu ({psutil.cpu_count(logical=False) or psutil.cpu_count()} cores)"

    def describe(self) -> dict[str, Any]:
        """What recipe.json says of every run."""
        return {
            "recipe": self.name,
            "config": to_dict(self.recipe),
            "deepspeed": self.deepspeed,
            "world_size": self.world.size,
            "overrides": self.overrides,
            "versions": versions(),
            "git_commit": git_commit(),
            "device": self.device_name,
            "attention": self.attention.name,
            "starter": self.world.starter,
            "command": command_line(),
        }


def precision(deepspeed: dict[str, Any]) -> torch.dtype:
    """What a DeepSpeed dict computes in."""
    return torch.bfloat16 if deepspeed.get("bf16", {}).get("enabled") else torch.float32


@contextmanager
def sole_run(recipe: Recipe, world: World) -> Iterator[None]:
    """The run folder, made where there is none, for this run alone; UserError on every rank if another has it."""
    with ExitStack() as held:
        from_main(world, lambda: held.enter_context(sole_writer(recipe.run_dir, "give another run_dir=DIR")))
        yield


def open_training(launch: Launch, fingerprint: str) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint that a training run goes on from (None: it begins), and its record, to be written when that is
    loaded.

    Args:
        fingerprint: of the training shards and their packs (`Stream.fingerprint`).
    Raises:
        UserError: on every rank; the folder holds another run or an evaluation, or no intact checkpoint.
    """
    return from_main(launch.world, lambda: _open_training(launch, fingerprint))


def _open_training(launch: Launch, fingerprint: str) -> tuple[Path | None, dict[str, Any]]:
    folder, root = launch.folder, launch.folder / "checkpoints"
    about = launch.describe() | {"shards": fingerprint, "tokenizer": tokenizer_hash(launch.recipe)}
    if not checkpoint_folders.named(root):  # one without a manifest is damaged, and no reason to begin anew
        if (folder / NAME).is_file() and "checkpoint" in _read(folder):
            raise UserError(
                f"{folder} holds an evaluation, whose results training would replace: give another run_dir=DIR"
            )
        return None, about
    old = _read(folder)
    changed = compare(folder, old, about)
    newest = checkpoint.newest(root)
    assert newest is not None
    found, passed_over = newest
    for sentence in passed_over:
        print(f"passed over a damaged checkpoint: {sentence}", flush=True)
    _set_latest_right(root, found)
    for text in changed:
        print(f"changed since the run began: {text}", flush=True)
    again = {"step": int(found.name.removeprefix("step-")), "changed": changed}
    again |= {name: about[name] for name in ("world_size", "deepspeed", "overrides", "git_commit", "command")}
    return found, {**old, "resumed": [*(old.get("resumed") or []), again]}


def _set_latest_right(root: Path, found: Path) -> None:
    """Have `latest` name the checkpoint that was found newest: an evaluation goes by it, and this run may have nothing
    more to save."""
    latest = root / "latest"
    named = latest.read_text(errors="replace").strip() if latest.is_file() else "no checkpoint"
    if named != found.name:
        print(f"{latest} names {named!r}, not the newest intact checkpoint: set to {found.name}", flush=True)
        write_text(latest, f"{found.name}\n")


def compare(folder: Path, old: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """What differs between a run's record and what is to go on with it, a sentence each.

    Raises:
        UserError: a setting, the data or the tokenizer differ, so that the run would take another course.
    """
    settings = differences(old["config"], about["config"])
    refused = [text for text in settings if not _within(text, MAY_CHANGE)]
    if old["recipe"] != about["recipe"]:
        refused.insert(0, f"recipe: {old['recipe']} -> {about['recipe']}")
    for name, what in (("shards", about["config"]["data"]["shards"]), ("tokenizer", "the tokenizer")):
        if name in old and old[name] != about[name]:
            refused.append(_other_content(what, old[name], about[name]))
    if refused:
        raise UserError(
            f"{folder} holds a run with other settings ({'; '.join(refused)}), and continuing it would mix the two: "
            "give another run_dir=DIR, the old settings, or remove the folder"
        )
    machine = ("world_size", "deepspeed", "device", "attention", "starter", "git_commit", "versions")
    return settings + [text for name in machine for text in differences(old.get(name), about[name], name)]


def _other_content(what: str, old: str | None, new: str | None) -> str:
    """The sentence on two fingerprints that differ: of files, or of their packs alone (vlm.data.stream)."""
    content, _, packs = (old or "").partition(" packs ")
    now, _, packs_now = (new or "").partition(" packs ")
    if content != now or not packs_now:
        return f"content of {what}: {old} -> {new}"
    return (
        f"packs of {what}: {packs or 'not known'} -> {packs_now}, planned from the index, so these shards were made "
        "again with another --tokenizer or without, or the run began with another version of this program"
    )


def open_evaluation(launch: Launch, source: Path | None) -> dict[str, Any]:
    """The record of an evaluation of `source` (None: initial weights), to be written once that is loaded.

    Raises:
        UserError: on every rank; the folder holds a training run, or the evaluation of something else.
    """
    return from_main(launch.world, lambda: _open_evaluation(launch, source))


def _open_evaluation(launch: Launch, source: Path | None) -> dict[str, Any]:
    folder = launch.folder
    about = launch.describe() | {"checkpoint": None if source is None else str(source)}
    old = _read(folder) if (folder / NAME).exists() else None
    if (folder / "checkpoints").exists() or (old is not None and "checkpoint" not in old):
        raise UserError(
            f"{folder} holds a training run, whose results this evaluation would replace: add "
            f"run_dir={folder / 'evaluation'} or another folder"
        )
    if old is None:
        return about
    changed = [f"recipe: {old['recipe']} -> {about['recipe']}"] if old["recipe"] != about["recipe"] else []
    settings = differences(old["config"], about["config"])
    changed += [text for text in settings if _within(text, EVALUATED) and not _within(text, NOT_EVALUATED)]
    if changed:
        raise UserError(
            f"{folder} holds an evaluation with other settings ({'; '.join(changed)}), whose results this one would "
            "replace: give another run_dir=DIR, or remove the folder"
        )
    if old["checkpoint"] != about["checkpoint"]:
        print(f"{folder}: replaces the evaluation of {old['checkpoint'] or 'initial weights'}", flush=True)
    return about


def write(launch: Launch, record: dict[str, Any]) -> None:
    """Write recipe.json. UserError on every rank: the disk refuses."""
    from_main(launch.world, lambda: write_json(launch.folder / NAME, record))


def note_stop(launch: Launch, record: dict[str, Any], step: int, why: str) -> None:
    """Add to recipe.json, on rank 0, that the run was told to stop, and with which step it did. Not collective.

    It is told where this cannot be written; the run is saved all the same. The others wait until it is there, but not
    for long: a launcher that sees one process end ends all of them, rank 0 too.
    """
    before = record.get("stopped") or []
    if launch.world.is_main:
        try:
            write_json(launch.folder / NAME, {**record, "stopped": [*before, {"step": step, "why": why}]})
        except UserError as error:
            print(f"that {why} ended this run is not noted: {error}", flush=True)
        return
    until = time.monotonic() + _NOTED_SECONDS
    while not _is_noted(launch.folder, len(before)) and time.monotonic() < until:
        time.sleep(0.2)  # thousands of ranks may look


def _is_noted(folder: Path, stops: int) -> bool:
    """Whether the record tells of more than these stops."""
    try:
        return len(read_json(folder / NAME).get("stopped") or []) > stops
    except UserError:
        return False


def _read(folder: Path) -> dict[str, Any]:
    """The record in a run folder. UserError: none, or damaged."""
    path = folder / NAME
    mend = "restore it, or give another run_dir=DIR"
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error}, so it is not known what the run in this folder is made of: {mend}") from error
    for name, kind in (("recipe", str), ("config", dict)):
        if not isinstance(record.get(name), kind):
            raise UserError(f"{path}: {name} is missing or damaged: {mend}")
    return record


def _within(text: str, paths: tuple[str, ...]) -> bool:
    """Whether a sentence of `differences` is about one of the settings, or about a part of it."""
    setting = text.split(":")[0]
    return any(setting == path or setting.startswith(f"{path}.") for path in paths)


def tokenizer_hash(recipe: Recipe) -> str | None:
    """sha256 of the tokenizer's files, wherever they lie; None where a recipe has none."""
    path: Path | None = getattr(recipe.inputs, "tokenizer", None)
    return None if path is None else content_hash(path)
