"""vlm/run/judge.py and judging.py against a server of our own: patience, secrets, and what is kept."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlm.metrics.judged import ASPECTS, Item, digest_of
from vlm.run import judge as asking
from vlm.run.judge import OpenAICompatible, Pace, Recorded, Refused, Unanswered
from vlm.run.judging import Work, entries_of, judge, verdicts_of
from vlm.types import UserError

KEY = "sk-very-secret-0123456789"
Answer = tuple[int, dict[str, str], bytes] | None  # status, headers, body; None: the connection is dropped


def said(text: str | None, model: str = "judge-1-0125") -> Answer:
    return 200, {}, json.dumps({"model": model, "choices": [{"message": {"content": text}}]}).encode()


class Server:
    """Answers each request by a function of (how many came before, the request's JSON)."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Answer]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    found = answer(number, body)
                if found is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                status, headers, content = found
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(answer: Callable[[int, dict[str, Any]], Answer] | list[Answer]) -> Server:
        listed = answer
        function = (lambda number, _: listed[min(number, len(listed) - 1)]) if isinstance(listed, list) else listed
        servers.append(Server(function))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "BACKOFF", 0.002)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)


# The judge ------------------------------------------------------------------------------------------


def test_the_request(serve: Callable[..., Server]) -> None:
    server = serve([said('{"score": 4}')])
    judge_ = OpenAICompatible(f"{server.url}/", "some-model", key_variable="JUDGE_KEY", max_tokens=50)
    reply = judge_.ask("be a judge", "what is it worth?")
    assert reply == '{"score": 4}'
    assert reply.model == "judge-1-0125"
    assert reply.date
    assert server.paths == ["/v1/chat/completions"]
    assert server.requests == [
        {
            "model": "some-model",
            "messages": [
                {"role": "system", "content": "be a judge"},
                {"role": "user", "content": "what is it worth?"},
            ],
            "temperature": 0.0,
            "max_tokens": 50,
            "response_format": {"type": "json_object"},
        }
    ]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert judge_.name.endpoint == server.url.removeprefix("http://")
    assert KEY not in repr(judge_.name)


def test_without_key_none_is_sent(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one of the environment nor what a .netrc has for the host."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hidden\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve([said("{}")])
    OpenAICompatible(server.url, "m", temperature=None, json_mode=False).ask("s", "u")
    assert "Authorization" not in server.headers[0]
    assert server.requests[0].keys() == {"model", "messages"}


@pytest.mark.parametrize(
    "trouble",
    [
        (500, {}, b"oops"),
        (503, {"Retry-After": "0"}, b""),
        (429, {}, b"slow down"),
        None,
        (200, {}, b"<html>garbage</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[1]"),
        (200, {"Content-Length": "1000"}, b'{"choices"'),
        (200, {}, b"x" * (2**20 + 1)),
    ],
    ids=["500", "503", "429", "dropped", "html", "no choices", "a list", "cut short", "too large"],
)
def test_troubles_that_pass(serve: Callable[..., Server], trouble: Answer) -> None:
    server = serve([trouble, trouble, said('{"score": 1}')])
    judge_ = OpenAICompatible(
        server.url, "m", retries=2, timeout=1 if trouble and "Content-Length" in trouble[1] else 30
    )
    assert judge_.ask("s", "u") == '{"score": 1}'
    assert len(server.requests) == 3


def test_troubles_that_stay(serve: Callable[..., Server]) -> None:
    server = serve([(500, {}, b"oops")])
    with pytest.raises(Unanswered, match="status 500: oops, 3 times"):
        OpenAICompatible(server.url, "m", retries=2).ask("s", "u")
    assert len(server.requests) == 3
    server.close()
    with pytest.raises(Unanswered, match="no answer"):
        OpenAICompatible(server.url, "m", retries=1).ask("s", "u")


def test_a_slow_server_is_not_waited_for(serve: Callable[..., Server]) -> None:
    gate = threading.Event()
    server = serve(lambda number, _: gate.wait(5) and None)
    with pytest.raises(Unanswered, match="no answer"):
        OpenAICompatible(server.url, "m", retries=0, timeout=0.1).ask("s", "u")
    gate.set()


def test_waits_that_a_server_asks_for_are_no_failures(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[float] = []
    monkeypatch.setattr(Pace, "hold", lambda self, seconds: held.append(seconds))
    server = serve([*[(429, {"Retry-After": "1.5"}, b"")] * 5, said("{}")])
    assert OpenAICompatible(server.url, "m", retries=0).ask("s", "u") == "{}"
    assert held == [1.5] * 5
    server = serve([(429, {"Retry-After": "7200"}, b"")])
    with pytest.raises(UserError, match="wants us to wait 7200 s"):
        OpenAICompatible(server.url, "m").ask("s", "u")
    assert asking._retry_after("Wed, 21 Oct 2015 07:28:00 GMT", lambda: 1445412470.0) == pytest.approx(10)
    assert asking._retry_after("soon") == 0


def test_pace() -> None:
    """One wait holds all threads, and requests keep their distance."""
    pace = Pace(per_minute=6000)
    times = []
    start = asking.time.monotonic()
    pace.hold(0.05)

    def send() -> None:
        pace.wait()
        times.append(asking.time.monotonic())

    threads = [threading.Thread(target=send) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    # A thread may go on late when its turn has come, and then the gap to the next is short.
    assert all(at - start >= 0.05 + 0.0099 * turn for turn, at in enumerate(times))
    pace.hold(100)
    pace.stopped.set()
    with pytest.raises(Unanswered, match="the run was ended"):
        pace.wait()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((401, {}, b"no"), "--key-env"),
        ((403, {}, b"no"), "--key-env"),
        ((404, {}, b"no such model"), "no such model.*--model right"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b""), "status 302"),
        ((429, {}, b'{"error": {"code": "insufficient_quota"}}'), "no quota left"),
        ((402, {}, b""), "no quota left"),
    ],
)
def test_what_no_retry_mends(serve: Callable[..., Server], answer: Answer, says: str) -> None:
    server = serve([answer])
    with pytest.raises(UserError, match=says):
        OpenAICompatible(server.url, "m").ask("s", "u")
    assert len(server.requests) == 1
    with pytest.raises(Refused, match="status 400: too long"):
        OpenAICompatible(serve([(400, {}, b"too long")]).url, "m").ask("s", "u")


def test_a_key_is_never_said(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    def echo(number: int, _: Any) -> Answer:
        return 401, {}, f"wrong key {KEY}".encode()

    with pytest.raises(UserError) as caught:
        OpenAICompatible(serve(echo).url, "m", key_variable="JUDGE_KEY").ask("s", "u")
    assert KEY not in str(caught.value)
    assert "***" in str(caught.value)
    reply = OpenAICompatible(serve([said(f"I know {KEY}", f"m-{KEY}")]).url, "m", key_variable="JUDGE_KEY").ask(
        "s", "u"
    )
    assert KEY not in reply + reply.model
    with pytest.raises(UserError) as caught:  # half of it would stand where messages are cut
        OpenAICompatible(serve([(401, {}, b" " * 1990 + KEY.encode())]).url, "m", key_variable="JUDGE_KEY").ask(
            "s", "u"
        )
    assert KEY[:5] not in str(caught.value)
    with pytest.raises(UserError) as caught:
        OpenAICompatible("http://localhost/v1", "m", key_variable=KEY)  # the key itself, by mistake
    assert KEY not in str(caught.value)
    with pytest.raises(UserError, match="NOT_SET: this environment variable is not set"):
        OpenAICompatible("http://localhost/v1", "m", key_variable="NOT_SET")
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(UserError, match="holds what no key can") as caught:
        OpenAICompatible("http://localhost/v1", "m", key_variable="JUDGE_KEY")
    assert "two" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "is_open"),
    [("http://host/v1", True), ("https://host/v1", False), ("http://localhost:8/v1", False), ("http://[::1]/v1", False),
     ("http://127.0.0.1", False), ("http://localhost.evil/v1", True)],
)  # fmt: skip
def test_keys_over_the_network(endpoint: str, is_open: bool) -> None:
    assert OpenAICompatible(endpoint, "m", key_variable="JUDGE_KEY").is_open == is_open
    assert not OpenAICompatible(endpoint, "m").is_open


@pytest.mark.parametrize("endpoint", ["https://me:pw@host/v1", "https://host/v1?key=pw", "https://host/v1#pw"])
def test_endpoints_with_secrets(endpoint: str) -> None:
    with pytest.raises(UserError, match="would end up in files") as caught:
        OpenAICompatible(endpoint, "m")
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["host/v1", "ftp://host", "http://", "http://[::1", "http://host:x/"])
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(UserError, match="--endpoint"):
        OpenAICompatible(endpoint, "m")
    assert OpenAICompatible("https://[::1]:8/v1/chat/completions", "m").name.endpoint == "[::1]:8/v1"


# What is kept ---------------------------------------------------------------------------------------


def work(file: Path, count: int, aspect: str = "detail") -> Work:
    if not file.exists():
        file.write_text("predictions")
    items = tuple(Item(f"v_{n}", (f"Question {n}?",), f"answer {n}", (f"prediction {n}",), "v") for n in range(count))
    return Work(aspect=ASPECTS[aspect], items=items, file=file)


def number_of(request: dict[str, Any]) -> int:
    return int(request["messages"][1]["content"].split("Question: Question ")[1].split("?")[0])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]


def run(folder: Path, works: list[Work], judge_: Any, **settings: Any) -> Any:
    return judge(works, judge_, folder, lambda text: None, **settings)


def test_judging_is_kept_and_goes_on(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda _, request: said(json.dumps({"score": number_of(request) % 6})))

    def judge_() -> OpenAICompatible:
        return OpenAICompatible(server.url, "m", key_variable="JUDGE_KEY")

    own = work(tmp_path / "p.json", 12)
    (entry,) = run(tmp_path / "out", [own], judge_(), limit=5).entries
    assert len(server.requests) == 5
    assert (entry["items"], entry["judged"], entry["not_asked"]) == (12, 5, 7)
    before = (tmp_path / "out" / "judged.jsonl").read_text()
    (entry,) = run(tmp_path / "out", [own], judge_(), threads=3).entries
    assert len(server.requests) == 12
    assert sorted(map(number_of, server.requests)) == list(range(12))
    assert (tmp_path / "out" / "judged.jsonl").read_text().startswith(before)
    assert (entry["judged"], entry["unjudged"], entry["not_asked"]) == (12, 0, 0)
    assert entry["score"] == pytest.approx(2.5)
    assert entry["judge"] == {
        "model": "m",
        "endpoint": server.url.removeprefix("http://"),
        "temperature": 0.0,
        "json_mode": True,
        "max_tokens": None,
    }
    assert entry["answered_by"] == "judge-1-0125"
    stored = json.loads((tmp_path / "out" / "judged.json").read_text())
    assert stored == {"judged": [entry]}
    run(tmp_path / "out", [own], judge_())
    assert len(server.requests) == 12
    assert KEY not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())


def test_a_line_that_was_cut_is_asked_again(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve([said('{"score": 3}')])
    own = work(tmp_path / "p.json", 3)
    run(tmp_path, [own], OpenAICompatible(server.url, "m"), threads=1)
    path = tmp_path / "judged.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])  # killed while it wrote
    run(tmp_path, [own], OpenAICompatible(server.url, "m"))
    assert len(server.requests) == 4
    assert [row["key"] for row in rows_of(tmp_path)] == ["v_0", "v_1", "v_2"]
    path.write_text("{\n" + whole)
    with pytest.raises(UserError, match=r"judged.jsonl: line 1 is not JSON.*take this line out"):
        run(tmp_path, [own], OpenAICompatible(server.url, "m"))
    for before, after in (('"score": 3.0', '"score": NaN'), ('"score": 3.0', '"score": 30'), ('"score": 3.0, ', "")):
        path.write_text(whole.replace(before, after, 1))
        with pytest.raises(UserError, match=r"the row of 'v_0' has the score .*take this line out"):
            run(tmp_path, [own], OpenAICompatible(server.url, "m"))
    path.write_text(whole)
    (tmp_path / "judged.json").write_text('{"judged": 5}')
    with pytest.raises(UserError, match="has no list `judged`"):
        run(tmp_path, [own], OpenAICompatible(server.url, "m"))


def test_replies_without_verdict_are_counted(serve: Callable[..., Server], tmp_path: Path) -> None:
    """Asked again as often as said, then kept and listed; never an endless loop, never dropped."""
    mended = False

    def answer(number: int, request: dict[str, Any]) -> Answer:
        which = number_of(request)
        if which == 1 and not mended:
            return said("I would rather not")
        if which == 2 and number_of(request) not in [number_of(one) for one in server.requests[:-1]]:
            return said("{score: 4}")  # the first time only
        if which == 3:
            return 400, {}, b"a filter"
        return said('{"score": 4}')

    server = serve(answer)
    own = work(tmp_path / "p.json", 5)
    (entry,) = run(tmp_path, [own], OpenAICompatible(server.url, "m"), attempts=2).entries
    assert len(server.requests) == 1 + 2 + 2 + 1 + 1
    assert (entry["items"], entry["judged"], entry["unjudged"], entry["score"]) == (5, 3, 2, 4.0)
    assert [bare["key"] for bare in entry["unjudged_items"]] == ["v_1", "v_3"]
    assert "no object" in entry["unjudged_items"][0]["problem"]
    assert "refused: status 400: a filter" in entry["unjudged_items"][1]["problem"]
    mended = True
    run(tmp_path, [own], OpenAICompatible(server.url, "m"))
    assert len(server.requests) == 7
    (entry,) = run(tmp_path, [own], OpenAICompatible(server.url, "m"), again=True).entries
    assert len(server.requests) == 9
    assert (entry["judged"], entry["unjudged"]) == (4, 1)


def test_a_server_that_goes_away(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda number, _: said('{"score": 4}') if number < 3 else None)
    own = work(tmp_path / "p.json", 40)
    with pytest.raises(UserError, match=r"5 requests in a row had no success.*the same command goes on"):
        run(tmp_path, [own], OpenAICompatible(server.url, "m", retries=1), threads=2)
    assert len(rows_of(tmp_path)) == 3
    assert len(server.requests) < 30
    server = serve(lambda number, request: said('{"score": 4}') if number_of(request) != 7 else None)
    judge_ = OpenAICompatible(server.url, "m", retries=1)
    object.__setattr__(judge_.name, "endpoint", rows_of(tmp_path)[0]["judge"]["endpoint"])  # it came back
    found = run(tmp_path, [own], judge_)
    assert [key for key, _ in found.unanswered] == ["v_7"]
    assert (found.entries[0]["judged"], found.entries[0]["not_asked"]) == (39, 1)


def test_a_model_that_cannot_judge(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve([said("blah")])
    with pytest.raises(UserError, match="no verdict in the replies about 20 items in a row"):
        run(tmp_path, [work(tmp_path / "p.json", 60)], OpenAICompatible(server.url, "m"), attempts=1, threads=2)
    assert len(server.requests) < 40


def test_requests_that_are_refused(serve: Callable[..., Server], tmp_path: Path) -> None:
    def answer(_: int, request: dict[str, Any]) -> Answer:
        return (400, {}, b"response_format?") if "response_format" in request else said('{"score": 2}')

    url, own = serve(answer).url, work(tmp_path / "p.json", 9)
    with pytest.raises(UserError, match=r"refused: status 400: response_format\?.*with --again"):
        run(tmp_path, [own], OpenAICompatible(url, "m"), threads=2)
    assert run(tmp_path, [own], OpenAICompatible(url, "m", json_mode=False)).entries[0]["judged"] == 9


def test_a_wrong_key_stops_at_once(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve([(401, {}, b"")])
    with pytest.raises(UserError, match="--key-env"):
        run(tmp_path, [work(tmp_path / "p.json", 50)], OpenAICompatible(server.url, "m"), threads=2)
    assert len(server.requests) < 10
    assert not (tmp_path / "judged.json").exists()


def test_judges_are_kept_apart(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda _, request: said(json.dumps({"score": 1 if request["model"] == "mild" else 5})))
    own = [work(tmp_path / "p.json", 3), work(tmp_path / "p.json", 3, "context")]
    for model, temperature in (("mild", 0.0), ("strict", 0.0), ("strict", 1.0)):
        run(tmp_path, own, OpenAICompatible(server.url, model, temperature=temperature))
    assert len(server.requests) == 18
    entries = json.loads((tmp_path / "judged.json").read_text())["judged"]
    assert len(entries) == 6
    assert sorted((e["judge"]["model"], e["judge"]["temperature"], e["aspect"], e["score"]) for e in entries) == [
        ("mild", 0.0, "context", 1.0),
        ("mild", 0.0, "detail", 1.0),
        ("strict", 0.0, "context", 5.0),
        ("strict", 0.0, "detail", 5.0),
        ("strict", 1.0, "context", 5.0),
        ("strict", 1.0, "detail", 5.0),
    ]
    with pytest.raises(UserError, match="do not go together, since their judge differs"):
        verdicts_of([row for row in rows_of(tmp_path) if row["aspect"] == "detail"])


def test_a_name_that_comes_to_mean_another_model(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda n, _: said(json.dumps({"score": n % 2}), f"dated-{n % 2}"))
    found = run(tmp_path, [work(tmp_path / "p.json", 4)], OpenAICompatible(server.url, "m"), threads=1)
    assert [(e["answered_by"], e["judged"], e["score"], e["not_asked"]) for e in found.entries] == [
        ("dated-0", 2, 0.0, 2),
        ("dated-1", 2, 1.0, 2),
    ]
    with pytest.raises(UserError, match="their answered_by differs"):
        verdicts_of(rows_of(tmp_path))


def test_other_predictions_are_asked_about_anew(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve([said('{"score": 3}')])
    own = work(tmp_path / "p.json", 3)
    run(tmp_path, [own], OpenAICompatible(server.url, "m"))
    changed = own.items[1]._replace(predictions=("another",))
    other = Work(aspect=own.aspect, items=(own.items[0], changed), file=own.file)
    judge_ = OpenAICompatible(server.url, "m")
    assert entries_of(other, rows_of(tmp_path), judge_.name)[0]["not_asked"] == 1
    (entry,) = run(tmp_path, [other], judge_).entries
    assert len(server.requests) == 4
    assert (entry["items"], entry["judged"]) == (2, 2)


# Recorded -------------------------------------------------------------------------------------------


def test_recorded_replies_give_the_same_figures(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(lambda _, request: said(json.dumps({"score": number_of(request)})))
    own = work(tmp_path / "p.json", 5)
    (entry,) = run(tmp_path / "first", [own], OpenAICompatible(server.url, "m")).entries
    recorded = Recorded(tmp_path / "first" / "judged.jsonl")
    (again,) = run(tmp_path / "second", [own], recorded).entries
    assert again == entry
    assert len(server.requests) == 5
    more = run(tmp_path / "third", [work(tmp_path / "p.json", 6)], Recorded(tmp_path / "first" / "judged.jsonl"))
    assert [key for key, _ in more.unanswered] == ["v_5"]
    assert (more.entries[0]["judged"], more.entries[0]["not_asked"]) == (5, 1)


def test_recorded_replies_of_several_judges(tmp_path: Path) -> None:
    file = tmp_path / "judged.jsonl"
    name = {"model": "a", "endpoint": "h/v1", "temperature": 0.0, "json_mode": True, "max_tokens": None}
    rows = [{"judge": name | {"model": m}, "asked": digest_of("s", "u"), "reply": m} for m in ("a", "b")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"several judges.*give --model"):
        Recorded(file)
    assert Recorded(file, "b").ask("s", "u") == "b"
    assert Recorded(file, "b").name.model == "b"
    with pytest.raises(UserError, match="holds no reply of c"):
        Recorded(file, "c")
    file.write_text('{"key": "v"}\n')
    with pytest.raises(UserError, match=r"it is no judged\.jsonl"):
        Recorded(file)
    for other in ({"temperature": float("nan")}, {"model": 5}, {"more": 1}):
        file.write_text(json.dumps(rows[0] | {"judge": name | other}) + "\n")
        with pytest.raises(UserError, match="is not the name of a judge"):
            Recorded(file)
