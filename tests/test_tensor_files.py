"""Layouts, and what a stranger's manifest and header may say: they are told as damaged, whatever they hold."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from vlm.run import checkpoint, restore
from vlm.tensor_files import check_file, layout_of, seal
from vlm.types import UserError

HOLDS = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}


@pytest.fixture
def folder(tmp_path):
    return checkpoint.write(tmp_path, {"step": 1, "recipe": {}}, HOLDS, {"exp_avg/w": torch.ones(3, 4)}, "none")


def rewrite(folder, change):
    """Change header and manifest of a checkpoint, and seal it again as if it had been written so."""
    path, manifest = folder / "model.safetensors", json.loads((folder / "manifest.json").read_text())
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header = change(header, manifest) or header
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    path.write_bytes(head + content[end:])
    entry = manifest["files"]["model.safetensors"]
    entry |= {"bytes": path.stat().st_size, "header_sha256": hashlib.sha256(head).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))


def test_a_layout_is_what_safetensors_reads(tmp_path):
    layout = layout_of({name: (value.dtype, tuple(value.shape)) for name, value in HOLDS.items()})
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for name, (begin, end) in layout.places.items():
        data[begin:end] = HOLDS[name].numpy().tobytes()
    (tmp_path / "file.safetensors").write_bytes(data)
    read = load_file(tmp_path / "file.safetensors")
    assert all(read[name].equal(value) for name, value in HOLDS.items())


def test_what_is_sealed_again_unchanged_is_intact(folder):
    rewrite(folder, lambda header, manifest: None)
    checkpoint.verify(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, manifest: header["w"].update(data_offsets=[0, 10**18]),
        lambda header, manifest: header["w"].update(data_offsets=[-8, 40]),
        lambda header, manifest: header["w"].update(data_offsets=[40, 8]),
        lambda header, manifest: header["w"].update(data_offsets=["a", None]),
        lambda header, manifest: header["w"].update(data_offsets=[1]),
        lambda header, manifest: header["w"].pop("data_offsets"),
        lambda header, manifest: header.update(w=3),
        lambda header, manifest: [header],
        lambda header, manifest: manifest["tensors"].update(w=None),
        lambda header, manifest: manifest.update(tensors=7),
        lambda header, manifest: manifest["files"]["model.safetensors"].update(hashes="step"),
    ],
)
def test_a_header_or_manifest_that_nobody_writes_is_told_as_damaged(folder, change):
    rewrite(folder, change)
    with pytest.raises(UserError, match=r"model\.safetensors: content differs from the manifest"):
        checkpoint.verify(folder)
    with pytest.raises(UserError, match=r"model\.safetensors: content differs from the manifest"):
        check_file(folder / "model.safetensors", json.loads((folder / "manifest.json").read_text()))


def test_tensors_that_overlap_are_refused_before_they_are_taken(folder):
    def overlap(header, manifest):
        header["b"]["data_offsets"] = [0, 20]
        manifest["tensors"]["b"]["sha256"] = hashlib.sha256(HOLDS["w"].numpy().tobytes()[:20]).hexdigest()

    before = json.loads((folder / "manifest.json").read_text())["tensors"]["b"]["sha256"]
    rewrite(folder, overlap)
    assert json.loads((folder / "manifest.json").read_text())["tensors"]["b"]["sha256"] != before
    with pytest.raises(UserError, match=r"model\.safetensors"):
        restore.load_weights(folder, torch.nn.Linear(1, 1))
