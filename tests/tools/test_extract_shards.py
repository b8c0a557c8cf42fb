"""extract_features on shard sets: what a frozen tower makes of videos, as members of the same records."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import damaged, encode, pictures
from PIL import Image
from safetensors.torch import load_file

from tools import extract_features, make_shards
from vlm import recipe as recipes
from vlm.config import to_dict
from vlm.data.dialogues import DialogueConfig
from vlm.data.features import read_tensor
from vlm.data.frames import Look, see
from vlm.data.rng import SampleRng
from vlm.data.shard_derive import Derived
from vlm.data.shards import ShardSet, write_shards
from vlm.models.eva import TowerConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.tower_frames import TowerFrames
from vlm.models.video_llama import VideoLlama, VideoLlamaConfig
from vlm.nn.qformer import QFormerConfig
from vlm.recipe import OptimConfig, Recipe, TrainData
from vlm.run.stored import check_recipe
from vlm.types import Batch, Sample, UserError, Visit
from vlm.weights import write_safetensors

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE, FRAMES = 28, 3
TOWER = TowerConfig(image_size=SIDE, dim=16, layers=2, heads=2, hidden=24, queries=3, query_dim=16, query_layers=2,
                    query_heads=2, query_hidden=24)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:the frozen EVA and Q-Former have RANDOM weights")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in each of several processes: on a CPU the last bit of a product depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shards/: 7 videos of 2 to 14 frames, an image and a text alone, three to a shard; tower.safetensors."""
    root = tmp_path_factory.mktemp("place")
    samples = []
    for number in range(7):
        (root / f"{number}.mp4").write_bytes(encode(pictures(2 * number + 2, 40, 32, seed=number)))
        annotation = {"caption": f"this is clip {number}", "conversations": turns(f"what is {number}?")}
        samples.append(Sample(key=f"clip {number}", video=root / f"{number}.mp4", annotation=annotation))
    Image.fromarray(pictures(1, 48, 40, seed=99)[0]).save(root / "image.png")
    samples.insert(2, Sample(key="image", video=root / "image.png", annotation={"caption": "a picture"}))
    samples.insert(4, Sample(key="text", annotation={"conversations": turns("no video at all?", place="")}))
    write_shards(samples, root / "shards", arguments={"source": "test", "split": "train"}, shard_samples=3)
    write_shards(samples, root / "one/shards", arguments={"source": "test", "split": "train"})
    tower = TOWER.build()
    write_safetensors(root / "tower.safetensors", {f"tower.{name}": t for name, t in tower.state_dict().items()})
    return root


def turns(question: str, place: str = "<video>") -> list[dict[str, str]]:
    return [{"from": "human", "value": f"{place}{question}"}, {"from": "gpt", "value": "nobody knows."}]


def tower_options(file: Path) -> list[str]:
    sizes = [f"{name}={value}" for name, value in to_dict(TOWER).items() if name not in ("path", "vision_path")]
    return ["--encoder", "eva-qformer", "--tower", f"path={file}", *sizes, "--frames", str(FRAMES)]


def run(place: Path, out: Path, *arguments: object) -> int:
    command = ["--shards", str(place / "shards"), "--out", str(out), "--batch-size", "4", "--workers", "0"]
    return extract_features.main([*command, *tower_options(place / "tower.safetensors"), *map(str, arguments)])


@pytest.fixture(scope="module")
def tokens(place: Path) -> Path:
    """The set of tokens in float32."""
    assert run(place, place / "tokens", "--dtype", "float32") == 0
    return place / "tokens"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_members_of_the_same_records(place: Path, tokens: Path) -> None:
    source, made = ShardSet(place / "shards"), ShardSet(tokens)
    assert [shard["records"] for shard in made.manifest["shards"]] == [3, 3, 3]
    assert made.members == ("video", "q_former.safetensors", "json")
    tower = TOWER.build()
    encoder = TowerFrames(TOWER, "q_former", DialogueConfig().colours)
    for row in range(len(source)):
        before, after = source.read(row), made.read(row)
        facts = (before.key, before.shard, before.annotation, before.num_frames, before.fps)
        assert facts == (after.key, after.shard, after.annotation, after.num_frames, after.fps)
        assert after.video is None
        if before.video is None:
            assert not after.members
            continue
        frames = see(before, Look(FRAMES, SIDE, "uniform"), SampleRng(5)).frames
        assert len(frames) == (1 if before.key == "image" else min(FRAMES, before.num_frames))
        found = read_tensor(after, "q_former")
        assert (found.dtype, found.shape) == (torch.float32, (len(frames), 3, 16))
        torch.testing.assert_close(found, encoder(frames)["q_former"], atol=1e-6, rtol=1e-5)
    for column in ("num_frames", "fps", "duration", "width", "height", "text_length"):
        np.testing.assert_array_equal(source.index[column], made.index[column])
    said = made.manifest["arguments"]["tensors"]["q_former"]
    assert said["frames"] == {"num_frames": FRAMES, "size": SIDE, "sampling": "uniform"}
    assert said["encoder"]["sha256"]["float32"] == VideoLlama(model_config()).frozen_hash().split("+")[1]
    assert tower.query_tokens.dtype == torch.float32


def test_again_with_video_in_bfloat16_beside_what_is_there(place: Path, tokens: Path, tmp_path: Path) -> None:
    """Kept videos are the same bytes; a set can be given features twice."""
    out, twice = tmp_path / "both", tmp_path / "twice"
    assert run(place, out, "--keep-video", "--workers", 1) == 0
    for row in range(len(ShardSet(out))):
        before, after = ShardSet(place / "shards").read(row), ShardSet(out).read(row)
        assert (after.video, after.decoders) == (before.video, before.decoders)
        if before.video is not None:
            exact = read_tensor(ShardSet(tokens).read(row), "q_former")
            assert torch.equal(read_tensor(after, "q_former"), exact.bfloat16())
    arguments = ["--shards", str(out), "--out", str(twice), "--name", "other", "--workers", "0"]
    assert extract_features.main([*arguments, *tower_options(place / "tower.safetensors")]) == 0
    assert ShardSet(twice).members == ("video", "other.safetensors", "q_former.safetensors", "json")
    assert set(ShardSet(twice).manifest["arguments"]["tensors"]) == {"q_former", "other"}


def test_a_recipe_says_how(place: Path, tmp_path: Path) -> None:
    """Its tower, frames, size and name; here of the recipe for tests, whose tower is random."""
    arguments = ["--shards", str(place / "shards"), "--encoder", "eva-qformer", "--recipe", "video_llama.debug"]
    assert extract_features.main([*arguments, "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    made = recipes.load("video_llama.debug", ["inputs.source=features", f"data.shards={tmp_path / 'out'}", "eval=none"])
    check_recipe(made, made.model.build())
    opened = ShardSet(tmp_path / "out")
    tokens = read_tensor(opened.read(1, made.inputs.members), made.inputs.features)
    assert tokens.shape == (4, made.model.tower.queries, made.model.tower.query_dim)


# Whoever builds it ---------------------------------------------------------------------------------------------------


def test_killed_ranks_and_one_process_after_them_give_the_same_bytes(
    place: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes are killed with kill -9 when some shards are there; one goes on, with what it finds."""
    out = tmp_path / "out"
    command = ["--shards", str(place / "shards"), "--out", str(out), "--batch-size", "4", "--workers", "0",
               *tower_options(place / "tower.safetensors"), "--dtype", "float32"]  # fmt: skip
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    call = f"stop_after(1, {str(tmp_path / 'pids')!r}, sys.argv[1:])"
    program = f"import sys; from {Path(__file__).stem} import stop_after; {call}"
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}:{REPOSITORY / 'tests/tools'}"}  # fmt: skip
    runner, pids = tmp_path / "runner.py", tmp_path / "pids"
    runner.write_text(program)
    pids.mkdir()
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(runner)]
    with subprocess.Popen([*starter, *command], env=env, cwd=REPOSITORY, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:  # fmt: skip
        try:
            wait_for(lambda: len(list(out.glob(".unfinished/shard-*.json"))) == 2, process)
            capsys.readouterr()
            assert extract_features.main(command) == 2
            assert f"another process is writing shards into {out}" in capsys.readouterr().err
        finally:  # the ranks are in sessions of their own
            for pid in (process.pid, *(int(file.name) for file in pids.iterdir())):
                os.kill(pid, signal.SIGKILL)
    with (out / ".unfinished/lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the dead one's is free
    assert not (out / "manifest.json").exists()
    begun = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    assert set(begun) == {"shard-000000.tar", "shard-000001.tar"}
    assert extract_features.main([*command, "--frames", "2"]) == 2
    assert "begun with other settings (tensors.q_former.frames.num_frames: 3 -> 2; there" in capsys.readouterr().err
    assert extract_features.main(command) == 0
    assert begun.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}.items()
    assert files(out) == files(tokens)
    assert extract_features.main(command) == 0  # finished: left as it is
    assert extract_features.main([*command, "--frames", "2"]) == 2


def stop_after(shards: int, pids: str, arguments: list[str]) -> None:
    """The command, in which each process stands still after so many shards: what each of the processes above does."""
    (Path(pids) / str(os.getpid())).touch()
    build, built = Derived.build, []

    def build_some(self: Derived, number: int, added: Any) -> None:
        build(self, number, added)
        built.append(number)
        if len(built) == shards:
            time.sleep(300)

    Derived.build = build_some  # type: ignore[method-assign]
    sys.exit(extract_features.main(arguments))


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)


def test_videos_that_cannot_be_read_are_left_out_with_a_reason(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, data in enumerate((encode(pictures(4, 40, 32)), damaged()["html"], encode(pictures(5, 40, 32)))):
        (tmp_path / f"{number}.mp4").write_bytes(data)
    samples = [Sample(key=str(n), video=tmp_path / f"{n}.mp4", annotation={"caption": "c"}) for n in range(3)]
    write_shards(samples, tmp_path / "shards", arguments={"source": "test"}, check=False)
    assert run(tmp_path, tmp_path / "out", "--tower", f"path={place / 'tower.safetensors'}") == 2
    assert "1 of 3 records have no features, more than the share of 0.05" in capsys.readouterr().err
    arguments = ("--tower", f"path={place / 'tower.safetensors'}", "--max-failed", 0.5)
    assert run(tmp_path, tmp_path / "out", *arguments) == 0
    made = ShardSet(tmp_path / "out")
    assert [made.key(row) for row in range(len(made))] == ["0", "2"]
    assert [(row["key"], "HTML" in row["reason"]) for row in made.manifest["rejected"]] == [("1", True)]


# Features in the place of pixels -------------------------------------------------------------------------------------


def model_config(**changes: Any) -> VideoLlamaConfig:
    return VideoLlamaConfig(
        tower=changes.pop("tower", TOWER),
        frame_tokens=3,
        frame_dim=16,
        num_video_tokens=2,
        max_frames=4,
        qformer=QFormerConfig(dim=16, heads=2, hidden=24, dropout=0.0),
        llama=LlamaBaseConfig(dim=16, layers=1, heads=2, hidden=24, vocab_size=320),
        **changes,
    )


def inputs(source: str) -> DialogueConfig:
    """Training without crops and with frames evenly spread: what stored features are of."""
    return DialogueConfig(source=source, num_video_tokens=2, frame_tokens=3, frame_dim=16, num_frames=FRAMES, size=SIDE,
                          caption_sampling="uniform", augment=False)  # type: ignore[arg-type]  # fmt: skip


def batch_of(shards: Path, config: DialogueConfig) -> Batch:
    """All records, as training reads them."""
    opened, rng = ShardSet(shards), SampleRng(0)
    records = [opened.read(row, config.members) for row in range(len(opened))]
    visit = Visit(views=("caption", "dialogue"))
    return config.collate([example for record in records for example in config.train(record, rng, visit)], rng)


def test_losses_from_features_are_those_from_pixels(place: Path, tokens: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_config().build().eval()
    pixels, stored = batch_of(place / "shards", inputs("pixels")), batch_of(tokens, inputs("features"))
    tower = ("--tower", f"path={place / 'tower.safetensors'}")
    assert run(place / "one", tmp_path / "same", *tower, "--dtype", "float32", "--batch-size", 64) == 0
    same = model(batch_of(tmp_path / "same", inputs("features")))
    assert stored.frames is None
    assert pixels.frames is not None
    assert stored.frame_counts == pixels.frame_counts == (2, 3, 1, 3, 3, 3, 3, 3)
    exact, found = model(pixels), model(stored)
    assert exact.keys() == found.keys() == {"caption", "dialogue"}
    for name, (total, count) in exact.items():
        assert count == found[name].count > 0
        assert torch.equal(same[name].total, total)  # frames encoded in the batches that training had: to the bit
        torch.testing.assert_close(found[name].total, total, atol=0, rtol=1e-6)  # in others
    assert run(place, tmp_path / "rounded") == 0  # bfloat16 as always
    rounded = model(batch_of(tmp_path / "rounded", inputs("features")))
    for name, (total, _) in exact.items():
        torch.testing.assert_close(rounded[name].total, total, atol=0, rtol=2**-8)


def recipe(model: VideoLlamaConfig, shards: Path, source: str = "features") -> Recipe:
    return Recipe(model=model, inputs=inputs(source), data=TrainData(shards=str(shards)), optim=OptimConfig(lr=1e-3),
                  views={"caption": 1.0}, global_batch_size=2, steps=1)  # fmt: skip


def test_features_of_another_tower_are_refused(place: Path, tokens: Path) -> None:
    right = model_config()
    check_recipe(recipe(right, tokens), right.build())
    bfloat = TowerConfig(**{**to_dict(TOWER), "dtype": "bfloat16"})
    check_recipe(recipe(model_config(tower=bfloat), tokens), model_config(tower=bfloat).build())  # the same, rounded
    other = model_config(tower=TowerConfig(**{**to_dict(TOWER), "random_seed": 1}))
    model = other.build()
    with pytest.raises(UserError) as caught:
        check_recipe(recipe(other, tokens), model)
    ours = model.frozen_hash().split("+")[1]
    theirs = right.build().frozen_hash().split("+")[1]
    for said in (str(tokens), "q_former", "model.tower (path=None)", ours[:16], theirs[:16]):
        assert said in str(caught.value)
    check_recipe(recipe(other, place / "shards", "pixels"), model)  # pixels are of no tower
    nothing = model_config(tower=None)
    check_recipe(recipe(nothing, tokens), nothing.build())


# Through a file ------------------------------------------------------------------------------------------------------


def test_by_way_of_a_file_beside_any_source(place: Path, tokens: Path, tmp_path: Path) -> None:
    """Features first, from the videos of a source, then make_shards: the same tensors, beside the videos."""
    root = tmp_path / "webvid"
    (root / "videos/p").mkdir(parents=True)
    lines = ["videoid,page_dir,name"]
    for number in range(3):
        (root / f"videos/p/{number}.mp4").write_bytes((place / f"{number + 1}.mp4").read_bytes())
        lines.append(f"{number},p,clip {number}")
    (root / "results_2M_train.csv").write_text("\n".join(lines) + "\n")
    command = ["webvid", "--root", str(root), "--split", "train"]
    out = tmp_path / "f.safetensors"
    assert extract_features.main([*command, "--out", str(out), *tower_options(place / "tower.safetensors"), "--dtype",
                                  "float32", "--workers", "0"]) == 0  # fmt: skip
    assert set(load_file(out)) == {f"q_former/{ShardSet(place / 'shards') and n}" for n in range(3)}
    made = tmp_path / "made"
    assert make_shards.main([*command, "--out", str(made), "--features", str(out), "--workers", "1"]) == 0
    shards, expected = ShardSet(made), ShardSet(tokens)
    by_key = {expected.key(row): row for row in range(len(expected))}
    for row in range(3):
        record = shards.read(row)
        assert record.video is not None
        token = read_tensor(expected.read(by_key[f"clip {row + 1}"]), "q_former")
        torch.testing.assert_close(read_tensor(record, "q_former"), token, atol=1e-6, rtol=1e-5)
    told = shards.manifest["arguments"]["tensors"]["q_former"]
    assert told["encoder"] == expected.manifest["arguments"]["tensors"]["q_former"]["encoder"]
    assert json.loads(json.dumps(told)) == told


def test_published_folders_beside_any_source(place: Path, tmp_path: Path) -> None:
    """NAME=FOLDER of arrays; a record that lacks one is kept with a warning."""
    content = io.BytesIO()
    np.save(content, np.ones((2, 3), np.float32))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.npy").write_bytes(content.getvalue())
    root = tmp_path / "corpus"
    (root / "videos/p").mkdir(parents=True)
    for name in "ab":
        (root / f"videos/p/{name}.mp4").write_bytes((place / "1.mp4").read_bytes())
    (root / "results_2M_train.csv").write_text("videoid,page_dir,name\na,p,one\nb,p,two\n")
    command = ["webvid", "--root", str(root), "--split", "train", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert make_shards.main([*command, "--features", f"intern={tmp_path / 'folder'}"]) == 0
    shards = ShardSet(tmp_path / "out")
    assert torch.equal(read_tensor(shards.read(0), "intern"), torch.ones(2, 3))
    assert [row["warning"] for row in shards.manifest["warnings"]] == [
        f"no intern of this video in {tmp_path / 'folder'}"
    ]


def test_a_tower_without_weights_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shards", str(place / "shards"), "--out", str(tmp_path / "out"), "--encoder", "eva-qformer"]
    for more in ([], ["--tower", "dtype=bfloat16"]):
        assert extract_features.main([*arguments, *more]) == 2
        assert "neither --recipe NAME nor --tower path=FILE is given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fps", 2), "--fps says nothing beside --encoder eva-qformer"),
        (("--states", "cls:-2"), "--states says nothing beside --encoder eva-qformer"),
        (("--root", "x"), "--root says nothing beside --shards"),
        (("--frames", 0), "--frames 0 must be at least 1"),
        (("--tower", "path=gone.pth"), "--tower path=gone.pth: there is no such file"),
        (("--tower", "depth=3"), "depth"),
        (("--recipe", "vamos.nextqa_cap"), "--recipe vamos.nextqa_cap has no model.tower"),
    ],
)
def test_errors_are_one_readable_message(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], message: str
) -> None:
    assert run(place, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
