"""tools/judge.py: from a run or a published file to figures that name their judge, asking a server of our own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools import judge as tool
from vlm.data.chats import ChatConfig
from vlm.data.shards import ShardSet, write_shards
from vlm.metrics.judged import ASPECTS, digest_of, prompts_of
from vlm.metrics.judged_files import items_of_run, read_published
from vlm.run.report import write_report
from vlm.sources import video_chatgpt_benchmark
from vlm.types import Writing

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Says yes and 5 where the prediction is the answer, else no and the published example."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            user = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][1]["content"]
            lines = dict(line.split(": ", 1) for line in user.splitlines() if ": " in line)
            right = all(lines["Correct Answer"] == text for name, text in lines.items() if name.startswith("Predicted"))
            text = '{"pred": "yes", "score": 5}' if right else "{'pred': 'no', ''score': 4.8}"
            assert self.headers["Authorization"] in (None, f"Bearer {KEY}")
            body = json.dumps({"model": "m-0125", "choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [{"key": f"v{n}/0", "video": f"v{n}", "kind": "", "question": "What?", **row} for n, row in enumerate(rows)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


TEXTS = [
    {"text": "A cup.", "references": ["A cup."]},
    {"text": "A <b>car</b>.", "references": ["A cup."]},
    {"text": "A tree.", "references": []},
]


def test_a_run(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    run = write_run(tmp_path / "run", TEXTS)
    monkeypatch.setenv("MY_KEY", KEY)
    words = [str(run), "--aspect", "correctness", "qa", "--endpoint", endpoint, "--model", "m", "--key-env", "MY_KEY"]
    assert tool.main(words) == 0
    said = capsys.readouterr().out
    assert (
        "correctness: score 4.9000 (4.5000 of whole parts) over 2 of 2, 1 without a published answer; m (as m-0125)"
        in said
    )
    assert "qa: accuracy 0.5000  score 4.9000" in said
    entries = json.loads((run / "judged.json").read_text())["judged"]
    assert [(e["aspect"], e["judged"], e["score_int"]) for e in entries] == [("correctness", 2, 4.5), ("qa", 2, 4.5)]
    assert entries[0]["judge"]["endpoint"] == endpoint.removeprefix("http://")
    assert tool.main(words) == 0
    assert "0 items for m at" in capsys.readouterr().out
    page = write_report(run).read_text()
    assert "<h2>Judged</h2>" in page
    assert "4.90 (4.50)" in page
    assert "m (as m-0125) at 127.0.0.1:" in page
    assert "made again after" not in page
    assert KEY not in "".join(path.read_text() for path in run.iterdir())
    write_run(run, TEXTS[:2])
    assert "made again after these were judged: correctness, qa" in write_report(run).read_text()
    (run / "judged.json").write_text('{"judged": [{"aspect": "<script>"}]}')
    page = write_report(run).read_text()
    assert "judged.json: is damaged" in page
    assert "<script>" not in page


def test_the_aspects_of_kinds(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "kind": kind} for kind in ("general", "temporal") for row in TEXTS[:2]]
    rows += [{**TEXTS[0], "kind": "consistency", "video": "c", "key": f"c/{n}", "question": f"q{n}"} for n in range(2)]
    run = write_run(tmp_path / "run", rows)
    assert tool.main([str(run), "--endpoint", endpoint, "--model", "m"]) == 0
    entries = json.loads((run / "judged.json").read_text())["judged"]
    assert [(entry["aspect"], entry["items"], entry["score"]) for entry in entries] == [
        ("correctness", 2, 4.9),
        ("detail", 2, 4.9),
        ("context", 2, 4.9),
        ("temporal", 2, 4.9),
        ("consistency", 1, 5.0),
    ]
    assert tool.main([str(run), "--aspect", "qa", "--dry-run"]) == 2
    assert "no text that is judged by qa (its kinds are consistency, general, temporal)" in capsys.readouterr().err
    assert tool.main([str(run), "--kind", "temporal", "--dry-run"]) == 0
    assert "2 requests, roughly" in capsys.readouterr().out
    assert tool.main([str(run), "--kind", "x", "--dry-run"]) == 2


def test_a_published_file_and_what_was_recorded(endpoint: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "pred.json"
    rows = [{"video_name": "v", "Q1": "a?", "Q2": "b?", "A": "A cup.", "pred1": "A cup.", "pred2": text} for text in
            ("A cup.", "A car.")]  # fmt: skip
    file.write_text(json.dumps(rows))
    assert tool.main([str(file), "--endpoint", endpoint, "--model", "m", "--threads", "1"]) == 0
    judged = tmp_path / "pred_judged"
    assert "consistency: score 4.9000 (4.5000 of whole parts) over 2 of 2;" in capsys.readouterr().out
    again = tmp_path / "again"
    assert tool.main([str(file), "--recorded", str(judged / "judged.jsonl"), "--out", str(again)]) == 0
    assert (again / "judged.json").read_text() == (judged / "judged.json").read_text()
    rows.append(rows[0] | {"pred2": "A mug."})
    file.write_text(json.dumps(rows))
    assert tool.main([str(file), "--recorded", str(judged / "judged.jsonl"), "--out", str(again)]) == 1
    assert "not asked: v_2: " in capsys.readouterr().err
    assert json.loads((again / "judged.json").read_text())["judged"][0]["not_asked"] == 1


def test_recorded_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Replies that lie elsewhere are scored once their requests are named: unjudged ones are told."""
    file = tmp_path / "pred.json"
    file.write_text(
        json.dumps([{"id": f"q{n}", "question": "is it?", "answer": "yes", "pred": str(n)} for n in range(3)])
    )
    name = {"model": "old", "endpoint": "somewhere/v1", "temperature": 0.0, "json_mode": False, "max_tokens": None}
    replies = ["{'pred': 'yes', 'score': 4}", "{'pred': 'no', 'score': 1}", "I am sorry"]
    with (tmp_path / "old.jsonl").open("w") as old:
        for item, reply in zip(read_published(file), replies, strict=True):
            row = {"judge": name, "asked": digest_of(*prompts_of(ASPECTS["qa"], item)), "reply": reply}
            old.write(json.dumps(row) + "\n")
    assert tool.main([str(file), "--aspect", "qa", "--recorded", str(tmp_path / "old.jsonl")]) == 0
    out, err = capsys.readouterr()
    assert "qa: accuracy 0.5000  score 2.5000 (2.5000 of whole parts) over 2 of 3, 1 without verdict; old at" in out
    assert "without verdict: q2_0: no object in 'I am sorry'" in err


def test_dry_run_asks_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", TEXTS[:1] * 7)
    assert tool.main([str(run), "--aspect", "detail", "temporal", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("====") == 6
    assert "14 requests, roughly" in said
    items, _ = items_of_run([Writing(key="k", text="A cup.", references=["A cup."], question="What?")], pairs=False)
    for aspect in ("detail", "temporal"):
        for part in prompts_of(ASPECTS[aspect], items[0]):
            assert part in said
    assert tool.main([str(run), "--aspect", "detail", "detail", "--dry-run", "--limit", "2"]) == 0  # asked once
    assert "2 requests, roughly" in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == ["predictions.jsonl"]
    hostile = [{"text": "\ud800 \x1b[31mred Straße 猫", "references": ["A cup."]}]
    assert tool.main([str(write_run(tmp_path / "run", hostile)), "--aspect", "detail", "--dry-run"]) == 0
    assert r"\ud800 \x1b[31mred Straße 猫" in capsys.readouterr().out


def test_export(tmp_path: Path) -> None:
    run, file = write_run(tmp_path / "run", TEXTS[:2]), tmp_path / "pred.json"
    assert tool.main([str(run), "--export", str(file)]) == 0
    assert json.loads(file.read_text()) == [
        {"video_name": "v0", "Q": "What?", "A": "A cup.", "pred": "A cup."},
        {"video_name": "v1", "Q": "What?", "A": "A cup.", "pred": "A <b>car</b>."},
    ]
    assert tool.main([str(run), "--export", str(file), "--form", "qa"]) == 0
    assert json.loads(file.read_text())[0] == {"id": "v0/0", "question": "What?", "answer": "A cup.", "pred": "A cup."}
    rows = [{**row, "video": "v"} for row in TEXTS[:2]]
    assert tool.main([str(write_run(run, rows)), "--export", str(file), "--form", "consistency"]) == 0
    assert json.loads(file.read_text()) == [
        {"video_name": "v", "Q1": "What?", "Q2": "What?", "A": "A cup.", "pred1": "A cup.", "pred2": "A <b>car</b>."}
    ]


@pytest.mark.parametrize("kind", ["general", "temporal", "qa"])
def test_export_of_kinds(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As tests of the published questions leave them."""
    rows = [{**TEXTS[0], "kind": kind}, {**TEXTS[1], "kind": "consistency", "video": "c", "id": "c/0/1"}]
    rows += [{**TEXTS[1], "kind": "consistency", "video": "c", "id": "c/0/2"}]
    run, file = write_run(tmp_path / "run", rows), tmp_path / "pred.json"
    assert tool.main([str(run), "--export", str(file)]) == 0
    assert [row["video_name"] for row in json.loads(file.read_text())] == ["v0"]
    assert tool.main([str(run), "--export", str(file), "--form", "consistency"]) == 0
    assert [row["video_name"] for row in json.loads(file.read_text())] == ["c"]
    several = [{**TEXTS[0], "kind": kind} for kind in ("general", "temporal")]
    assert tool.main([str(write_run(run, several)), "--export", str(file)]) == 2
    assert "give --kind" in capsys.readouterr().err
    assert tool.main([str(run), "--export", str(file), "--kind", "temporal"]) == 0
    assert [row["video_name"] for row in json.loads(file.read_text())] == ["v1"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "m"], "give --endpoint and --model, or --recorded"),
        (["--endpoint", "http://h", "--recorded", "f"], "give --endpoint and --model, or --recorded"),
        (["--endpoint", "http://h"], "--endpoint needs --model"),
        (["--endpoint", "http://h", "--model", "m", "--threads", "0"], "whole number from 1"),
        (["--endpoint", "http://h", "--model", "m", "--temperature", "-1"], "from 0 to 2"),
        (["--endpoint", "http://h", "--model", "m", "--timeout", "0"], "above 0"),
        (["--endpoint", "http://h", "--model", "m", "--retries", "-1"], "0 or more"),
        (["--dry-run", "--aspect", "beauty"], "invalid choice"),
        (["--dry-run", "--form", "qa"], "--form says nothing without --export"),
        (["--export", "f", "--limit", "3"], "--limit says nothing of an --export"),
        (["--export", "f", "--recorded", "g"], "--recorded says nothing of an --export"),
        (["--export", "f", "--aspect", "qa", "detail"], "--aspect with several names says nothing of an --export"),
        (["--recorded", "f", "--temperature", "1"], "--temperature says nothing of recorded replies"),
        (["--recorded", "f", "--no-json-mode"], "--no-json-mode says nothing of recorded replies"),
    ],
)
def test_wrong_words(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path), *words])
    assert says in capsys.readouterr().err


def test_what_cannot_be_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", TEXTS[2:])
    cases = [
        ([str(run)], "give --aspect"),
        ([str(run), "--aspect", "qa"], "answers to compare with are not published"),
        ([str(tmp_path / "none.jsonl")], "cannot be read"),
        ([str(tmp_path)], "cannot be read"),
    ]
    scores = tmp_path / "predictions.jsonl"
    for words, says in cases:
        assert tool.main([*words, "--dry-run"]) == 2
        assert says in capsys.readouterr().err
    scores.write_text(json.dumps({"key": "a", "truth": 0, "prediction": 0, "scores": [1.0], "text": 1}) + "\n")
    assert tool.main([str(tmp_path), "--dry-run"]) == 2


def test_from_published_questions_to_what_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions of the benchmark as shards; what tests ask of them, answered; and the published file again."""
    rows = [{"video_name": "v_a", "Q1": "What is it?", "Q2": "Which thing?", "A": "A cup."},
            {"video_name": "v_b", "Q1": "Who?", "Q2": "Which man?", "A": "Me."},
            {"video_name": "v_a", "Q1": "And this?", "Q2": "And that?", "A": "A cup."}]  # fmt: skip
    (tmp_path / "consistency_qa.json").write_text(json.dumps(rows))
    (tmp_path / "clip_pooled").mkdir()
    for name in ("v_a", "v_b"):
        np.save(tmp_path / "clip_pooled" / f"{name}.npy", np.ones((6, 4), np.float16))
    items = video_chatgpt_benchmark.read(tmp_path, "consistency", [tmp_path / "clip_pooled"])
    write_shards(items, tmp_path / "shards", arguments={}, workers=1)
    shards = ShardSet(tmp_path / "shards")
    inputs = ChatConfig(num_video_tokens=6, frame_dim=4, task="caption")
    lines = [
        {"key": ask.key, "text": f"[{ask.question}]", "references": list(ask.references), "kind": ask.kind,
         "video": shards.key(number), "id": ask.id, "question": ask.question}
        for number in range(len(shards)) for ask in inputs.asks(shards.read(number, inputs.members))]  # fmt: skip
    run, file = tmp_path / "run", tmp_path / "pred.json"
    run.mkdir()
    (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tool.main([str(run), "--dry-run"]) == 0
    assert "==== consistency 3 of 3" in capsys.readouterr().out
    assert tool.main([str(run), "--export", str(file), "--form", "consistency"]) == 0
    answered = [{**row, "pred1": f"[{row['Q1']}]", "pred2": f"[{row['Q2']}]"} for row in rows]
    assert sorted(json.loads(file.read_text()), key=str) == sorted(answered, key=str)
