"""Talking with a model: words as they come, stopped, anew; videos seen once; and nobody in another's conversation."""

from __future__ import annotations

import io
import os
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from talking import RECIPE, overrides, write_clip, write_talker

from vlm.data.features import tensor_bytes
from vlm.data.glance import Limits
from vlm.data.rng import SampleRng
from vlm.models.generation import GenerationConfig, generate
from vlm.recipe import Recipe, load
from vlm.run.chat import ChatModel, Settings, Turn
from vlm.run.chat_open import open_model
from vlm.run.chat_terminal import Terminal
from vlm.run.chat_videos import Library, Seen
from vlm.run.conversation import Conversation
from vlm.types import Record, UserError

SHORT = Settings(max_new_tokens=24)
CPU = torch.device("cpu")


def opened(folder: Path, *more: str, source: Path | None = None, **settings: object) -> ChatModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
        recipe = load(RECIPE, overrides(folder, *more))
        return open_model(recipe, RECIPE, source, device=CPU, say=lambda text: None, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talker")
    write_talker(folder)
    write_clip(folder / "red.mp4", (250, 30, 30))
    write_clip(folder / "blue.mp4", (30, 30, 250), frames=9)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ChatModel:
    return opened(folder, source=folder / "run")


@pytest.fixture(scope="module")
def red(model: ChatModel, folder: Path) -> Seen:
    return model.see(folder / "red.mp4", "tests")


@pytest.fixture(scope="module")
def blue(model: ChatModel, folder: Path) -> Seen:
    return model.see(folder / "blue.mp4", "tests")


# Words ---------------------------------------------------------------------------------------------------------------


def expected(model: ChatModel, folder: Path, name: str, turns: list[Turn], config: GenerationConfig, key: str) -> str:
    """What evaluation would write: the record's pixels through the system, without a chat."""
    record = Record(key=key, shard="", row=0, video=(folder / name).read_bytes(), annotation={}, num_frames=-1,
                    fps=6.0, decoders=())  # fmt: skip
    said = [{"from": who, "value": text or "?"} for turn in turns for who, text in zip(("human", "gpt"), turn)]
    said[0]["value"] = f"<video>\n{said[0]['value']}"
    record.annotation["conversations"] = said
    (example,) = model.inputs.all_views(record, SampleRng(0), ())[""]
    example = replace(example, prompts=example.prompts[-1:])
    ids = generate(
        model.system, model.inputs.test_batch([example]), config, ends=model.inputs.ends,
        keys=[f"{key}/{len(turns)}"],
    )  # fmt: skip
    return model.inputs.decode(ids[0])


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("name", ["red.mp4", "blue.mp4"])
def test_what_streams_is_what_generation_gives(model: ChatModel, folder: Path, name: str, temperature: float) -> None:
    seen = model.see(folder / name, "tests")
    turns = [Turn("Which way does it go?", "to the right"), Turn("And then?")]
    shown: list[str] = []
    settings = Settings(temperature=temperature, top_p=0.9, max_new_tokens=24)
    answer = model.say(seen, turns, settings, shown.append)
    drawn = {"sample": True, "temperature": temperature, "top_p": 0.9} if temperature else {}
    config = GenerationConfig(max_new_tokens=24, **drawn)
    assert answer.text == expected(model, folder, name, turns, config, seen.example.key)
    assert len(shown) > 10
    assert shown[-1].strip() == answer.text
    assert all(answer.text.startswith(text) for text in shown)
    assert sorted(shown, key=len) == shown


def test_the_video_and_every_turn_count(model: ChatModel, red: Seen, blue: Seen) -> None:
    asked = [Turn("What is it?")]
    answers = {
        model.say(red, asked, SHORT).text,
        model.say(blue, asked, SHORT).text,
        model.say(red, [Turn("Who is it?")], SHORT).text,
        model.say(red, [Turn("Hello", "there"), *asked], SHORT).text,
        model.say(red, [Turn("Hello", "you"), *asked], SHORT).text,
    }
    assert len(answers) == 5


def test_gibberish_is_not_taken_back(folder: Path) -> None:
    """Letters of several bytes are shown when they are whole."""
    model = opened(folder, "model.llama.path=none")
    seen = model.see(folder / "red.mp4")
    shown: list[str] = []
    answer = model.say(seen, [Turn("?")], Settings(temperature=1.0, max_new_tokens=60), shown.append)
    assert any(ord(letter) > 127 for letter in answer.text)
    assert all(f"{answer.text} ".startswith(text) for text in shown)


def test_an_end_is_never_shown(model: ChatModel) -> None:
    """`###` ends an answer: its first signs are held back until it is clear what they are."""
    three = next(end for end in model.inputs.ends if len(end) == 3)
    assert list(model._settled([9, 9, *three[:2]])) == [9, 9]
    assert list(model._settled([9, 9, *three])) == [9, 9]
    assert list(model._settled([9, three[0], 9])) == [9, three[0], 9]
    assert list(model._settled([9, 2])) == [9]
    assert list(model._settled([])) == []


def test_stopped_where_it_is(model: ChatModel, red: Seen) -> None:
    whole = model.say(red, [Turn("What is it?")], Settings(max_new_tokens=60))
    stop = threading.Event()
    answer = model.say(
        red,
        [Turn("What is it?")],
        Settings(max_new_tokens=60),
        lambda text: stop.set() if len(text) > 9 else None,
        stop,
    )
    assert answer.stopped
    assert 9 < len(answer.text) < 14
    assert whole.text.startswith(answer.text)
    assert answer.notes == ()
    assert model.say(red, [Turn("What is it?")], SHORT, stop=stop) == ("", True, 0, ())


def test_cut_off_is_told(model: ChatModel, red: Seen) -> None:
    assert model.say(red, [Turn("?")], SHORT).notes == ("The answer was cut off: max tokens is 24.",)


def test_questions_that_cannot_be(model: ChatModel, red: Seen) -> None:
    for question, said in (
        ("", "empty"),
        (" \n", "empty"),
        ("<video>", "empty"),
        ("x" * 30_000, "30,000 characters"),
        ("word " * 90, "tokens, and the model reads 400 at most"),
    ):
        with pytest.raises(UserError, match=said):
            model.say(red, [Turn(question)], SHORT)
    for wrong in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match="must be"):
            Settings(**wrong)  # type: ignore[arg-type]


def test_oldest_turns_are_left_out_and_that_is_told(model: ChatModel, red: Seen) -> None:
    turns = [Turn(f"Question {number} " + "and so on " * 6, "an answer " * 4) for number in range(4)]
    answer = model.say(red, [*turns, Turn("So?")], SHORT)
    assert 0 < answer.forgotten < 4
    assert f"the oldest {answer.forgotten} questions and answers of 4 were left out" in answer.notes[0]
    again = model.say(red, [*turns[answer.forgotten :], Turn("So?")], SHORT)
    assert again.text == answer.text
    assert again.forgotten == 0


def test_a_long_question_leaves_less_room_and_that_is_told(model: ChatModel, red: Seen) -> None:
    answer = model.say(red, [Turn("word " * 38)], Settings(max_new_tokens=200))
    assert "tokens had room beside the conversation" in answer.notes[0]


# Conversations -------------------------------------------------------------------------------------------------------


def test_a_conversation(model: ChatModel, red: Seen, blue: Seen) -> None:
    talk = Conversation(model, "a")
    with pytest.raises(UserError, match="choose a video"):
        talk.ask("What?", SHORT)
    talk.look(red)
    with pytest.raises(UserError, match="Nothing was asked"):
        talk.again(SHORT)
    first = talk.ask("  What is it? ", SHORT)
    second = talk.ask("And then?", SHORT)
    assert talk.turns == [Turn("What is it?", first.text), Turn("And then?", second.text)]
    assert talk.again(SHORT) == second
    drawn = {talk.again(replace(SHORT, temperature=1.0)).text for _ in range(3)}
    assert len(drawn) == 3
    assert len(talk.turns) == 2
    assert talk.turns[1].answer in drawn
    with pytest.raises(UserError, match="empty"):
        talk.ask("", SHORT)
    assert len(talk.turns) == 2
    talk.clear()
    assert talk.turns == []
    assert talk.ask("What is it?", SHORT) == first
    talk.look(blue)
    assert talk.turns == []
    assert talk.ask("What is it?", SHORT) != first


def test_another_video_chosen_at_the_same_moment(model: ChatModel, red: Seen, blue: Seen) -> None:
    """Between the question and its answer another video is chosen: nothing said of the one is read with the other."""
    talk, other = Conversation(model, "a"), Conversation(model, "b")
    talk.look(red)
    talk.ask("What is it?", SHORT)
    other.look(blue)

    class Late:
        """A lock that is had after the other video was."""

        def acquire(self, blocking: bool) -> bool:
            talk.key = blue.key
            talk.turns.clear()
            return True

        def release(self) -> None:
            pass

    talk._busy = Late()  # type: ignore[assignment]
    assert talk.ask("And then?", SHORT) == other.ask("And then?", SHORT)
    assert talk.turns == other.turns


def test_stopped_as_soon_as_it_began(model: ChatModel, red: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(model, "a")
    talk.look(red)
    find = model.videos.find

    def late(key: str) -> Seen:
        talk.stop()  # from another thread, before the first word is thought of
        return find(key)

    monkeypatch.setattr(model.videos, "find", late)
    assert talk.ask("What is it?", SHORT) == ("", True, 0, ())
    monkeypatch.setattr(model.videos, "find", find)
    assert talk.ask("What is it?", SHORT).text, "a stop is of one answer"


def test_stopped_before_a_word_keeps_no_turn(model: ChatModel, red: Seen) -> None:
    talk = Conversation(model, "a")
    talk.look(red)
    with model._lock:
        box: list[object] = []
        thread = threading.Thread(target=lambda: box.append(talk.ask("What is it?", SHORT)))
        thread.start()
        while not talk._busy.locked():
            pass
        with pytest.raises(UserError, match="still being written"):
            talk.ask("Now?", SHORT)
        talk.stop()
        thread.join(20)
    assert box == [("", True, 0, ())]
    assert talk.turns == []


def test_two_at_once_are_as_each_alone(model: ChatModel, red: Seen, blue: Seen) -> None:
    questions = ("What is it?", "Where does it go?", "And then?")
    settings = Settings(temperature=0.8, max_new_tokens=20)

    def alone(seen: Seen, name: str) -> list[Turn]:
        talk = Conversation(model, name)
        talk.look(seen)
        for question in questions:
            talk.ask(question, settings)
        return talk.turns

    apart = [alone(red, "a"), alone(blue, "b")]
    assert apart[0] != apart[1]
    together: dict[int, list[Turn]] = {}
    threads = [
        threading.Thread(target=lambda at=at, seen=seen: together.update({at: alone(seen, str(at))}))
        for at, seen in enumerate((red, blue, red, blue))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[at] for at in range(4)] == apart * 2


# Videos --------------------------------------------------------------------------------------------------------------


def test_a_video_is_worked_out_once(folder: Path) -> None:
    model = opened(folder, source=folder / "run")
    passes = []
    model.system.tower.register_forward_hook(lambda *_: passes.append(1))
    (folder / "copy.mp4").write_bytes((folder / "red.mp4").read_bytes())
    first = model.see(folder / "red.mp4", "a")
    assert model.see(folder / "copy.mp4", "b") is first
    talk = Conversation(model, "a")
    talk.look(first)
    for question in ("What?", "Why?"):
        talk.ask(question, SHORT)
    assert (model.videos.made, len(passes)) == (1, 1)
    assert first.example.frames is None
    assert len(first.pictures) == 8
    assert first.pictures[0].jpeg.startswith(b"\xff\xd8")
    assert first.about == "2.0 s, 12 frames, 64 x 48"
    model.videos.release("b")
    assert len(model.videos) == 1
    talk.end()
    assert len(model.videos) == 0
    model.see(folder / "red.mp4", "a")
    assert (model.videos.made, len(passes)) == (2, 2)


def test_at_once_the_same_video_is_worked_out_once(folder: Path) -> None:
    model = opened(folder, source=folder / "run")
    threads = [threading.Thread(target=model.see, args=(folder / "red.mp4", str(n))) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.videos.made == 1


def test_memory_is_bounded(folder: Path, red: Seen, blue: Seen) -> None:
    library = Library(memory=red.nbytes + blue.nbytes // 2)
    library.get("red", lambda: red, "a")
    library.get("blue", lambda: blue, "b")
    assert library.find("blue") is blue
    with pytest.raises(UserError, match="choose it again"):
        library.find("red")
    assert library.get("red", lambda: red, "a") is red
    assert library.made == 3
    big = Library(memory=1)  # one is always kept, or nobody could talk
    assert big.get("red", lambda: red, "a") is red
    assert big.find("red") is red


def test_what_is_no_video(model: ChatModel, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.mp4").write_text("to be or not to be\n" * 9)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "cut.mp4").write_bytes((folder / "red.mp4").read_bytes()[:900])
    made = model.videos.made
    for name, said in (
        ("notes.mp4", r"notes\.mp4 cannot be used: not a video: looks like text"),
        ("empty.mp4", "empty file"),
        ("cut.mp4", "cut short"),
        ("none.mp4", "No such file"),
    ):
        with pytest.raises(UserError, match=said):
            model.see(tmp_path / name)
    small = opened(folder, source=folder / "run", limits=Limits(seconds=0.5))
    with pytest.raises(UserError, match="too long"):
        small.see(folder / "red.mp4")
    assert model.videos.made == made


def test_features_of_a_record_need_no_encoder(folder: Path, model: ChatModel, red: Seen) -> None:
    reader = opened(folder, "inputs.source=features", source=folder / "run")
    tokens = red.example.frame_tokens
    assert tokens is not None
    record = Record(key="r", shard="s", row=4, video=None, annotation={}, num_frames=12, fps=6.0, decoders=(),
                    members={"q_former.safetensors": tensor_bytes("q_former", tokens)})  # fmt: skip
    seen = reader.see_record(record, "a")
    assert seen.pictures == ()
    assert reader.say(seen, [Turn("What?")], SHORT).text == model.say(red, [Turn("What?")], SHORT).text
    with pytest.raises(UserError, match="no encoder was given"):
        reader.see(folder / "red.mp4")
    with_video = replace(record, row=5, video=(folder / "red.mp4").read_bytes())
    assert len(reader.see_record(with_video, "a").pictures) == 8
    with pytest.raises(UserError, match="no encoder was given"):
        reader.see_record(replace(with_video, members={}), "a")
    with pytest.raises(UserError, match="has no q_former"):
        reader.see_record(replace(record, members={}), "a")
    with pytest.raises(UserError, match="reads pixels"):
        ChatModel(model.recipe, model.system, CPU, encode=lambda path: record)


# Opening -------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_opened(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        opened(folder, source=tmp_path / "none")
    (tmp_path / "old.pth").touch()
    with pytest.raises(UserError, match=r"convert|holds no|cannot"):
        opened(folder, source=tmp_path / "old.pth")
    for name in ("vit_llama.debug", "video_llama.debug_gebc", "vamos.nextqa_cap"):
        with pytest.raises(UserError, match="no talking with this recipe"):
            open_model(load(name), name, None, device=CPU)


# Other systems -------------------------------------------------------------------------------------------------------


def test_vamos_answers_each_question_alone() -> None:
    recipe = load("vamos.debug", ["eval.shards=nowhere", "data.shards=nowhere"])
    model = ready(recipe, "vamos.debug")
    seen = model.see_record(feature_record("features.npy", np_bytes(torch.randn(9, 8, generator=seed(1)))), "a")
    talk = Conversation(model, "a")
    talk.look(seen)
    first = talk.ask("What is it?\n(A) a dog\n(B) a cat", SHORT)
    second = talk.ask("And where?", SHORT)
    assert not model.remembers
    assert (first.forgotten, second.forgotten) == (0, 0)
    assert len(talk.turns) == 2
    talk.clear()
    assert talk.ask("And where?", SHORT).text == second.text
    other = model.see_record(feature_record("features.npy", np_bytes(torch.randn(9, 8, generator=seed(2))), row=1), "a")
    assert other.key != seen.key


def test_video_chatgpt_talks() -> None:
    recipe = load("video_chatgpt.debug", ["eval.shards=nowhere", "data.shards=nowhere"])
    model = ready(recipe, "video_chatgpt.debug")
    tokens = torch.randn(8, 2, 16, generator=seed(1)).half()
    seen = model.see_record(feature_record("clip_states.safetensors", tensor_bytes("clip_states", tokens)), "a")
    talk = Conversation(model, "a")
    talk.look(seen)
    shown: list[str] = []
    first = talk.ask("What happens?", SHORT, shown.append)
    talk.ask("And then?", SHORT)
    (example,) = [model.inputs.converse([("What happens?", None)], seen.example)]
    ids = generate(
        model.system, model.inputs.test_batch([example]), GenerationConfig(max_new_tokens=24), ends=model.inputs.ends
    )
    assert first.text == model.inputs.decode(ids[0])
    assert model.say(seen, [Turn("And then?")], SHORT).text != talk.turns[1].answer
    assert shown


def ready(recipe: Recipe, name: str) -> ChatModel:
    """With trained tensors large enough to matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")
        model = open_model(recipe, name, None, device=CPU, say=lambda text: None)
    with torch.no_grad():
        for parameter in model.system.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.5, generator=seed(parameter.numel()))
    return model


def feature_record(member: str, content: bytes, row: int = 0) -> Record:
    return Record(key=f"r{row}", shard="s", row=row, video=None, annotation={"features": {"fps": 1.0}}, num_frames=9,
                  fps=1.0, decoders=(), members={member: content})  # fmt: skip


def np_bytes(values: torch.Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, values.numpy())
    return file.getvalue()


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# The terminal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/max_tokens " + "9" * 400, "error: max tokens a number beyond that: it must be at least 1, and at most"),
        ("/max_tokens 0", "error: max tokens 0: it must be at least 1"),
        ("/temperature nan", "error: temperature nan: it must be from 0"),
        ("/video ~nobody_of_this_name/a.mp4", "there is no such user"),
        ("/video a\0b", "cannot be read: embedded null byte"),
        ("/video /dev/zero", "it is no file but a pipe or a device"),
        ("/video .", "cannot be read: Is a directory"),
    ],
)
def test_lines_that_cannot_be(model: ChatModel, folder: Path, line: str, message: str) -> None:
    shown = io.StringIO()
    Terminal(model, SHORT, io.StringIO(f"{line}\nWhat is it?\n"), shown).run(folder / "red.mp4")
    assert message in shown.getvalue()
    assert "cut off: max tokens is 24" in shown.getvalue(), "and goes on"
    assert "\0" not in shown.getvalue()


def test_a_file_whose_name_steers_the_terminal(model: ChatModel, folder: Path, tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[31m.mp4"))
    file.write_bytes((folder / "red.mp4").read_bytes())
    shown = io.TextIOWrapper(io.BytesIO(), "utf-8")
    Terminal(model, SHORT, io.StringIO(""), shown).run(file)
    assert b"[31m.mp4: 2.0 s" in shown.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"\x1b" not in shown.buffer.getvalue()  # type: ignore[attr-defined]
