"""Checkpoints: trainable weights, Adam moments and the position in the data; written whole or not at all.

    RUN/checkpoints/step-00000100/
        manifest.json           format, step, every file with bytes and sha256, every tensor with shape, frozen hash
        model.safetensors       trainable weights, fp32, by the model's own names
        optimizer.safetensors   exp_avg/<name> and exp_avg_sq/<name>, fp32
        state.json              step, seed, recipe, random rule, quarantined records, best metric
    RUN/checkpoints/latest      name of the newest complete checkpoint
    RUN/checkpoints/best        name of the best one, where a metric decides

Tensors are whole and named, so a checkpoint loads at any ZeRO stage and any number of processes. Frozen weights are
not in it: they come from their own source and are checked by hash. No random state is stored: every draw is made from
(seed, step, rank) or (seed, position), so the step is the state.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm.distributed import barrier, from_main
from vlm.files import replace_file, sync
from vlm.models import trained
from vlm.models.system import System
from vlm.run import zero_state
from vlm.run.run_folder import read_json
from vlm.types import UserError
from vlm.weights import diff_keys, file_hash

FORMAT = 1
WEIGHTS, OPTIMIZER, STATE = trained.WEIGHTS, "optimizer.safetensors", "state.json"


@dataclass(slots=True)
class Progress:
    """Where a run stands: everything beside tensors that a resumed run needs."""

    step: int = 0  # optimizer steps made; the data position is step * global_batch_size
    best_metric: float | None = None
    best_step: int | None = None
    quarantined: list[tuple[str, str, str]] = field(default_factory=list)


class Saver:
    """Writes the checkpoints of a run. `save` returns as soon as the state is copied; `wait` when it is on disk.

    Args:
        root: the run's checkpoint folder.
        engine: vlm.run.engine.Engine.
        keep: newest checkpoints to keep; the best one is kept besides.
    """

    def __init__(self, root: Path, engine: Any, *, keep: int) -> None:
        self.root, self.engine, self.keep = root, engine, keep

    def save(self, progress: Progress, about: dict[str, Any], *, is_best: bool = False) -> Path:
        """Begin to write a checkpoint; its folder. Collective. `progress` may change afterwards."""
        return save(self.root, self.engine, progress, about, keep=self.keep, is_best=is_best)

    def problem(self) -> UserError | None:
        """Why what was begun cannot be written, as far as this rank knows by now. Not collective, does not wait."""
        return None

    def wait(self) -> None:
        """Until all that was begun is on disk, verified and named by `latest`. Collective.

        Raises:
            UserError: on every rank; it could not be written.
        """


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
    Raises:
        UserError: on every rank; it could not be written, or does not hold what trains. The one before it is intact.
    """
    final = root / f"step-{progress.step:08d}"
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, values in zero_state.read(engine):
        if engine.world.is_main:
            weights[name] = values["param"]
            moments.update({f"{kind}/{name}": values[kind] for kind in zero_state.MOMENTS})
    if engine.world.is_main:
        buffers = {name: b.detach().cpu().clone() for name, b in trained.persistent_buffers(engine.model).items()}
        state = {
            "step": progress.step,
            **adam_steps(engine),
            "random": "torch is seeded by (seed, step, rank) at each step, samples by (seed, position)",
            "quarantined": progress.quarantined,
            "best_metric": progress.best_metric,
            "best_step": progress.best_step,
            **about,
        }
        shapes = _trained_shapes(engine)
        own = shapes | {name: b.shape for name, b in buffers.items()}
        adam = {f"{kind}/{name}": shape for name, shape in shapes.items() for kind in zero_state.MOMENTS}
        want = {WEIGHTS: own, OPTIMIZER: adam}

    def write() -> None:
        try:
            _write(root, final, {**weights, **buffers}, moments, state, engine.model.frozen_hash(), want)
            if is_best:
                replace_file(root / "best", f"{final.name}\n".encode())
        except (OSError, SafetensorError) as error:  # safetensors does not say OSError where the disk is full
            raise UserError(
                f"{final}: the checkpoint could not be written ({error}). What was saved before is intact: make "
                "room, then the same command goes on from there"
            ) from error
        finally:
            _remove_unfinished(root)
        _prune(root, keep, final.name)

    from_main(engine.world, write)
    return final


def adam_steps(engine: Any) -> dict[str, Any]:
    """How many optimizer steps the moments have seen, as state.json says it: the commonest count, and what differs."""
    counts = zero_state.step_counts(engine)
    common = Counter(counts.values()).most_common(1)[0][0] if counts else 0
    return {"adam_steps": common, "adam_steps_of": {name: n for name, n in counts.items() if n != common}}


def _trained_shapes(engine: Any) -> dict[str, Sequence[int]]:
    """Every tensor that the engine was built to train and its whole shape."""
    parameters = dict(engine.model.named_parameters())
    return {name: getattr(parameters[name], "ds_shape", parameters[name].shape) for name in engine.names.values()}


def _compare_contents(path: Path, want: Mapping[str, Sequence[int]]) -> None:
    """Open what was written and refuse it (UserError) if a tensor is not in it, or of another shape, or too many."""
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
    _remove_unfinished(root)
    temporary = root / f".{final.name}.tmp"
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    save_file(moments, temporary / OPTIMIZER, metadata={"format": "pt"})
    (temporary / STATE).write_text(json.dumps(state, indent=1))
    for name, shapes in want.items():
        _compare_contents(temporary / name, shapes)
    files = {}
    for path in sorted(temporary.iterdir()):
        path.chmod(0o644)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        sync(path)
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
    replace_file(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
    if final.exists():  # a damaged one: the run went on from an older one and has come to this step again
        final.rename(root / f".{final.name}.replaced")
    temporary.rename(final)
    sync(root)
    replace_file(root / "latest", f"{final.name}\n".encode())


def _remove_unfinished(root: Path) -> None:
    """Remove what failed and killed saves left behind: it takes the room that the next one needs."""
    for folder in root.glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _prune(root: Path, keep: int, written: str) -> None:
    """Remove all but the one just `written`, the `keep` - 1 before it and the best.

    Those of later steps go too: the run could not go on from them (they are damaged) and makes these steps again.
    """
    kept = {written, *[name for name in steps(root) if name <= written][-keep:]}
    with contextlib.suppress(OSError):
        kept.add((root / "best").read_text().strip())
    for folder in root.glob("step-*"):
        if folder.name not in kept:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                print(f"{folder}: could not be removed ({error}); it is not needed any more", flush=True)


def steps(root: Path) -> list[str]:
    """Names of the complete checkpoints under `root`, oldest first."""
    return sorted(p.name for p in root.glob("step-*") if (p / "manifest.json").is_file())


def verify(folder: Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    """The manifest of a checkpoint after checking every file's size and hash.

    Args:
        needs: files without which it is of no use to the caller.
    Raises:
        UserError: a file is missing or cannot be read, or its content is not what was written.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder}/manifest.json: checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}"
        )
    files = manifest.get("files")
    if not (isinstance(files, dict) and files and all(isinstance(entry, dict) for entry in files.values())):
        raise UserError(f"{folder}/manifest.json: lists no files, so nothing can be checked; use another checkpoint")
    for name in (*needs, *files):
        path = folder / name
        if name not in files or not path.is_file():
            raise UserError(f"{path}: is missing; use another checkpoint of the run")
        try:
            same = path.stat().st_size == files[name].get("bytes") and file_hash(path) == files[name].get("sha256")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        if not same:
            raise UserError(f"{path}: content differs from the manifest (damaged on disk?); use another checkpoint")
    return manifest


def newest(root: Path) -> tuple[Path, list[str]] | None:
    """The newest checkpoint that a run can go on from, and a sentence for each newer one that had to be passed over.

    Raises:
        UserError: there are checkpoints, and none is intact.
    """
    passed_over: list[str] = []
    for name in reversed(steps(root)):
        try:
            verify(root / name, (WEIGHTS, OPTIMIZER, STATE))
        except UserError as error:
            passed_over.append(str(error))
            continue
        return root / name, passed_over
    if passed_over:
        raise UserError("no checkpoint of this run is intact: " + "; ".join(passed_over))
    return None


def resolve(path: Path) -> Path:
    """The checkpoint folder meant by `path`: itself, or what a run folder's or checkpoint folder's `latest` names; the
    newest intact one where `latest` names none.

    Raises:
        UserError: nothing of the kind is there.
    """
    if path.is_file():
        raise UserError(
            f"{path}: is a file, and a checkpoint of ours is a folder. If it is a published file, convert it first: "
            f"python tools/convert_ckpt.py {path} FOLDER --from FORMAT --to vlm"
        )
    if (path / "manifest.json").is_file():
        return path
    for root in (path, path / "checkpoints"):
        with contextlib.suppress(OSError):
            named = root / (root / "latest").read_text().strip()
            if (named / "manifest.json").is_file():
                return named
        found = newest(root)
        if found is not None:
            return found[0]
    raise UserError(f"{path}: is neither a checkpoint (manifest.json) nor a run folder with checkpoints/latest")


def load_weights(folder: Path, model: System) -> dict[str, Any]:
    """Load a checkpoint's tensors into an unwrapped model, checking names, shapes and the frozen base.

    Returns:
        the checkpoint's state.json.
    Raises:
        UserError: damaged, names or shapes differ from the model, or the frozen weights are not those it was
            trained with.
    """
    manifest = verify(folder, (WEIGHTS,))
    tensors = load_file(folder / WEIGHTS)
    trained.put(model, tensors, manifest, str(folder))
    state = folder / STATE
    return json.loads(state.read_text()) if state.is_file() else {}


def load_optimizer(folder: Path, engine: Any, state: dict[str, Any]) -> None:
    """Set master weights, moments and step count of a wrapped engine from a verified checkpoint. Collective."""
    weights = load_file(folder / WEIGHTS)
    moments = load_file(folder / OPTIMIZER)
    zero_state.prime(engine)
    for name in weights.keys() & set(engine.names.values()):
        values = {"param": weights[name], **{kind: moments[f"{kind}/{name}"] for kind in zero_state.MOMENTS}}
        zero_state.write(engine, name, values)
    common, others = state["adam_steps"], state.get("adam_steps_of", {})
    zero_state.set_step_counts(engine, {name: others.get(name, common) for name in engine.names.values()})
    barrier()
