"""Checkpoints: trainable weights, Adam moments and the position in the data; written whole or not at all.

    RUN/checkpoints/step-00000100/
        manifest.json           format, step, every file with bytes and sha256, every tensor with shape, frozen hash
        model.safetensors       trainable weights, fp32, by the model's own names
        optimizer.safetensors   exp_avg/<name> and exp_avg_sq/<name>, fp32
        state.json              step, seed, recipe, random rule, quarantined keys, best metric
    RUN/checkpoints/latest      name of the newest complete checkpoint
    RUN/checkpoints/best        name of the best one, where a metric decides

Tensors are whole and named, so a checkpoint loads at any ZeRO stage and any number of processes. Frozen weights are
not in it: they come from their own source and are checked by hash. No random state is stored: every draw is made from
(seed, step, rank) or (seed, position), so the step is the state.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.config import differences, to_dict
from vlm.distributed import barrier, share_object
from vlm.models.system import System
from vlm.run import zero_state
from vlm.types import UserError

FORMAT = 1


@dataclass(slots=True)
class Progress:
    """Where a run stands: everything beside tensors that a resumed run needs."""

    step: int = 0  # optimizer steps made; the data position is step * global_batch_size
    best_metric: float | None = None
    best_step: int | None = None
    quarantined: list[str] = field(default_factory=list)


def save(root: Path, engine: Any, progress: Progress, about: dict[str, Any], *, keep: int, is_best: bool) -> Path:
    """Write a checkpoint of `engine` under `root` and point `latest` (and `best`) at it. Collective.

    Args:
        root: the run's checkpoint folder.
        engine: vlm.run.engine.Engine.
        progress: where the run stands.
        about: JSON-able facts stored with it (recipe, seed, world size, …).
        keep: newest checkpoints to keep; the best one is kept besides.
        is_best: this one has the best metric so far.
    Returns:
        the folder.
    """
    final = root / f"step-{progress.step:08d}"
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, values in zero_state.read(engine):
        if engine.world.is_main:
            weights[name] = values["param"]
            moments.update({f"{kind}/{name}": values[kind] for kind in zero_state.MOMENTS})
    if engine.world.is_main:
        buffers = {name: b.detach().cpu().clone() for name, b in persistent_buffers(engine.model).items()}
        state = {
            "step": progress.step,
            "adam_steps": zero_state.step_count(engine),
            "random": "torch is seeded by (seed, step, rank) at each step, samples by (seed, position)",
            "quarantined": progress.quarantined,
            "best_metric": progress.best_metric,
            "best_step": progress.best_step,
            **about,
        }
        try:
            shapes = _trained_shapes(engine)
            own = shapes | {name: b.shape for name, b in buffers.items()}
            adam = {f"{kind}/{name}": shape for name, shape in shapes.items() for kind in zero_state.MOMENTS}
            want = {"model.safetensors": own, "optimizer.safetensors": adam}
            _write(root, final, {**weights, **buffers}, moments, state, engine.model.frozen_hash(), want)
            if is_best:
                _point(root, "best", final.name)
            _prune(root, keep)
        except OSError as error:
            _raise_on_all(
                OSError(f"{final}: the checkpoint could not be written ({error}); the previous one is intact")
            )
        except UserError as error:
            _raise_on_all(error)
    _raise_on_all(None)
    return final


def _raise_on_all(error: Exception | None) -> None:
    """Rank 0 says whether the write failed; all ranks raise together, so none waits for the others."""
    error = share_object(error)
    if error is not None:
        raise error


def _trained_shapes(engine: Any) -> dict[str, Sequence[int]]:
    """Every tensor that the engine was built to train and its whole shape."""
    parameters = dict(engine.model.named_parameters())
    return {name: getattr(parameters[name], "ds_shape", parameters[name].shape) for name in engine.names.values()}


def _compare_contents(path: Path, want: Mapping[str, Sequence[int]]) -> None:
    """Open what was written and refuse it (UserError) if a tensor is not in it, or of another shape, or too many."""
    from vlm.weights import diff_keys

    with safe_open(path, "pt") as file:
        have = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    difference = diff_keys(have, want)
    if difference:
        raise UserError(
            f"{path}: does not hold what trains, so a run that resumes from it would lose it: {difference}\n"
            "The checkpoint before it is intact, and `latest` still names it. Mend: look for requires_grad that was "
            "changed after the model was built, or a parameter that was replaced"
        )


def _write(
    root: Path,
    final: Path,
    tensors: dict[str, Tensor],
    moments: dict[str, Tensor],
    state: dict[str, Any],
    frozen: str,
    want: Mapping[str, Mapping[str, Sequence[int]]],
) -> None:
    """Everything into a temporary folder, compared with what trains (`want`: file -> name -> shape), flushed to disk,
    then one rename; `latest` moves last."""
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    save_file(moments, temporary / "optimizer.safetensors", metadata={"format": "pt"})
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    for name, shapes in want.items():
        _compare_contents(temporary / name, shapes)
    files = {}
    for path in sorted(temporary.iterdir()):
        path.chmod(0o644)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _flush(path)
    described = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in tensors.items()
    }
    manifest = {
        "format": FORMAT,
        "step": state["step"],
        "recipe": state.get("recipe"),
        "frozen_hash": frozen,
        "files": files,
        "tensors": described,
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _flush(temporary / "manifest.json")
    _flush(temporary)
    if final.exists():  # the same step written again after a resume from an older checkpoint
        shutil.rmtree(final)
    temporary.rename(final)
    _flush(root)
    _point(root, "latest", final.name)


def _point(root: Path, pointer: str, name: str) -> None:
    temporary = root / f".{pointer}.tmp"
    temporary.write_text(name + "\n")
    _flush(temporary)
    temporary.rename(root / pointer)
    _flush(root)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest and the best; also what a killed save left behind."""
    kept = set(steps(root)[-keep:])
    with contextlib.suppress(OSError):
        kept.add((root / "best").read_text().strip())
    for folder in root.iterdir():
        stale = folder.name.startswith(".step-") and folder.is_dir()
        if stale or (folder.name.startswith("step-") and folder.name not in kept):
            shutil.rmtree(folder)


def steps(root: Path) -> list[str]:
    """Names of the complete checkpoints under `root`, oldest first."""
    return sorted(p.name for p in root.glob("step-*") if (p / "manifest.json").is_file())


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint after checking every file's size and hash.

    Raises:
        UserError: a file is missing, or its content is not what was written.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = manifest["files"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{folder}: not a complete checkpoint (manifest.json: {error})") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: checkpoint format {manifest.get('format')}, this version reads {FORMAT}")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is missing; use another checkpoint of the run")
        if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: content differs from the manifest (damaged on disk?); use another checkpoint")
    return manifest


def newest(root: Path) -> tuple[Path, list[str]] | None:
    """The newest complete and undamaged checkpoint, and a sentence for each newer one that had to be passed over."""
    passed_over: list[str] = []
    for name in reversed(steps(root)):
        try:
            verify(root / name)
        except UserError as error:
            passed_over.append(str(error))
            continue
        return root / name, passed_over
    if passed_over:
        raise UserError("no checkpoint of this run is intact: " + "; ".join(passed_over))
    return None


def resolve(path: Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or what a run folder's or checkpoint folder's `latest` names.

    Raises:
        UserError: nothing of the kind is there.
    """
    if (path / "manifest.json").is_file():
        return path
    for root in (path, path / "checkpoints"):
        if (root / "latest").is_file():
            return root / (root / "latest").read_text().strip()
    raise UserError(f"{path}: is neither a checkpoint (manifest.json) nor a run folder with checkpoints/latest")


def load_weights(folder: Path, model: System) -> dict[str, Any]:
    """Load a checkpoint's tensors into an unwrapped model, checking names, shapes and the frozen base.

    Returns:
        the checkpoint's state.json.
    Raises:
        UserError: damaged, names or shapes differ from the model, or the frozen weights are not those it was
            trained with.
    """
    from vlm.weights import diff_keys

    manifest = verify(folder)
    tensors = load_file(folder / "model.safetensors")
    want = {name: p for name, p in model.named_parameters() if p.requires_grad} | persistent_buffers(model)
    difference = diff_keys(tensors, want)
    other, contradictions = _other_settings(manifest, model)
    settings = f"\nSettings, the checkpoint's -> this recipe's: {', '.join(other)}" if other else ""
    if difference:
        raise UserError(f"{folder}: does not fit this recipe's model: {difference}{settings}")
    if manifest["frozen_hash"] != model.frozen_hash():
        raise UserError(
            f"{folder}: was trained on other frozen weights (hash {manifest['frozen_hash']}) than this recipe loads "
            f"({model.frozen_hash()}); give the same frozen base, or the result is noise{settings}"
        )
    if contradictions:
        raise UserError(
            f"{folder}: was trained with other settings (the checkpoint's -> this recipe's): "
            f"{', '.join(contradictions)}. With these its weights compute something else; give the recipe the "
            "checkpoint's values"
        )
    with torch.no_grad():
        for name, target in want.items():
            target.copy_(tensors[name])
    state = folder / "state.json"
    return json.loads(state.read_text()) if state.is_file() else {}


def _other_settings(manifest: dict[str, Any], model: System) -> tuple[list[str], list[str]]:
    """How the model settings stored in a checkpoint differ from the model's own: all, and those that are decisive."""
    stored = (manifest.get("recipe") or {}).get("model")
    config = getattr(model, "config", None)
    if not stored or config is None:
        return [], []
    own = to_dict(config)
    try:
        decisive = differences(model.decisive(stored), model.decisive(own), "model")
    except (KeyError, TypeError):  # stored by a version with other settings
        decisive = []
    return differences(stored, own, "model"), decisive


def load_optimizer(folder: Path, engine: Any, state: dict[str, Any]) -> None:
    """Set master weights, moments and step count of a wrapped engine from a verified checkpoint. Collective."""
    weights = load_file(folder / "model.safetensors")
    moments = load_file(folder / "optimizer.safetensors")
    zero_state.prime(engine)
    for name in weights.keys() & set(engine.names.values()):
        values = {"param": weights[name], **{kind: moments[f"{kind}/{name}"] for kind in zero_state.MOMENTS}}
        zero_state.write(engine, name, values)
    zero_state.set_step_count(engine, state["adam_steps"])
    barrier()


def persistent_buffers(model: System) -> dict[str, Tensor]:
    """Buffers that belong to the state dict (running statistics, queues), without those of frozen modules' sources."""
    state = model.state_dict(keep_vars=True)
    parameters = {id(p) for p in model.parameters()}
    return {name: value for name, value in state.items() if id(value) not in parameters}
