"""launch/chat.py's pieces below its page: encoders, old files, examples, settings; and people's sessions."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from talking import write_clip

from launch.chat import open_encoder
from vlm.data.shards import write_shards
from vlm.models import glimpse
from vlm.recipe import EvalConfig, Recipe, load
from vlm.run.chat import ChatModel, Settings
from vlm.run.chat_command import rate_of, settings_of
from vlm.run.chat_examples import Examples, examples_of
from vlm.run.chat_handlers import Handlers, Page
from vlm.run.chat_open import open_model
from vlm.run.command import chat_main
from vlm.run.conversation import Conversation
from vlm.types import Sample, UserError

CPU = torch.device("cpu")
SHORT = Settings(max_new_tokens=6)


def recipe(*overrides: str) -> Recipe:
    """Video-ChatGPT without the variant's parts, on features of the demo's encoder."""
    width = glimpse.GlimpseEncoder.width
    sizes = [f"{part}.{name}" for part in ("model", "inputs")
             for name in (f"frame_dim={width}", "frame_tokens=1", "num_video_tokens=8")]  # fmt: skip
    plain = ["model.fusion=false", "model.positional_encodings=false", "model.train_also=()"]
    return load("video_chatgpt.debug", [*sizes, *plain, "inputs.features=glimpse", "data.shards=no", "eval.shards=no",
                                        *overrides])  # fmt: skip


def opened(recipe: Recipe, source: Path | None = None, **settings: Any) -> ChatModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
        return open_model(recipe, "video_chatgpt.debug", source, device=CPU, say=lambda text: None, **settings)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "red.mp4", (250, 30, 30))
    write_clip(folder / "blue.mp4", (30, 30, 250), frames=9)
    (folder / "notes.txt").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (60, 64, 80, 3), np.uint8)
    file = tmp_path_factory.mktemp("encoder") / "a.encoder.safetensors"
    glimpse.save(glimpse.fit(torch.from_numpy(frames)), file)
    return file


def test_features_are_made_by_the_encoder_once(clips: Path, encoder: Path) -> None:
    found = recipe()
    encode = open_encoder(found, CPU, encoder, None)
    passes = []
    encode.keywords["chosen"].encoder.register_forward_hook(lambda *_: passes.append(1))
    model = opened(found, encode=encode)
    seen = model.see(clips / "red.mp4", "a")
    assert seen.example.frame_tokens is not None
    assert seen.example.frame_tokens.shape == (8, 1, glimpse.GlimpseEncoder.width)
    assert "times in answers count 8 parts of 0.25 s" in seen.about
    once = len(passes)
    talk = Conversation(model, "a")
    talk.look(seen)
    talk.ask("What happens?", SHORT)
    assert model.see(clips / "red.mp4", "b") is seen
    assert len(passes) == once
    with pytest.raises(UserError, match=r"notes\.txt cannot be used: not a video"):
        model.see(clips / "notes.txt")
    assert open_encoder(found, CPU, None, None) is None
    with pytest.raises(UserError, match=r"no such|cannot|another"):
        open_encoder(found, CPU, clips / "none.safetensors", None)
    with pytest.raises(UserError, match="frame_dim"):
        open_encoder(recipe("inputs.frame_dim=30", "model.frame_dim=30"), CPU, encoder, None)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_an_old_projector_runs(tmp_path: Path, prefix: str) -> None:
    found = recipe("model.marks=false", "inputs.marks=false")
    model = opened(found)
    generator = torch.Generator().manual_seed(5)
    state = {
        f"{prefix}mm_projector.{name}": torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.system.mm_projector.state_dict().items()
    }
    torch.save(state, tmp_path / "mm_projector.bin")
    old = opened(found, source=tmp_path / "mm_projector.bin")
    for name, tensor in old.system.mm_projector.state_dict().items():
        assert torch.equal(tensor, state[f"{prefix}mm_projector.{name}"])
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(UserError, match=r"other\.bin"):
        opened(found, source=tmp_path / "other.bin")


def test_examples_of_folders_and_shards(clips: Path, encoder: Path, tmp_path: Path) -> None:
    found = recipe()
    model = opened(found, encode=open_encoder(found, CPU, encoder, None))
    examples = examples_of(model, str(clips))
    assert examples.names == ("blue.mp4", "red.mp4")
    assert examples.see is not None
    assert examples.see(1, "a") is model.see(clips / "red.mp4", "a")
    np.save(tmp_path / "glimpse.npy", np.random.default_rng(0).normal(size=(8, 1, 38)).astype(np.float16))
    samples = [
        Sample(key=f"k{n}", video=clips / "red.mp4", annotation={"caption": "a"},
               members={"glimpse.npy": tmp_path / "glimpse.npy"}) for n in range(3)
    ]  # fmt: skip
    write_shards(samples, tmp_path / "shards", arguments={"source": "shapes", "split": "test"})
    bare = opened(replace(found, eval=replace(found.eval, shards=str(tmp_path / "shards"))))  # type: ignore[type-var]
    examples = examples_of(bare, None)  # of the recipe's test shards, and without an encoder
    assert examples.names == ("k0", "k1", "k2")
    assert examples.see is not None
    seen = examples.see(2, "a")
    assert len(seen.pictures) == 8
    assert bare.videos.made == 1
    assert examples_of(opened(recipe()), None) == Examples()
    for folder, message in (("none", "no such folder"), ("empty", "no video is in it")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            examples_of(bare, str(tmp_path / folder))
    write_shards([replace(s, members={}) for s in samples], tmp_path / "videos", arguments={"source": "shapes"})
    with pytest.raises(UserError, match="have no glimpse"):
        examples_of(bare, str(tmp_path / "videos"))
    assert examples_of(model, str(tmp_path / "videos")).see(0, "a").key == model.see(clips / "red.mp4", "a").key  # type: ignore[misc]


def test_the_rate_of_features(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="as many frames of every video"):
        rate_of(recipe(), 2.0)
    assert rate_of(recipe(), None) is None
    questions = load("vamos.debug", [f"eval.shards={tmp_path / 'shards'}", "data.shards=no"])
    assert rate_of(questions, None) is None
    assert rate_of(questions, 2.0) == 2.0
    with pytest.raises(UserError, match="more than 0"):
        rate_of(questions, 0)
    write_shards([Sample(key="a", annotation={"features": {"fps": 4.0}}, members={"features.npy": _array(tmp_path)})],
                 tmp_path / "shards", arguments={"source": "shapes"})  # fmt: skip
    assert rate_of(questions, None) == 4.0


def _array(folder: Path) -> Path:
    np.save(folder / "features.npy", np.zeros((4, 8), np.float32))
    return folder / "features.npy"


def test_settings_are_those_of_the_recipe() -> None:
    assert settings_of(load("video_chatgpt.instruct")) == Settings(temperature=0.2, max_new_tokens=1024)
    assert settings_of(load("video_llama.demo")) == Settings(max_new_tokens=16)
    assert settings_of(load("vamos.demo")) == Settings()
    assert isinstance(load("vamos.demo").eval, EvalConfig)


# Sessions ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers(clips: Path, encoder: Path, tmp_path: Path) -> Handlers:
    found = recipe()
    model = opened(found, encode=open_encoder(found, CPU, encoder, None))
    page = Page(model=model, title="t", examples=examples_of(model, str(clips)), settings=SHORT, uploads=tmp_path)
    return Handlers(page, keep="KEEP")


def test_each_session_apart_and_gone_when_it_leaves(handlers: Handlers) -> None:
    ann, ben = (SimpleNamespace(session_hash=name) for name in ("ann", "ben"))
    assert "red.mp4" in handlers.choose("red.mp4", ann)[0]
    *_, (chat, field, status) = handlers.ask("What is it?", 0, 1, 6, ben)
    assert (chat, field) == ([], "What is it?")
    assert "Please choose a video first." in status
    *_, (chat, field, _) = handlers.ask("What is it?", 0, 1, 6, ann)
    assert [turn["role"] for turn in chat] == ["user", "assistant"]
    assert field == ""
    handlers.choose("red.mp4", ben)
    assert handlers.sessions.talk("ben").turns == []
    assert (len(handlers.sessions), len(handlers.model.videos)) == (2, 1)
    handlers.leave(ann)
    assert (len(handlers.sessions), len(handlers.model.videos)) == (1, 1)
    handlers.leave(ben)
    assert (len(handlers.sessions), len(handlers.model.videos)) == (0, 0)


def test_uploads_are_deleted_whatever_they_are(handlers: Handlers, clips: Path, tmp_path: Path) -> None:
    ann, ben = (SimpleNamespace(session_hash=name) for name in ("ann", "ben"))
    upload = tmp_path / "red.mp4"
    upload.write_bytes((clips / "red.mp4").read_bytes())
    assert "red.mp4" in handlers.upload(str(upload), ann)[2]
    assert not upload.exists()
    assert "red.mp4" in handlers.upload(str(upload), ben)[2]  # the same, handed over at the same moment
    upload.write_text("words " * 99)
    frames, status = handlers.upload(str(upload), ann)[2::2]
    assert frames == "KEEP"
    assert "looks like text" in status
    assert not upload.exists()


def test_what_goes_wrong_inside_is_told_without_its_words(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ann = SimpleNamespace(session_hash="ann")
    handlers.choose("red.mp4", ann)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret <path>")

    monkeypatch.setattr(handlers.model, "say", fail)
    *_, (_, field, status) = handlers.ask("What is it?", 0, 1, 6, ann)
    assert field == "What is it?"
    assert "RuntimeError" in status
    assert "secret" not in status
    assert "secret <path>" in capsys.readouterr().err
    monkeypatch.undo()
    *_, (chat, _, _) = handlers.ask("<b>What</b> is it?", 0, 1, 6, ann)
    assert chat[0]["content"] == "&lt;b&gt;What&lt;/b&gt; is it?"


def test_who_goes_away_stops_the_answer(handlers: Handlers) -> None:
    ann = SimpleNamespace(session_hash="ann")
    handlers.choose("red.mp4", ann)
    handlers.model.inputs.max_length = 4000
    states = handlers.ask("What is it?", 1.0, 1, 3000, ann)
    next(states)
    talk = handlers.sessions.talk("ann")
    handlers.leave(ann)
    waiting = threading.Thread(target=talk.wait)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
    states.close()  # type: ignore[attr-defined]
    assert talk.turns == []


# The command line ----------------------------------------------------------------------------------------------------


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert chat_main(open_encoder, ["--help"]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 80
    assert "deepspeed" not in page
    for arguments, message in (
        (["--recipe", "video_llama.demo", "--sampel"], "--sampel"),
        (["--recipe", "video_llama.dmo"], "video_llama.demo"),
        (["--recipe", "video_llama.demo", "--share"], "there is no such option"),
        (["--recipe", "video_llama.demo", "--video", "a.mp4"], "--video a.mp4: there is no such file"),
        (["--recipe", "video_llama.demo", "--encoder", "a"], "--encoder a: there is no such file"),
        (["--recipe", "video_llama.demo", "--max-seconds", "0"], "must be above 0"),
        (["--recipe", "video_llama.demo", "--max-seconds", "nan"], "must be above 0"),
        (["--recipe", "video_llama.demo", "--max-upload", "inf"], "at most 1e9 MB"),
        (["--recipe", "video_llama.demo", "--video", __file__, "--examples", "a"], "leave one of them out"),
    ):
        assert chat_main(open_encoder, arguments) == 2
        assert message in capsys.readouterr().err
    assert chat_main(open_encoder, ["--recipe", "video_llama.demo", "--dry-run", "seed=4"]) == 0
    assert '"seed": 4' in capsys.readouterr().out
