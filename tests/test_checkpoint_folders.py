"""Which checkpoint a run folder means, whatever became of `latest`: for models that start from it, and for tests."""

import json
import re
import warnings
from functools import partial

import pytest
import torch

from vlm.checkpoint_folders import FORMATS, meant, verify
from vlm.run import checkpoint
from vlm.tensor_files import seal
from vlm.types import UserError

LAST = "step-00000003"


@pytest.fixture
def run(tmp_path):
    """A run folder with three checkpoints; `latest` names the last."""
    root = tmp_path / "checkpoints"
    for number in (1, 2, 3):
        weights = {"w": torch.full((4,), float(number))}
        checkpoint.write(root, {"step": number, "recipe": {}}, weights, {"exp_avg/w": torch.ones(4)}, "none")
    assert (root / "latest").read_text().strip() == LAST
    return tmp_path


@pytest.fixture(params=[meant, checkpoint.resolve], ids=["models", "run"])
def take(request):
    """The name of what is taken for a path, and what is said of it."""

    def taken(path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            folder = request.param(path)
        assert len(caught) <= 1
        return folder.name, str(caught[0].message) if caught else ""

    return taken


def sealed_again(folder, **changes):
    """Change a manifest as if it had been written so."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(seal(manifest | changes)))


def rewritten(folder, old, new):
    """Change the text of a manifest, as damage does."""
    text = (folder / "manifest.json").read_text()
    assert text.count(old) == 1
    (folder / "manifest.json").write_text(text.replace(old, new))


def removed(folder, name):
    (folder / name).unlink()


def flipped(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("name", ["step-00000002", LAST])
def test_what_latest_names_is_taken_without_a_word(run, take, name):
    (run / "checkpoints" / "latest").write_text(f"{name}\n")
    for path in (run, run / "checkpoints", run / "checkpoints" / name):
        assert take(path) == (name, "")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is missing"),
        (b"step-00000009\n", "names 'step-00000009', where no checkpoint is (no manifest.json)"),
        (b"", "names '', where no checkpoint is (no manifest.json)"),
        (b"\0\xff\n", "names '\\x00\ufffd', where no checkpoint is (no manifest.json)"),
        (b"x" * 300, f"names '{'x' * 300}', where no checkpoint is (no manifest.json)"),
    ],
)
def test_a_stale_latest_costs_a_warning(run, take, content, says):
    root = run / "checkpoints"
    (root / "latest").unlink() if content is None else (root / "latest").write_bytes(content)
    for path in (run, root):
        assert take(path) == (LAST, f"{root}/latest {says}: {root}/{LAST} is taken instead")


DAMAGE = [
    (partial(removed, name="manifest.json"), "manifest.json: is missing"),
    (partial(rewritten, old='"format"', new='"for'), "manifest.json: line "),
    (partial(rewritten, old='"step": 3', new='"step": 7'), "manifest.json: is not as it was written"),
    (partial(rewritten, old='"format": 2', new='"format": 1'), "manifest.json: is not as it was written"),
    (partial(sealed_again, format=3), "manifest.json: checkpoint format 3, this version reads 1 and 2"),
    (partial(sealed_again, files={}), "manifest.json: lists no files"),
    (partial(flipped, name="model.safetensors"), "model.safetensors: content differs from the manifest"),
    (partial(removed, name="model.safetensors"), "model.safetensors: is missing"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGE)
@pytest.mark.parametrize("pointer", [LAST, None])
def test_the_newest_intact_one_is_taken_and_the_newer_are_named(run, take, damage, says, pointer):
    root = run / "checkpoints"
    damage(root / LAST)
    if pointer is None:
        (root / "latest").unlink()
    name, warning = take(run)
    assert name == "step-00000002"
    assert warning.startswith(f"{root}/latest {'is missing' if pointer is None else f'names {LAST!r}, w'}")
    assert f": {root}/step-00000002 is taken instead (passed over: {root}/{LAST}/{says}" in warning
    assert warning.count(f"{LAST}/") == 1
    assert "\n" not in warning


def test_an_older_one_that_latest_names_is_told_too(run, take):
    (run / "checkpoints" / "latest").write_text("step-00000001")
    flipped(run / "checkpoints" / "step-00000001", "model.safetensors")
    name, warning = take(run)
    assert name == LAST
    assert "names 'step-00000001', which is damaged: " in warning
    assert "passed over: " in warning


def test_where_none_is_intact_each_is_named_with_its_reason(run, take):
    for number, (damage, _) in enumerate((DAMAGE[0], DAMAGE[4], DAMAGE[6]), start=1):
        damage(run / "checkpoints" / f"step-{number:08d}")
    with pytest.raises(UserError, match="no checkpoint of this run is intact: ") as caught:
        take(run)
    reasons = str(caught.value).split("; ")
    for number, says in ((1, r"json: is missing"), (2, "checkpoint format 3"), (3, "content differs")):
        assert any(re.search(f"step-0000000{number}/.*{says}", reason) for reason in reasons), says


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "file.pth").write_bytes(b"")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009")
    (tmp_path / "checkpoints" / "step-00000009.copy").mkdir()
    for path in (tmp_path, tmp_path / "file.pth", tmp_path / "nowhere"):
        assert meant(path) is None


def test_a_seal_is_compared_wherever_it_stands(run):
    folder = run / "checkpoints" / LAST
    assert checkpoint.FORMAT in FORMATS
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(UserError, match=r"manifest\.json: is not as it was written"):
        verify(folder)
    del manifest["manifest_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))  # as format 1 had it
    verify(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json: is not as it was written"):
        verify(folder)
