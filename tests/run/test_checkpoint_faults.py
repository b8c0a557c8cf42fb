"""What is saved stays whole, whatever the disk does; what is damaged is found; training does not wait for the disk."""

import errno
import json
import os
import random
import re
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import make_engine, step

from vlm.distributed import join
from vlm.errors import Stuck
from vlm.run import checkpoint, checkpoint_files, zero_state
from vlm.run.checkpoint import Progress, Saver
from vlm.run.engine import Engine
from vlm.types import UserError
from vlm.weights import file_hash


@pytest.fixture(scope="module")
def engine():
    world = join()
    return Engine(*make_engine(world), world)


@pytest.fixture
def saver(engine, tmp_path):
    said = []
    saver = Saver(tmp_path, engine, keep=1, say=said.append)
    saver.said = said
    return saver


def save(saver, number, **how):
    folder = saver.save(Progress(step=number), {"recipe": {}}, **how)
    saver.wait()
    return folder


def held(engine):
    """Copies of weights and moments, by their names in the files."""
    values = dict(zero_state.read(engine))
    weights = {name: value["param"] for name, value in values.items()}
    return weights | {f"{kind}/{name}": v[kind] for name, v in values.items() for kind in zero_state.MOMENTS}


def written(folder):
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


class Gate:
    """A function that waits inside until it is told to go on."""

    def __init__(self, usual):
        self.usual, self.reached, self.open = usual, threading.Event(), threading.Event()

    def __call__(self, *arguments, **named):
        self.reached.set()
        assert self.open.wait(30)
        return self.usual(*arguments, **named)


def test_training_goes_on_while_it_is_written(engine, saver, monkeypatch):
    gate = Gate(checkpoint_files._write_fragments)
    monkeypatch.setattr(checkpoint_files, "_write_fragments", gate)
    before = held(engine)
    folder = saver.save(Progress(step=1), {"recipe": {}})
    assert gate.reached.wait(30)
    step(engine, 0)
    step(engine, 1)
    assert not folder.exists()
    assert saver._job.progress()[0] == "writing model.safetensors"
    assert not equal(held(engine), before)
    waited = []
    saver._alive = lambda: waited.append(saver._job.progress())
    threading.Timer(0.5, gate.open.set).start()
    saver.wait()
    assert waited, "who waits must tell that the save gets on"
    assert equal(written(folder), before)
    assert saver.figures().keys() == {"save_stall"}
    assert saver.figures() == {}


def test_a_save_that_comes_too_early_waits_and_says_so(engine, saver, monkeypatch):
    gate = Gate(checkpoint_files._sync_file)
    monkeypatch.setattr(checkpoint_files, "_sync_file", gate)
    before = held(engine)
    first = saver.save(Progress(step=1), {"recipe": {}})
    assert gate.reached.wait(30)
    step(engine, 2)
    threading.Timer(1.0, gate.open.set).start()
    saver.keep = 2
    second = saver.save(Progress(step=2), {"recipe": {}})
    assert first.is_dir(), "the memory of the first was used before it was on disk"
    saver.wait()
    assert equal(written(first), before)
    assert equal(written(second), held(engine))
    told = saver.figures()
    assert 0.2 < told["save_wait"] < 100 > told["save_stall"] > 0
    assert re.fullmatch(r"step-00000002 waited \d+\.\d s for step-00000001, which was still being written", *saver.said)


@pytest.mark.parametrize("error", [UserError, FloatingPointError])
def test_a_run_that_ends_with_an_error_finishes_what_it_began_to_save(saver, monkeypatch, error):
    gate = Gate(checkpoint_files._write_fragments)
    monkeypatch.setattr(checkpoint_files, "_write_fragments", gate)
    with pytest.raises(error, match="the data is gone"), saver:
        folder = saver.save(Progress(step=1), {"recipe": {}})
        threading.Timer(0.3, gate.open.set).start()
        raise error("the data is gone")
    checkpoint.verify(folder)


def test_host_memory_is_used_again(engine, saver):
    memory = saver._plan.memory.data_ptr()
    save(saver, 1)
    save(saver, 2)
    assert saver._plan.memory.data_ptr() == memory


def test_a_save_that_is_stuck_ends_with_what_it_was_at(engine, tmp_path, monkeypatch):
    gate = Gate(checkpoint_files._sync_file)
    monkeypatch.setattr(checkpoint_files, "_sync_file", gate)
    saver = Saver(tmp_path, engine, keep=1, seconds=100)
    saver.save(Progress(step=1), {"recipe": {}})
    assert gate.reached.wait(30)
    assert saver.problem() is None
    saver._job._began -= 99.9
    began = time.monotonic()
    with pytest.raises(Stuck, match=r"step-00000001: has been written for .*rank 0 .*flushing model\.safetensors"):
        saver.wait()
    assert time.monotonic() - began < 20
    assert "checkpoint_seconds=100" in str(saver.problem())
    gate.open.set()


def fail(number):
    def fails(*_arguments, **_named):
        raise OSError(number, os.strerror(number))

    return fails


REFUSALS = [
    (os, "pwrite", errno.ENOSPC),
    (os, "pwrite", errno.EIO),
    (os, "preadv", errno.EIO),
    (checkpoint_files, "sync", errno.EIO),
    (checkpoint_files, "prepare", errno.EROFS),
    (checkpoint_files, "_write_manifest", errno.ENOSPC),
    (checkpoint_files, "_rename", errno.EIO),
    (checkpoint_files, "replace_file", errno.EDQUOT),
]


@pytest.mark.parametrize(("module", "name", "number"), REFUSALS, ids=lambda value: getattr(value, "__name__", value))
def test_what_the_disk_refuses_leaves_the_one_before(saver, tmp_path, monkeypatch, module, name, number):
    first = save(saver, 1)
    content = {path.name: path.read_bytes() for path in first.iterdir()}
    monkeypatch.setattr(module, name, fail(number))
    with pytest.raises(UserError, match=rf"step-00000002: .*{os.strerror(number)}.*saved before is intact: make room"):
        save(saver, 2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == content
    assert (tmp_path / "latest").read_text().strip() == "step-00000001"
    assert checkpoint.newest(tmp_path) == (first, [])
    save(Saver(tmp_path, saver.engine, keep=1), 3)
    assert checkpoint.steps(tmp_path) == ["step-00000003"]


def test_a_problem_is_known_without_waiting(saver, monkeypatch):
    monkeypatch.setattr(os, "pwrite", fail(errno.ENOSPC))
    saver.save(Progress(step=1), {"recipe": {}})
    deadline = time.monotonic() + 30
    while saver.problem() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "No space left" in str(saver.problem())


def test_a_disk_that_gives_back_other_bytes_is_found(saver, tmp_path, monkeypatch):
    save(saver, 1)
    usual, torn = os.pwrite, []

    def tear(descriptor, data, offset):
        if not torn:
            torn.append(len(data))
            usual(descriptor, data[: len(data) // 2], offset)
            return len(data)
        return usual(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", tear)
    with pytest.raises(UserError, match=r"model\.safetensors gives back other bytes than were written"):
        save(saver, 2)
    assert torn
    assert checkpoint.steps(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_disk_that_gives_back_other_bytes_of_a_small_file_is_found(saver, tmp_path, monkeypatch, name):
    save(saver, 1)
    usual = checkpoint_files.replace_file

    def tear(path, content):
        usual(path, content[: len(content) // 2] if path.name == name else content)

    monkeypatch.setattr(checkpoint_files, "replace_file", tear)
    with pytest.raises(UserError, match=rf"{name} gives back other bytes than were written"):
        save(saver, 2)
    assert checkpoint.steps(tmp_path) == ["step-00000001"]


def test_writes_that_are_cut_short_are_continued(engine, saver, monkeypatch):
    usual = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: usual(descriptor, data[:1000], offset))
    assert equal(written(save(saver, 1)), held(engine))


def test_another_writer_ends_the_save_and_nothing_else(saver, tmp_path, monkeypatch):
    save(saver, 1)
    usual = checkpoint_files._write_fragments

    def interrupted(*arguments):
        for folder in tmp_path.glob(".step-*"):
            shutil.rmtree(folder)
        return usual(*arguments)

    monkeypatch.setattr(checkpoint_files, "_write_fragments", interrupted)
    with pytest.raises(UserError, match=r"(?s)step-00000002.*is not there for rank 0.*no other run may write there"):
        save(saver, 2)
    assert checkpoint.newest(tmp_path)[0].name == "step-00000001"


def test_what_a_killed_save_left_is_removed_at_the_next_start(engine, tmp_path):
    (tmp_path / ".step-00000009.tmp-12ab").mkdir()
    (tmp_path / ".step-00000009.tmp-12ab" / "model.safetensors").write_bytes(b"12")
    (tmp_path / ".step-00000003.gone").mkdir()
    (tmp_path / ".latest.tmp-x1").write_text("step")
    (tmp_path / "notes.txt").write_text("mine")
    Saver(tmp_path, engine, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_any_bit_that_flips_is_found(saver):
    folder = save(saver, 1)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    places = [("model.safetensors", 3), ("model.safetensors", 9), ("optimizer.safetensors", 0), ("manifest.json", 30)]
    places += [(path.name, rng.randrange(path.stat().st_size)) for path in sorted(folder.iterdir()) for _ in range(12)]
    harmless = 0
    for name, place in places:
        path = folder / name
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            changed = name != "manifest.json" or json.loads(damaged) != json.loads(content)
        except ValueError:
            changed = True
        if changed:
            with pytest.raises(UserError, match=re.escape(str(folder))):
                checkpoint.verify(folder)
        else:  # a blank of the manifest became another one
            harmless += 1
        path.write_bytes(content)
    assert harmless < len(places) / 4
    checkpoint.verify(folder)


def test_damage_names_the_tensor(saver):
    folder = save(saver, 1)
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    last = list(saver._plan.layouts["optimizer.safetensors"].places)[-1]
    with pytest.raises(UserError, match=rf"optimizer\.safetensors: content differs .*tensor {last};"):
        checkpoint.verify(folder)


def test_what_is_not_verified_removes_nothing(saver, tmp_path, monkeypatch):
    save(saver, 1)
    gate = Gate(checkpoint_files._verify_fragments)
    monkeypatch.setattr(checkpoint_files, "_verify_fragments", gate)
    saver.save(Progress(step=2), {"recipe": {}})
    assert gate.reached.wait(30)
    assert checkpoint.steps(tmp_path) == ["step-00000001"]
    assert (tmp_path / "latest").read_text().strip() == "step-00000001"
    gate.open.set()
    saver.wait()
    assert checkpoint.steps(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize(("kind", "value"), [("param", float("inf")), ("exp_avg_sq", float("nan"))])
def test_values_that_no_run_can_go_on_from_are_not_written(engine, saver, tmp_path, kind, value):
    save(saver, 1)
    name, values = next(iter(zero_state.read(engine)))
    spoilt = values[kind].clone()
    spoilt.view(-1)[-1] = value
    zero_state.write(engine, name, {kind: spoilt})
    try:
        with pytest.raises(UserError, match=f"step-00000002: would hold inf or nan in 1 tensors.*{re.escape(name)}"):
            save(saver, 2)
    finally:
        zero_state.write(engine, name, {kind: values[kind]})
    assert checkpoint.steps(tmp_path) == ["step-00000001"]


def test_the_format_before_is_read(engine, saver, tmp_path):
    folder = save(saver, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("model.safetensors", "optimizer.safetensors"):
        save_file(load_file(folder / name), folder / name, metadata={"format": "pt"})
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": file_hash(folder / n)} for n in names}
    tensors = {name: {k: v for k, v in entry.items() if k != "sha256"} for name, entry in manifest["tensors"].items()}
    old = {"format": 1, "step": 1, "recipe": {}, "frozen_hash": manifest["frozen_hash"]}
    (folder / "manifest.json").write_text(json.dumps(old | {"files": files, "tensors": tensors}))
    assert checkpoint.newest(tmp_path) == (folder, [])
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="another sha256"):
        checkpoint.verify(folder)


def test_the_manifest_says_all_of_each_tensor(engine, saver):
    folder = save(saver, 1)
    manifest = checkpoint.verify(folder)
    tensors = load_file(folder / "model.safetensors")
    assert manifest["format"] == 2
    assert manifest["tensors"].keys() == tensors.keys()
    assert manifest["optimizer"].keys() == {f"{kind}/{name}" for name in tensors for kind in zero_state.MOMENTS}
    assert manifest["frozen"] == engine.model.frozen_hashes()
    for name, entry in manifest["tensors"].items():
        assert entry["shape"] == list(tensors[name].shape)
        assert entry["dtype"] == "float32" == str(tensors[name].dtype).removeprefix("torch.")
        assert len(entry["sha256"]) == 64


def test_carried_tensors_and_buffers_are_written(engine, saver):
    engine.model.carried["old.weight"] = torch.arange(6.0).view(2, 3)
    engine.model.register_buffer("seen", torch.tensor([3, 5]))
    try:
        folder = save(saver, 1)
        tensors = load_file(folder / "model.safetensors")
        assert tensors["old.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert tensors["seen"].tolist() == [3, 5]
        assert checkpoint.verify(folder)["tensors"]["seen"]["dtype"] == "int64"
        assert "exp_avg/old.weight" not in load_file(folder / "optimizer.safetensors")
    finally:
        del engine.model.carried["old.weight"], engine.model.seen
