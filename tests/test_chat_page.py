"""launch/chat.py as people use it: a headless Chromium on the real page, and the terminal as a real process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "run"))

from talking import RECIPE, overrides, write_clip, write_talker  # noqa: E402

from vlm.recipe import load  # noqa: E402
from vlm.run.chat import Settings, Turn  # noqa: E402
from vlm.run.chat_examples import Examples  # noqa: E402
from vlm.run.chat_handlers import Page  # noqa: E402
from vlm.run.chat_open import open_model  # noqa: E402
from vlm.run.chat_page import build  # noqa: E402

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
WAIT = 60_000  # milliseconds
LAYERS = 16  # with 2, an answer is all there before a browser on a busy machine has shown a few parts of it
LENGTH = [f"model.llama.layers={LAYERS}", "inputs.max_length=2000", "eval.generation.max_new_tokens=40"]


def start(folder: Path, *options: str, stdin: Any = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """launch/chat.py on the talker in `folder`, its temporary files in `folder`/tmp."""
    (folder / "tmp").mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TMPDIR": str(folder / "tmp")}
    command = [sys.executable, str(ROOT / "launch" / "chat.py"), "--recipe", RECIPE, *options]
    return subprocess.Popen(
        [*command, *overrides(folder, *LENGTH)],
        cwd=ROOT,
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talker")
    write_talker(folder, layers=LAYERS)
    (folder / "clips").mkdir()
    write_clip(folder / "clips" / "red.mp4", (250, 30, 30))
    write_clip(folder / "clips" / "blue.mp4", (30, 30, 250), frames=9)
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> Any:
    """`said("red.mp4", ["What?"])`: what the model answers to these questions, one after the other, without a page."""
    recipe = load(RECIPE, overrides(folder, *LENGTH))
    model = open_model(recipe, RECIPE, folder / "run", device=torch.device("cpu"), say=lambda text: None)

    def answers(name: str, questions: list[str]) -> list[str]:
        seen = model.see(folder / "clips" / name)
        turns: list[Turn] = []
        for question in questions:
            answer = model.say(seen, [*turns, Turn(question)], Settings(max_new_tokens=40))
            turns.append(Turn(question, answer.text))
        return [turn.answer or "" for turn in turns]

    return answers


# The page ------------------------------------------------------------------------------------------------------------


class Server:
    """The page, and what its process prints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = start(
            folder, "--checkpoint", str(folder / "run"), "--examples", str(folder / "clips"), "--port", "0",
            "--max-upload", "1", "--max-seconds", "20",
        )  # fmt: skip
        self.lines: list[str] = []
        self.address = ""
        threading.Thread(target=self._read, daemon=True).start()
        until = time.monotonic() + 120
        while not self.address and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert self.address, "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(r"the page is at (http://\S+)", line)
            if found:
                self.address = found[1]

    def uploads(self) -> list[Path]:
        """Uploaded files that are there with some content."""
        return [
            path
            for path in (self.folder / "tmp").glob("vlm_chat_*/**/*")
            if path.is_file() and path.stat().st_size and not path.name.startswith(".")
        ]

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    pytest.importorskip("gradio")
    server = Server(folder)
    yield server
    server.end()
    assert not list((folder / "tmp").glob("vlm_chat_*")), "uploads outlive the program"
    assert not [line for line in server.lines if "Traceback" in line], "".join(server.lines)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


class Person:
    """A browser of its own on the page."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.server = server
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.requests: list[str] = []
        self.refused: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", self._console)
        self.page.goto(server.address)
        self.page.wait_for_selector("#question textarea")

    def _console(self, message: Any) -> None:
        if "Content Security Policy" in message.text:
            self.refused.append(message.text)

    def upload(self, path: Path) -> None:
        self.page.set_input_files("#upload input[type=file]", str(path))

    def choose(self, path: Path) -> None:
        """Upload a good video."""
        self.upload(path)
        self.page.wait_for_function(
            "name => document.querySelector('.vlm-about b')?.textContent == name", arg=path.name
        )  # fmt: skip

    def ask(self, question: str) -> None:
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")

    def told(self, count: int, final: bool = True) -> list[str]:
        """The model's texts, once there are `count` and the last is all there."""
        self.page.wait_for_function(
            "count => document.querySelectorAll('#chat [data-testid=bot]').length == count", arg=count
        )  # fmt: skip
        if final:
            self.page.wait_for_function("() => /cut off|Stopped/.test(document.querySelector('#status').textContent)")
        return [text.strip() for text in self.page.locator("#chat [data-testid=bot]").all_inner_texts()]

    def alert(self) -> str:
        return self.page.inner_text("#status [role=alert]").strip()

    def set(self, name: str, value: float) -> None:
        if not self.page.locator(f"#{name} input[type=number]").is_visible():
            self.page.click("#settings button")
        self.page.fill(f"#{name} input[type=number]", str(value))
        self.page.press(f"#{name} input[type=number]", "Tab")

    def leave(self) -> None:
        foreign = [url for url in self.requests if not url.startswith((self.server.address, "data:", "blob:"))]
        self.context.close()
        assert self.requests
        assert not foreign
        assert not self.refused


@pytest.fixture
def person(browser: Any, server: Server) -> Iterator[Person]:
    person = Person(browser, server)
    yield person
    person.leave()


def test_two_turns_and_regenerating(person: Person, folder: Path, said: Any) -> None:
    questions = ["What is it?", "Where does it go?"]
    person.choose(folder / "clips" / "red.mp4")
    assert person.page.locator(".vlm-frames img").count() == 8
    assert "2.0 s, 12 frames" in person.page.inner_text(".vlm-about")
    assert not person.server.uploads()
    expected = said("red.mp4", questions)
    person.ask(questions[0])
    assert person.told(1) == expected[:1]
    person.ask(questions[1])
    assert person.told(2) == expected
    assert person.page.input_value("#question textarea") == ""
    person.page.click("#regenerate")
    person.page.wait_for_selector("text=With temperature 0")
    assert person.told(2) == expected
    person.set("temperature", 1.5)
    person.page.click("#regenerate")
    person.page.wait_for_function(
        "text => { const all = document.querySelectorAll('#chat [data-testid=bot]'); "
        "return all.length == 2 && all[1].textContent.trim().length > 0 && all[1].textContent.trim() != text }",
        arg=expected[1],
    )
    assert person.told(2)[0] == expected[0]
    person.page.click("#clear")
    assert person.told(0, final=False) == []
    person.set("temperature", 0)
    person.ask(questions[0])
    assert person.told(1) == expected[:1]


WATCH = """() => {
    window.vlmTold = [];
    new MutationObserver(() => {
        const all = document.querySelectorAll('#chat [data-testid=bot]');
        const text = all.length ? all[all.length - 1].textContent.trim() : '';
        if (text && window.vlmTold[window.vlmTold.length - 1] != text) window.vlmTold.push(text);
    }).observe(document.querySelector('#chat'), {subtree: true, childList: true, characterData: true});
}"""


def test_words_as_they_come_and_stop(person: Person, folder: Path) -> None:
    person.choose(folder / "clips" / "red.mp4")
    person.set("max_tokens", 1500)
    person.page.evaluate(WATCH)
    began = time.monotonic()
    person.ask("What is it?")
    person.page.wait_for_function(
        "() => window.vlmTold.filter(text => text.length > 20).length >= 3"
    )  # fmt: skip
    person.page.click("#stop")
    (text,) = person.told(1)
    assert "Stopped" in person.page.inner_text("#status")
    assert 10 < len(text) < 1400, f"{len(text)} letters after {time.monotonic() - began:.1f} s"
    time.sleep(1)
    assert person.told(1) == [text]
    growing = [part for part in person.page.evaluate("() => window.vlmTold") if part != "…"]
    assert len(growing) >= 3, growing
    assert all(text.startswith(part) for part in growing)
    person.set("max_tokens", 5)
    person.ask("And then?")
    person.page.wait_for_selector("text=max tokens is 5")
    assert len(person.told(2)[1]) <= 5


def test_files_that_cannot_be_used(person: Person, folder: Path, tmp_path: Path, said: Any) -> None:
    person.ask("What is it?")
    person.page.wait_for_selector("#status [role=alert]")
    assert person.alert() == "Please choose a video first."
    assert person.page.input_value("#question textarea") == "What is it?"
    red = (folder / "clips" / "red.mp4").read_bytes()
    long = write_clip(tmp_path / "long.mp4", (9, 9, 9), frames=44, fps=2)
    files = {
        "words.mp4": (b"to be or not to be\n" * 20, "The file words.mp4 cannot be used: not a video: looks like text."),
        "empty.mp4": (b"", "empty file (0 bytes)"),
        "cut.mp4": (red[:900], "cut short"),
        "long.mp4": (long.read_bytes(), "too long"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        person.upload(tmp_path / name)
        person.page.wait_for_function(
            "text => document.querySelector('#status')?.textContent.includes(text)", arg=message
        )  # fmt: skip
        assert person.page.locator(".vlm-frames img").count() == 0
    (tmp_path / "large.mp4").write_bytes(bytes(3 << 20))
    person.upload(tmp_path / "large.mp4")
    person.page.wait_for_selector("text=exceed the maximum allowed size of 1.0 Mb")
    assert not person.server.uploads()
    person.choose(folder / "clips" / "blue.mp4")  # it goes on
    person.upload(tmp_path / "words.mp4")  # and what was chosen stays
    person.page.wait_for_selector("#status [role=alert]")
    assert person.page.locator(".vlm-frames img").count() == 8
    person.ask("word " * 500)
    person.page.wait_for_selector("text=the model reads 2,000 at most")
    person.ask("What is it?")
    assert person.told(1) == said("blue.mp4", ["What is it?"])


def test_two_people_at_once_do_not_mix(browser: Any, server: Server, folder: Path, said: Any) -> None:
    people = {name: Person(browser, server) for name in ("red.mp4", "blue.mp4")}
    questions = ["What is it?", "And then?", "Why?"]
    for name, person in people.items():
        person.choose(folder / "clips" / name)
    for count, question in enumerate(questions, 1):
        for person in people.values():
            person.ask(question)
        for person in people.values():
            person.told(count)
            time.sleep(0.2)
    expected = {name: said(name, questions) for name in people}
    assert expected["red.mp4"] != expected["blue.mp4"]
    for name, person in people.items():
        assert person.told(3) == expected[name]
        person.leave()


def test_who_waits_may_stop_waiting(browser: Any, server: Server, folder: Path) -> None:
    first, second = Person(browser, server), Person(browser, server)
    for person in (first, second):
        person.choose(folder / "clips" / "red.mp4")
    first.set("max_tokens", 1800)
    first.ask("What is it?")
    first.page.wait_for_selector("#chat [data-testid=bot]")
    second.ask("Who is it?")
    second.page.click("#stop")
    second.page.wait_for_selector("text=Stopped.")
    first.page.click("#stop")
    assert len(first.told(1)[0]) > 0
    time.sleep(1)
    assert second.told(0) == []
    second.ask("Who is it?")
    second.told(1)
    first.leave()
    second.leave()


def test_an_example(person: Person, said: Any) -> None:
    person.page.click("#example input")
    person.page.get_by_role("option", name="blue.mp4").click()
    person.page.wait_for_selector(".vlm-frames img")
    person.ask("What is it?")
    assert person.told(1) == said("blue.mp4", ["What is it?"])


def test_nothing_is_asked_of_other_hosts(person: Person, folder: Path) -> None:
    person.choose(folder / "clips" / "red.mp4")
    foreign = "http://foreign.invalid"
    text = f'![x]({foreign}/a.png) <img src="{foreign}/b.png"> & <b>$x$</b> &lt; {foreign}'
    person.ask(text)
    person.told(1)
    shown = person.page.inner_text("#chat [data-testid=user]")
    assert shown.strip() == text
    assert person.page.locator("#chat [data-testid=user] img").count() == 0
    assert person.page.locator("link[href*='//fonts.']").count() == 0


def test_files_of_the_machine_are_not_served(server: Server, folder: Path) -> None:
    answer = requests.get(server.address, timeout=120)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert (
        "unsafe-inline" not in answer.headers["content-security-policy"].partition("default-src")[2].partition(";")[0]
    )
    secret = folder / "secret.txt"
    secret.write_text("secret words")
    for path in (secret, ROOT / "README.md", folder / "clips" / "red.mp4", Path("/etc/passwd")):
        for address in (f"gradio_api/file={path}", f"gradio_api/file=/{path}", f"file={path}",
                        f"gradio_api/file={folder}/tmp/../{path.name}", f"static/..%2f..%2f..%2f..{path}",
                        f"assets/..%2f..%2f..%2f..{path}"):  # fmt: skip
            refused = requests.get(f"{server.address}{address}", timeout=120)
            assert refused.status_code in (403, 404), address
            assert "secret words" not in refused.text


def test_only_this_machine_reaches_it(server: Server) -> None:
    assert server.address.startswith("http://127.0.0.1:")
    port = int(server.address.rstrip("/").rpartition(":")[2])
    listening = Path("/proc/net/tcp").read_text().splitlines()
    places = [
        line.split()[1] for line in listening if line.split()[3] == "0A" and line.split()[1].endswith(f"{port:04X}")
    ]
    assert places == [f"0100007F:{port:04X}"]
    assert not any("gradio.live" in line for line in server.lines)


def test_who_leaves_takes_all_along(
    browser: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    recipe = load(RECIPE, overrides(folder, *LENGTH))
    model = open_model(recipe, RECIPE, folder / "run", device=torch.device("cpu"), say=lambda text: None)
    page = Page(model=model, title="t", examples=Examples(), settings=Settings(max_new_tokens=9), uploads=tmp_path)
    blocks, handlers = build(page)
    _, address, _ = blocks.queue().launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        person = Person(browser, SimpleNamespace(address=address))  # type: ignore[arg-type]
        person.choose(folder / "clips" / "red.mp4")
        person.ask("What is it?")
        person.told(1)
        assert (len(handlers.sessions), len(model.videos)) == (1, 1)
        person.context.close()
        until = time.monotonic() + 60
        while len(handlers.sessions) and time.monotonic() < until:
            time.sleep(0.1)
        assert (len(handlers.sessions), len(model.videos)) == (0, 0)
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    finally:
        blocks.close(verbose=False)


# The terminal --------------------------------------------------------------------------------------------------------


def test_in_the_terminal(folder: Path, said: Any) -> None:
    process = start(
        folder, "--checkpoint", str(folder / "run"), "--video", str(folder / "clips" / "red.mp4"), stdin=subprocess.PIPE
    )
    lines = ["What is it?", "Where does it go?", "/temperature 1.5", "/regenerate", "/temperature warm", "/cheer",
             "/video README.md", "/clear", "/temperature 0", "/max_tokens 7", "What is it?", "/quit",
             "never"]  # fmt: skip
    assert process.stdin is not None
    process.stdin.buffer.write(b"/cl\xffear\n")  # no text of any encoding
    process.stdin.buffer.flush()
    printed, _ = process.communicate("\n".join(lines), timeout=120)
    assert process.returncode == 0, printed
    assert "error: there is no command '/cl\N{REPLACEMENT CHARACTER}ear'" in printed
    first, second = said("red.mp4", lines[:2])
    assert "red.mp4: 2.0 s, 12 frames, 64 x 48\n" in printed
    assert f"\n{first}\n[The answer was cut off: max tokens is 40.]\n{second}\n" in printed
    assert "[temperature is 1.5]" in printed
    assert "error: /temperature warm: a number is expected" in printed
    assert "error: there is no command '/cheer'" in printed
    assert "error: the file README.md cannot be used: not a video: looks like text" in printed
    assert f"[max_tokens is 7]\n{first[:7].strip()}" in printed
    assert "never" not in printed


def test_ctrl_c_stops_the_answer_not_the_program(folder: Path) -> None:
    process = start(
        folder, "--checkpoint", str(folder / "run"), "--video", str(folder / "clips" / "red.mp4"), stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("/max_tokens 1800\nWhat is it?\n")
    process.stdin.flush()
    read = ""
    while "[max_tokens is 1800]\n" not in read or len(read.partition("1800]\n")[2]) < 20:
        letter = process.stdout.read(1)
        assert letter, read
        read += letter
    process.send_signal(signal.SIGINT)
    process.stdin.write("/max_tokens 6\nAnd then?\n")
    process.stdin.flush()
    rest, _ = process.communicate("/quit\n", timeout=120)
    assert process.returncode == 0, rest
    before, _, after = rest.partition("\n[stopped]\n")
    assert len(before) < 1700
    assert "[max_tokens is 6]" in after
    assert "max tokens is 6." in after


def test_command_lines_that_cannot_be(folder: Path) -> None:
    for options, message in (
        (["--video", str(folder / "none.mp4")], "there is no such file"),
        (["--checkpoint", str(folder / "none")], "there is no such file or folder"),
        (["--max-upload", "0"], "must be above 0"),
        (["--port", "70000"], "ports are from 0"),
        (["--encoder", str(folder)], "reads pixels"),
        (["--examples", str(folder / "llama"), "--checkpoint", str(folder / "run")], "no video is in it"),
    ):
        process = start(folder, *options)
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 2, printed
        assert message in printed
        assert "Traceback" not in printed


def test_without_gradio_it_is_said_what_to_install(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gradio").mkdir()
    (tmp_path / "gradio" / "__init__.py").write_text("raise ImportError('No module named gradio')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "chat.py"), "--recipe", RECIPE, *overrides(folder)],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "DS_ACCELERATOR": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install 'vlm[chat]'" in done.stderr
    assert "Traceback" not in done.stderr
