"""Faults of data: shards that vanish, change or are cut; clips that no decoder reads; samples that teach nothing."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import points
from tests.faults.courses import Course
from tests.faults.harness import Setting, Trial, at_step, describe, kind
from tests.faults.jobs import Inject

STOPPED = (
    "the run ends with status 2 and names the shard; it is put back: restart at the first try; weights, moments and "
    "samples of every step equal to the uninterrupted run's to the bit"
)
QUARANTINED = (
    "that sample alone is replaced, by the same one as in an uninterrupted run without decoder trouble, written to "
    "quarantine.jsonl with its reason; weights, moments and samples equal to the bit, killed in between or not"
)
_PLENTY = ("data.quarantine_share=1.0", "data.sample_seconds=4", "data.retries=1", "model.drop_path=0.2")

_HASTY = tuple(text if "seconds" not in text else "data.sample_seconds=1.5" for text in _PLENTY)


# A file of the set is not what it was --------------------------------------------------------------------------------


def _at_step(step: int, act: Callable[[], None]) -> Inject:
    """Rank 0 does it as it asks for the samples of a step (from 0)."""

    def inject(rank: int) -> None:
        if rank == 0:
            at_step(step, act)

    return inject


def _spoil_shard(trial: Trial, spoil: Callable[[Path], str]) -> str:
    """A shard is spoilt before the run or in the middle of it; the run stops and names it; the shard is put back."""
    shards = trial.own_shards()
    setting = trial.draw(
        steps=14, every=3, shards=shards, workers=trial.rng.choice((0, 0, 1)), overrides=_PLENTY[2:] + _SHARE
    )
    path = shards / f"shard-{trial.rng.randrange(4):06d}.tar"
    kept = shutil.copy2(path, trial.folder / "kept.tar")
    step = trial.rng.randrange(-1, 6)

    def act() -> None:
        trial.strike(f"{path.name} {spoil(path)} {'before the run' if step < 0 else f'at step {step}'}")

    if step < 0:
        act()
    printed = trial.run(setting, None if step < 0 else _at_step(step, act), expect=2)
    assert trial.struck()
    said = [line for line in printed.splitlines() if "error: " in line]
    assert said, printed[-1500:]
    assert path.name in said[0], f"not named in: {said[0]}"
    assert "Traceback" not in printed, printed[-1500:]
    Path(kept).replace(path)
    if not trial.run_dir.is_dir():
        trial.run(setting)
        trial.compare(trial.workshop.reference(_on(setting, None)))
        return f"{trial.struck()[0]}; {describe(setting)}: began"
    return f"{trial.struck()[0]}; {trial.survives(setting, reference=trial.workshop.reference(_on(setting, None)))}"


_SHARE = ("data.quarantine_share=0.005",)


def _on(setting: Setting, shards: Path | None) -> Setting:
    """The same run on other shards, loading in the training process, which changes nothing."""
    from dataclasses import replace

    return replace(setting, shards=shards, workers=0)


@kind("truncated_tar", what="a shard is cut short, before the run or in the middle of it", checked=STOPPED)
def truncated_tar(trial: Trial) -> str:
    def spoil(path: Path) -> str:
        length = trial.rng.randrange(path.stat().st_size)
        os.truncate(path, length)
        return f"cut to {length} bytes"

    return _spoil_shard(trial, spoil)


@kind("vanished_shard", what="a shard is removed, before the run or in the middle of it", checked=STOPPED)
def vanished_shard(trial: Trial) -> str:
    def spoil(path: Path) -> str:
        path.unlink()
        return "removed"

    return _spoil_shard(trial, spoil)


@kind("changed_shard", what="a shard is replaced by another one of the set, before the run or in the middle of it",
      checked=STOPPED)  # fmt: skip
def changed_shard(trial: Trial) -> str:
    def spoil(path: Path) -> str:
        other = path.with_name(f"shard-{(int(path.stem[-1]) + 1) % 4:06d}.tar")
        shutil.copy(other, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        return f"replaced by {other.name}"

    return _spoil_shard(trial, spoil)


@kind("reordered_members", what="a shard is packed again, its records in another order", checked=STOPPED)
def reordered_members(trial: Trial) -> str:
    def spoil(path: Path) -> str:
        from vlm.data.shards import ShardSet

        index = ShardSet(trial.shards).index
        rows = [row for row in index if row["shard"] == int(path.stem.removeprefix("shard-"))]
        content = path.read_bytes()
        records = [content[int(row["offset"]) : int(row["offset"]) + int(row["nbytes"])] for row in rows]
        order = list(range(len(records)))
        while order[0] == 0:
            trial.rng.shuffle(order)
        end = max(int(row["offset"]) + int(row["nbytes"]) for row in rows)
        path.with_suffix(".new").write_bytes(b"".join(records[place] for place in order) + content[end:])
        path.with_suffix(".new").replace(path)
        return f"packed in the order {order}"

    return _spoil_shard(trial, spoil)


# A sample is of no use -----------------------------------------------------------------------------------------------


def _unreadable(key: str) -> Inject:
    """Frames of a record cannot be read: what every decoder trouble comes to."""

    def inject(rank: int) -> None:
        from vlm.data import clip_frames
        from vlm.data.video import DecodeError

        reading = clip_frames.read

        def refused(record: Any, indices: Any) -> Any:
            if record.key == key:
                raise DecodeError("refused")
            return reading(record, indices)

        clip_frames.read = refused

    return inject


def _quarantined(
    trial: Trial, setting: Setting, key: str, reference: Course, inject: Inject | None, *reasons: str
) -> str:
    """A run in which one sample is unusable, killed in the middle half of the time: nothing else is touched by it."""
    killed = trial.rng.random() < 0.5
    if killed:
        end = _at_step(trial.rng.randrange(2, setting.steps), points.kill_self)

        def both(rank: int) -> None:
            if inject is not None:
                inject(rank)
            end(rank)

        trial.start(setting, both).wait(grace=0.0)
        said = trial.survives(setting, reference=reference, inject=inject)
    else:
        trial.run(setting, inject)
        trial.compare(reference)
        said = f"{describe(setting)}: went on by itself"
    noted = [json.loads(line) for line in (trial.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert [row["key"] for row in noted] == [key], f"quarantined: {noted}"
    assert any(reason in noted[0]["reason"] for reason in reasons), f"the reason is {noted[0]['reason']!r}"
    clean = trial.workshop.reference(_on(setting, None) if setting.recipe == "vit_llama.debug" else setting).loaded
    seen = trial.course().loaded
    for step, keys in clean.items():
        wrong = [(one, other) for one, other in zip(keys, seen[step], strict=True) if one != other and one != key]
        assert not wrong, f"step {step}: {wrong}"
        assert key not in seen[step], f"step {step} trained on {key}"
    return f"{key} ({noted[0]['reason'][:60]}); {said}"


def _clip_trouble(trial: Trial, setting: Setting, key: str, inject: Inject | None, *reasons: str) -> str:
    reference = trial.workshop.reference(_on(setting, None), f"unreadable {key}", _unreadable(key))
    return _quarantined(trial, setting, key, reference, inject, *reasons)


def _drawn_record(trial: Trial) -> tuple[int, str]:
    from vlm.data.shards import ShardSet

    row = trial.rng.randrange(32)
    return row, ShardSet(trial.shards).key(row)


def _overwrite(shards: Path, row: int, member: str, change: Callable[[bytes], bytes]) -> None:
    """Change a member of a record where it lies in the tar, keeping its length."""
    from vlm.data.shards import ShardSet

    entry = ShardSet(shards).index[row]
    begin, length = int(entry[f"{member}_offset"]), int(entry[f"{member}_nbytes"])
    with (shards / f"shard-{entry['shard']:06d}.tar").open("r+b") as file:
        file.seek(begin)
        content = change(file.read(length))
        assert len(content) == length
        file.seek(begin)
        file.write(content)


@kind("corrupt_clip", what="a clip's bytes are noise, or noise from some place on", checked=QUARANTINED)
def corrupt_clip(trial: Trial) -> str:
    shards, (row, key) = trial.own_shards(), _drawn_record(trial)
    kept = trial.rng.choice((0.0, trial.rng.uniform(0, 0.3)))

    def noise(content: bytes) -> bytes:
        whole = int(len(content) * kept)
        return content[:whole] + trial.rng.randbytes(len(content) - whole)

    _overwrite(shards, row, "video", noise)
    setting = trial.draw(shards=shards, workers=trial.rng.choice((0, 1)), overrides=_PLENTY)
    return _clip_trouble(trial, setting, key, None, "")


@kind("zero_byte_clip", what="a clip is empty: a member of no bytes, or of zeros alone", checked=QUARANTINED)
def zero_byte_clip(trial: Trial) -> str:
    shards, (row, key) = trial.own_shards(), _drawn_record(trial)
    setting = trial.draw(shards=shards, workers=trial.rng.choice((0, 1)), overrides=_PLENTY)
    if trial.rng.random() < 0.5:
        _overwrite(shards, row, "video", lambda content: bytes(len(content)))
        return _clip_trouble(trial, setting, key, None, "")

    def inject(rank: int) -> None:  # as a set would have it that somebody else packed
        from dataclasses import replace

        from vlm.data.shards import ShardSet

        reading = ShardSet.read

        def emptied(self: Any, at: int, members: Any = None) -> Any:
            record = reading(self, at, members)
            return replace(record, video=b"") if record.key == key else record

        ShardSet.read = emptied  # type: ignore[method-assign]

    return _clip_trouble(trial, setting, key, inject, "")


def _in_decoder(key: str, act: Callable[[], Any]) -> Inject:
    """The decoders do something as they come to a record."""

    def inject(rank: int) -> None:
        from vlm.data import clip_frames

        reading = clip_frames.read

        def struck(record: Any, indices: Any) -> Any:
            if record.key == key:
                act()
            return reading(record, indices)

        clip_frames.read = struck

    return inject


@kind("decoder_hang", what="every decoder hangs at a clip, for ever", checked=QUARANTINED)
def decoder_hang(trial: Trial) -> str:
    _, key = _drawn_record(trial)
    setting = trial.draw(workers=trial.rng.choice((1, 2)), steps=6, overrides=_HASTY)
    return _clip_trouble(trial, setting, key, _in_decoder(key, lambda: time.sleep(3600)), "took more than")


@kind("decoder_segfault", what="every decoder crashes at a clip (SIGSEGV)", checked=QUARANTINED)
def decoder_segfault(trial: Trial) -> str:
    _, key = _drawn_record(trial)
    setting = trial.draw(workers=trial.rng.choice((1, 2)), overrides=_PLENTY)
    return _clip_trouble(trial, setting, key, _in_decoder(key, lambda: ctypes.string_at(0)), "SIGSEGV")


# Samples that teach the wrong thing ----------------------------------------------------------------------------------


_QUESTIONS = ("model.llama.dim=32", "data.quarantine_share=1.0", "data.retries=1", "inputs.caption=none")


def _question_shards(trial: Trial) -> Path:
    """The workshop's 12 videos with questions, features and captions. Read only."""
    folder = trial.workshop.folder / "questions"
    if not folder.is_dir():
        from tests.question_shards import shards

        shards(folder, videos=12, questions=3)
    return folder / "shards" / "train"


@kind("nan_features", what="features of a video hold NaN or infinity, here and there or everywhere",
      checked=QUARANTINED)  # fmt: skip
def nan_features(trial: Trial) -> str:
    import numpy as np

    from vlm.data.shards import ShardSet

    whole = _question_shards(trial)
    row = trial.rng.randrange(len(ShardSet(whole)))
    key = ShardSet(whole).key(row)
    shards = Path(shutil.copytree(whole, trial.folder / "features"))
    value = trial.rng.choice((float("nan"), float("inf"), float("-inf")))
    share = trial.rng.choice((0.02, 0.5, 1.0))

    def spoilt(content: bytes) -> bytes:
        import io

        features = np.load(io.BytesIO(content))
        count = max(1, int(features.size * share))
        features.reshape(-1)[trial.rng.sample(range(features.size), count)] = value
        out = io.BytesIO()
        np.save(out, features)
        return out.getvalue()

    _overwrite(shards, row, "features.npy", spoilt)
    setting = trial.draw(recipe="vamos.debug", shards=shards, overrides=_QUESTIONS)
    clean = _on(setting, whole)

    def unreadable(rank: int) -> None:
        from vlm.data import questions
        from vlm.data.video import DecodeError

        reading = questions.read_features

        def refused(record: Any) -> Any:
            if record.key == key:
                raise DecodeError("refused")
            return reading(record)

        questions.read_features = refused

    reference = trial.workshop.reference(clean, f"unreadable {key}", unreadable)
    return _quarantined(trial, setting, key, reference, None, "finite")


@kind("empty_labels", what="a record has no label, or one that is none of the classes",
      checked="the run ends with status 2 and names the record and its shard; once that is mended it is as if it had "
      "never been: restart at the first try; weights, moments and samples equal to the bit")  # fmt: skip
def empty_labels(trial: Trial) -> str:
    shards, (row, key) = trial.own_shards(), _drawn_record(trial)
    entry_path = next(path for path in sorted(shards.glob("*.tar")) if key.encode() in path.read_bytes())
    kept = shutil.copy2(entry_path, trial.folder / "kept.tar")
    label = trial.rng.choice(("", None, [], -1, 8, "gone"))

    def emptied(content: bytes) -> bytes:
        annotation = json.loads(content)
        annotation.pop("label")
        if label != "gone":
            annotation["label"] = label
        return json.dumps(annotation, separators=(",", ":")).encode().ljust(len(content))

    _overwrite(shards, row, "json", emptied)
    setting = trial.draw(shards=shards, workers=trial.rng.choice((0, 1)))
    printed = trial.run(setting, expect=2)
    for word in ("error: ", repr(key), entry_path.name, "label"):
        assert word in printed, f"{word} is not in {printed[-1500:]}"
    assert "Traceback" not in printed, printed[-1500:]
    Path(kept).replace(entry_path)
    said = trial.survives(setting, reference=trial.workshop.reference(_on(setting, None)))
    return f"label {label!r} of {key}; {said}"


@kind("over_long_sample", what="one question is hundreds of times as long as the others, and longer than rows may be",
      checked="it is cut, counted in metrics.jsonl, and costs nothing else: killed in the middle, restart at the first "
      "try; weights, moments and samples equal to the uninterrupted run's to the bit")  # fmt: skip
def over_long_sample(trial: Trial) -> str:
    from tests.question_shards import tree
    from vlm.data.shards import write_shards
    from vlm.sources import nextqa

    row, words = trial.rng.randrange(24), trial.rng.choice((500, 1500))
    shards = trial.workshop.folder / f"long-{row}-{words}"
    if not shards.is_dir():
        root = tree(trial.folder / "long", 8, 3)
        lines = (root / "train.csv").read_text().splitlines()
        lines[1 + row] = lines[1 + row].replace("what does dog", "what does " + "very " * words + "old dog")
        (root / "train.csv").write_text("\n".join(lines) + "\n")
        write_shards(nextqa.read(root, "train"), shards, arguments={"source": "nextqa", "split": "train"})
    setting = trial.draw(recipe="vamos.debug", shards=shards, overrides=_QUESTIONS)
    end = _at_step(trial.rng.randrange(1, setting.steps), points.kill_self)
    trial.start(setting, end).wait(grace=0.0)
    said = trial.survives(setting)
    cut = sum(line.get("rows_shortened", 0) + line.get("rows_too_long", 0) for line in trial.course().rows)
    assert cut, "that the row was cut is in no line of metrics.jsonl"
    return f"question {row} has {words} words more, cut {cut} times; {said}"
