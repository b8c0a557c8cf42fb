"""report.html from a fabricated run over real tiny shards: what must be in it, and what it survives."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools import report as report_tool
from vlm.data.shards import write_shards
from vlm.run import report_clips
from vlm.run.charts import Line, line_chart, number, thin, ticks
from vlm.run.report import write_report
from vlm.run.report_metrics import DEMO_LIMITS, MEANS, SEGMENTS, wilson
from vlm.sources import shapes
from vlm.types import Prediction, UserError

CLASSES = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    shapes.render(root, num_train=8, num_test=16, seed=3, workers=1)
    out = root / "shards"
    write_shards(shapes.read(root, "test", ()), out, arguments={"source": "shapes", "split": "test"}, check=False)
    return out


def scores_of(best: int, surest: float = 0.6) -> list[float]:
    return [surest if k == best else (1 - surest) / (CLASSES - 1) for k in range(CLASSES)]


def prediction_rows(shards: Path) -> list[dict]:
    rows = []
    for row in range(16):
        record = report_clips.ShardSet(shards).read(row)
        truth = record.annotation["label"]
        said = truth if row % 4 else (truth + 1) % CLASSES  # 4 of 16 are wrong
        probes = {"one_frame": scores_of(0, 0.3), "shuffled_frames": scores_of(truth ^ 1, 0.4)}
        rows.append(
            {"key": record.key, "truth": truth, "prediction": said, "scores": scores_of(said), "probes": probes}
        )
    return rows


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    about = {
        "recipe": "vit_llama.demo",
        "config": {"model": {"depth": 2}, "eval": {"shards": str(shards)}, "views": {"label": 1.0}, "steps": 50},
        "deepspeed": {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 4},
        "world_size": 2,
        "overrides": ["steps=50", "run_dir=a folder"],
        "versions": {"torch": "2.13.0"},
        "git_commit": "0123456789abcdef+changes",
        "device": "cpu (2 cores)",
        "attention": "sdpa",
        "command": ["train.py", "--recipe", "vit_llama.demo", "run_dir=a folder"],
    }
    steps = [
        {"step": step, "epoch": 0, "loss": 2.0 / step, "losses": {"label": 2.0 / step}, "lr": 1e-3, "grad_norm": 1.0}
        | {"step_time": 0.5, "data_wait": 0.05, "samples_per_s": 64.0, "batch_digest": "00", "peak_memory": 2**30}
        for step in range(1, 51)
    ]
    metrics = {"top1": 0.75, "top5": 1.0, "chance": 0.125, "top1_one_frame": 0.125, "top1_shuffled_frames": 0.0}
    (folder / "recipe.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text(lines(steps))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "predictions.jsonl").write_text(lines(prediction_rows(shards)))
    (folder / "quarantine.jsonl").write_text(
        lines([{"key": "<broken>", "shard": "s.tar", "reason": "moov & more", "replaced_by": "b", "position": 9}])
    )
    return folder


class Page(HTMLParser):
    """Refuses tags that are not closed in order, and collects what the page refers to."""

    VOID = ("meta", "img", "link", "br", "line", "rect", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_and_self_contained(run: Path) -> None:
    text = write_report(run).read_text()
    page = Page(text)
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in page.references)
    assert "script" not in page.count
    assert "://" not in text
    assert page.count["img"] == report_clips.NUM_CLIPS * report_clips.FRAMES_A_CLIP
    assert page.count["svg"] == 6  # loss, lr, gradient norm, samples a second, data wait, confusion
    words = " ".join(page.text)
    for expected in (
        "0.750",
        "95 % interval 0.505 to 0.898",
        "at least 0.85",
        "16 clips, 4 wrong",
        "10.0 % of it waiting for data",
        "2 processes on cpu (2 cores)",
        "Moving something from left to right",
        "model.depth",
        "zero_optimization.stage",
        "git checkout 0123456789abcdef\n",
        "deepspeed --num_gpus 2 launch/train.py --recipe vit_llama.demo 'run_dir=a folder'",
        "moov & more",
        "2.13.0",
    ):
        assert expected.lower() in words.lower(), expected
    assert "Not everything could be read" not in words


def test_what_changed_when_the_run_went_on_is_told(run: Path) -> None:
    about = json.loads((run / "recipe.json").read_text())
    resumed = [{"step": 40, "changed": ["world_size: 2 -> 4", "log_every: <10> -> 5"]}, {"step": 60, "changed": []}]
    (run / "recipe.json").write_text(json.dumps({**about, "resumed": resumed}))
    text = write_report(run).read_text()
    assert "went on from step 40" in text
    assert "world_size: 2 -&gt; 4; log_every: &lt;10&gt; -&gt; 5" in text
    assert "<td>went on from step 60" not in text  # it changed nothing
    assert "<li>went on from step 60</li>" in text


def test_limits_say_which_are_kept(run: Path) -> None:
    text = write_report(run).read_text()
    assert '<span class="bad">✗ at least 0.85</span>' in text
    assert '<span class="good">✓ at most 0.65</span>' in text
    about = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**about, "recipe": "vit_llama.ssv2_s"}))
    assert "at least 0.85" not in write_report(run).read_text()  # limits belong to the demo's corpus


def test_text_from_files_is_escaped(run: Path) -> None:
    evil = "<script>alert('x')</script>"
    about = json.loads((run / "recipe.json").read_text())
    about |= {
        "device": evil,
        "recipe": evil,
        "config": {evil: evil, "eval": about["config"]["eval"]},
        "command": [evil],
    }
    (run / "recipe.json").write_text(json.dumps(about))
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    rows[0]["key"] = evil
    rows = [{**row, "probes": {evil: row["scores"]}} for row in rows]
    (run / "predictions.jsonl").write_text(lines(rows))
    (run / "metrics.json").write_text(json.dumps({evil: 0.5}))
    text = write_report(run).read_text()
    assert "script" not in Page(text).count
    assert text.count("&lt;script&gt;") >= 6


@pytest.mark.parametrize(
    "name", ["recipe.json", "metrics.jsonl", "metrics.json", "predictions.jsonl", "quarantine.jsonl"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "another type", "binary"])
def test_a_file_that_is_missing_or_damaged_is_named(run: Path, name: str, damage: str) -> None:
    path = run / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "another type":
        path.write_text("[1, 2]\n")
    else:
        path.write_bytes(b"\xff\xfe\x00" + content)
    text = write_report(run).read_text()
    Page(text)
    optional = name == "quarantine.jsonl" and damage == "missing"
    assert (name in "".join(re.findall(r'<div class="problems">.*?</div>', text, re.S))) == (not optional)
    if name == "metrics.jsonl" and damage == "cut":
        assert "49 steps" in text  # the whole lines still count


def test_empty_folder_and_no_folder(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text()
    assert text.count("is missing") == 4
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nothing")


def test_pretraining_run_has_no_test_sections(run: Path) -> None:
    about = json.loads((run / "recipe.json").read_text())
    about["config"]["eval"] = None
    (run / "recipe.json").write_text(json.dumps(about))
    for name in ("metrics.json", "predictions.jsonl"):
        (run / name).unlink()
    text = write_report(run).read_text()
    assert "is missing" not in text
    assert "Confusion" not in text
    assert "<h2>Training</h2>" in text


def test_test_shards_gone_or_changed(run: Path, shards: Path) -> None:
    about = json.loads((run / "recipe.json").read_text())
    about["config"]["eval"]["shards"] = "/nowhere/shards"
    (run / "recipe.json").write_text(json.dumps(about))
    text = write_report(run).read_text()
    assert "/nowhere/shards: no such folder" in text
    assert "class 3" in text
    about["config"]["eval"]["shards"] = str(shards)
    (run / "recipe.json").write_text(json.dumps(about))
    rows = prediction_rows(shards)
    rows[0]["key"] = "gone"  # wrong, so it is shown
    (run / "predictions.jsonl").write_text(lines(rows))
    assert "gone is not in the test shards any more" in write_report(run).read_text()


def test_values_that_are_not_finite_leave_gaps(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[10:20]:
        row["loss"] = float("nan")
        row["grad_norm"] = None
    rows[30].pop("lr")
    rows[40]["losses"] = None
    (run / "metrics.jsonl").write_text(lines(rows))
    text = write_report(run).read_text()
    assert not re.search(r'points="[^"]*(nan|inf)', text)


def predictions(wrong: int, right: int) -> list[Prediction]:
    def one(i: int, truth: int, said: int, surest: float) -> Prediction:
        return Prediction(key=f"k{i}", truth=truth, prediction=said, scores=scores_of(said, surest))

    missed = [one(i, i % CLASSES, (i + 1) % CLASSES, 0.5 + i / 1000) for i in range(wrong)]
    return missed + [one(1000 + i, i % 3, i % 3, 0.5) for i in range(right)]


def test_choose_shows_wrong_and_right_clips() -> None:
    chosen = report_clips.choose(predictions(30, 30))
    assert [p.key for p in chosen[:4]] == ["k29", "k28", "k27", "k26"]  # the surest of the wrong ones
    assert all(p.truth == p.prediction for p in chosen[4:])
    assert [p.truth for p in chosen[4:10]] == [0, 1, 2, 0, 1, 2]
    for wrong, right in ((30, 2), (2, 30), (0, 30), (30, 0)):
        assert len({p.key for p in report_clips.choose(predictions(wrong, right))}) == report_clips.NUM_CLIPS
    assert len(report_clips.choose(predictions(3, 2))) == 5


def test_many_classes_make_a_matrix_without_figures(run: Path) -> None:
    rows = [
        {"key": f"v{i}", "truth": i, "prediction": i, "scores": [float(k == i) for k in range(174)]} for i in range(174)
    ]
    (run / "predictions.jsonl").write_text(lines(rows))
    page = Page(write_report(run).read_text())
    assert page.count["rect"] > 174 * 174
    assert "No clip was taken for another class." in page.text


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662 (method 3)
    low, high = wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)


def test_ticks_cover_the_range() -> None:
    for low, high in ((0.0, 1.0), (3e-9, 4e-9), (0, 0), (-5, 12345), (7, 7.0001)):
        found = ticks(low, high, 5)
        assert found[0] <= low + 1e-12 * abs(low)
        assert found[-1] >= high - 1e-12 * abs(high)
        assert 2 <= len(found) <= 8
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]


def test_thin_keeps_extremes() -> None:
    ys = [0.0] * 100_000
    ys[77_777] = 9.0
    xs, kept = thin(range(100_000), ys)
    assert len(kept) <= 600
    assert xs[kept.index(9.0)] == 77_777


def test_numbers_and_labels() -> None:
    assert [number(v) for v in (0, 0.25, 1234567, 3e-5, 1e9)] == ["0", "0.25", "1,234,567", "3.00e-5", "1.00e9"]
    assert "&lt;b&gt;" in line_chart([Line("<b>", [1, 2], [1, 2])], y_label="<b>")
    assert "no values of loss" in line_chart([Line("loss", [1], [float("nan")])], y_label="loss")


def test_tool(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_tool.main([str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert report_tool.main([str(run / "no")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert MEANS.keys() | SEGMENTS.keys() >= DEMO_LIMITS.keys()
