"""report.html: one self-contained page of a run, made from the files in its folder and nothing else.

A file that is missing or damaged is named in the page; the other sections stand. Everything that comes from a file is
escaped. `tools/report.py RUN` writes the page again.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from vlm.files import write_text
from vlm.metrics.classify import class_accuracy, confusion_matrix
from vlm.metrics.segments import names_of_kinds
from vlm.run.charts import Line, Mark, line_chart, matrix_chart, number, smooth
from vlm.run.report_beside import Told, beside
from vlm.run.report_clips import TestClips, strips
from vlm.run.report_events import events, interruptions
from vlm.run.report_judged import judged
from vlm.run.report_metrics import metrics_table
from vlm.run.report_questions import kind_rows, questions
from vlm.run.report_segments import timelines
from vlm.run.report_style import STYLE
from vlm.run.report_texts import kinds_said, texts
from vlm.run.run_folder import read_json, read_predictions, read_rows
from vlm.types import Prediction, Segmentation, UserError, Writing


@dataclass
class RunFiles:
    """What a run folder holds; `problems` has a sentence for each file that is missing or damaged."""

    folder: Path
    about: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)
    writings: list[Writing] = field(default_factory=list)
    segmentations: list[Segmentation] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    unscored: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.about = self._read("recipe.json", read_json, {})
        rows = self._read("metrics.jsonl", lambda path: read_rows(path, self.problems), [])
        self.steps = [row for row in rows if math.isfinite(_number(row.get("step")))]
        if len(self.steps) < len(rows):
            self.problems.append(f"metrics.jsonl: {len(rows) - len(self.steps)} lines name no step and are left out")
        tested = not self.about or _at(self.about, "config", "eval") is not None
        rows = self._read("predictions.jsonl", read_predictions, [], wanted=tested)
        self.predictions = [row for row in rows if isinstance(row, Prediction)]
        self.writings = [row for row in rows if isinstance(row, Writing)]
        self.segmentations = [row for row in rows if isinstance(row, Segmentation)]
        scored = not self.writings or any(writing.references for writing in self.writings)
        self.metrics = self._read("metrics.json", read_json, {}, wanted=tested and scored)
        self.evaluation = self._read("evaluation.json", read_json, {}, wanted=False)
        for name in ("quarantine", "unscored", "skipped"):
            rows = self._read(f"{name}.jsonl", lambda path: read_rows(path, self.problems), [], wanted=False)
            setattr(self, name, rows)

    def _read(self, name: str, read: Callable[[Path], Any], instead: Any, wanted: bool = True) -> Any:
        path = self.folder / name
        if not path.exists():
            if wanted:
                self.problems.append(f"{name} is missing: the run has not come that far, or the file was removed")
            return instead
        try:
            return read(path)
        except UserError as error:
            self.problems.append(str(error))
            return instead

    @cached_property
    def clips(self) -> TestClips:
        return TestClips(self._test_shards())

    @cached_property
    def marks(self) -> list[Mark]:
        """Where it hung or went on, and steps that were skipped."""
        reports = [path.name for path in (self.folder / "hang").glob("*.txt")]
        return events(self.about, self.skipped, reports)

    def told(self) -> Told:
        """What stands beside another run."""
        return Told(str(self.folder), self.about, self.steps, self.marks, self.metrics)

    @cached_property
    def class_names(self) -> list[str]:
        return self.clips.class_names(self.predictions)

    @property
    def asked(self) -> bool:
        """Whether the predictions are answers to questions."""
        return bool(self.predictions) and self.predictions[0].kind is not None

    def _test_shards(self) -> Path | None:
        """The folder of test shards: as the run named it, seen from here or from the repository."""
        named = self.evaluation.get("shards") or _at(self.about, "config", "eval", "shards")
        if not named:
            return None
        path = Path(str(named))
        beside = Path(__file__).resolve().parents[2] / path
        return beside if not path.exists() and beside.exists() else path


def write_report(run_dir: Path, other: Path | None = None) -> Path:
    """Write `run_dir`/report.html from the other files there (whole or not at all) and return its path.

    Args:
        other: another run, whose losses are drawn beside this one's.
    Raises:
        UserError: no such folder, or it cannot be written.
    """
    run_dir = Path(run_dir)
    for folder in (run_dir, *([] if other is None else [other])):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the run_dir of a run, for example runs/demo/vit_llama")
    run = RunFiles(run_dir)
    sections = (
        ("", _headline),
        (f"Beside {other}", lambda run: "" if other is None else _beside(run, other)),
        ("Training", _training),
        ("Interruptions", lambda run: interruptions(run.marks, run.skipped)),
        ("Questions", _questions),
        ("Texts", _texts),
        ("Timelines", _timelines),
        ("Judged", lambda run: judged(run.folder)),
        ("Test clips", _clips),
        ("Confusion", _confusion),
        ("Records that could not be used", _unusable),
        ("How to run it again", _reproduce),
        ("Recipe", _recipe),
        ("DeepSpeed configuration (derived)", _deepspeed),
        ("Where it ran", _machine),
    )
    title = f"{run.about.get('recipe', 'run')} in {run_dir}"
    body = "".join(_section(run, name, make) for name, make in sections)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>{_problems(run)}{body}</body></html>\n"
    )
    path = run_dir / "report.html"
    write_text(path, page)
    return path


def _section(run: RunFiles, name: str, make: Callable[[RunFiles], str]) -> str:
    """A section with its title; nothing where the run folder holds nothing for it."""
    try:
        text = make(run)
    except UserError as error:
        text = f'<p class="missing">{escape(str(error))}</p>'
    title = f"<h2>{escape(name)}</h2>" if name else ""
    return f"<section>{title}{text}</section>" if text else ""


def _problems(run: RunFiles) -> str:
    items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return f'<div class="problems">Not everything could be read:<ul>{items}</ul></div>' if items else ""


def _headline(run: RunFiles) -> str:
    """The metrics with what they mean, and one line on the run as a whole."""
    is_demo = str(run.about.get("recipe", "")).endswith(".demo")
    count = len(run.predictions) + sum(bool(writing.references) for writing in run.writings)
    of_kinds = names_of_kinds(run.segmentations)  # these have a table of their own
    shown = {name: value for name, value in run.metrics.items() if name not in of_kinds}
    return _summary(run) + metrics_table(shown, count, is_demo=is_demo)


def _summary(run: RunFiles) -> str:
    if not run.steps:
        return ""
    seconds = sum(_values(run.steps, "step_time", finite=True))
    waits = sum(_values(run.steps, "data_wait", finite=True))
    memory = max(_values(run.steps, "peak_memory", finite=True), default=0)
    last = run.steps[-1]
    facts = [
        f"{number(len(run.steps))} steps, the last one {last.get('step', '?')}, in epoch {last.get('epoch', '?')}",
        f"{_duration(seconds)} of training, {_share(waits, seconds)} of it waiting for data",
        f"{run.about.get('world_size', '?')} processes on {run.about.get('device', '?')}",
        f"peak memory {memory / 2**30:.2f} GiB a process" if memory else "",
        f"evaluation took {_duration(run.evaluation['seconds'])}" if "seconds" in run.evaluation else "",
    ]
    return f"<p>{escape('; '.join(fact for fact in facts if fact))}.</p>"


def _beside(run: RunFiles, other: Path) -> str:
    """Both losses; UserError where the other run tells of no step."""
    theirs = RunFiles(other)
    if not theirs.steps:
        problems = "; ".join(theirs.problems) or "metrics.jsonl holds no step"
        raise UserError(f"{other}: no run to stand beside this one ({problems})")
    return beside(run.told(), theirs.told())


def _training(run: RunFiles) -> str:
    if not run.steps:
        return ""
    xs = _values(run.steps, "step")

    def chart(title: str, key: str, values: list[float] | None = None, from_zero: bool = False) -> str:
        ys = _values(run.steps, key) if values is None else values
        lines = [Line(f"{title}, each step", xs, ys, "pale"), Line(f"{title}, running mean", xs, smooth(ys))]
        return _figure(title, line_chart(lines, y_label=key, from_zero=from_zero, marks=run.marks))

    times, waits = _values(run.steps, "step_time"), _values(run.steps, "data_wait")
    share = [100 * wait / time if time > 0 else math.nan for wait, time in zip(waits, times)]
    charts = [chart("loss", "loss")]
    names = sorted({name for row in run.steps for name in row.get("losses") or ()})
    for name in names if len(names) > 1 else []:
        charts.append(chart(f"loss: {name}", name, [_number(_at(row, "losses", name)) for row in run.steps]))
    lr = line_chart([Line("learning rate", xs, _values(run.steps, "lr"))], y_label="learning rate", from_zero=True)
    charts += [
        _figure("learning rate (of the head)", lr),
        chart("gradient norm before clipping", "grad_norm", from_zero=True),
        chart("samples a second, all processes", "samples_per_s", from_zero=True),
        chart("share of the step spent waiting for data, %", "data_wait", share, from_zero=True),
    ]
    if any(math.isfinite(value) for value in _values(run.steps, "mfu")):
        charts.append(chart("model FLOPs utilisation", "mfu", from_zero=True))
    return f'<div class="charts">{"".join(charts)}</div>'


def _figure(title: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def _questions(run: RunFiles) -> str:
    if not run.asked:
        return ""
    wrong = sum(p.truth != p.prediction for p in run.predictions)
    said = (
        f"{len(run.predictions)} questions, {wrong} wrong. Shown: up to four wrong ones, the surest first, then right "
    )
    said += "ones. A score is minus the mean loss of the option's tokens: the highest is chosen."
    kinds = kind_rows(run.predictions, _at(run.evaluation, "protocol", "eval", "kinds") or {})
    rows = [{"kind": name, "right": right, "of": of, "accuracy": f"{right / of:.3f}"} for name, right, of in kinds]
    table = _table(["kind", "right", "of", "accuracy"], rows) if rows else ""
    return f"<p>{said}</p>{table}{questions(run.predictions, run.clips)}"


def _texts(run: RunFiles) -> str:
    if not run.writings:
        return ""
    return f"<p>{escape(kinds_said(run.writings))}</p>{texts(run.writings, run.clips)}"


def _timelines(run: RunFiles) -> str:
    return timelines(run.segmentations, run.clips) if run.segmentations else ""


def _clips(run: RunFiles) -> str:
    if not run.predictions or run.asked:
        return ""
    wrong = sum(p.truth != p.prediction for p in run.predictions)
    said = (
        f"{len(run.predictions)} clips, {wrong} wrong. Shown: up to four wrong ones, the surest first, then right ones."
    )
    return f"<p>{said}</p>{strips(run.predictions, run.clips, run.class_names)}"


def _confusion(run: RunFiles) -> str:
    if not run.predictions or run.asked:
        return ""
    names = run.class_names
    counts = confusion_matrix(run.predictions).tolist()
    accuracy = class_accuracy(run.predictions)
    pairs = Counter({(t, p): n for t, row in enumerate(counts) for p, n in enumerate(row) if t != p and n})
    rows = [
        f"<tr><td>{escape(names[t])}</td><td>{escape(names[p])}</td><td class=figure>{n}</td>"
        f"<td class=figure>{sum(counts[t])}</td><td class=figure>{accuracy[t] or 0:.2f}</td></tr>"
        for (t, p), n in pairs.most_common(20)
    ]
    head = "<tr><th>truth</th><th>taken for</th><th>clips</th><th>of</th><th>right in this class</th></tr>"
    table = f"<table>{head}{''.join(rows)}</table>" if rows else "<p>No clip was taken for another class.</p>"
    return f'<div class="wide">{matrix_chart(counts, names)}</div>{table}'


def _unusable(run: RunFiles) -> str:
    parts = []
    for title, rows in (
        ("In training (replaced by the record named)", run.quarantine),
        ("In the test (left out)", run.unscored),
    ):
        if rows:
            columns = [c for c in ("key", "shard", "reason", "replaced_by", "position", "step") if c in rows[0]]
            parts.append(f"<p>{title}: {len(rows)}.</p>{_table(columns, rows[:200])}")
            if len(rows) > 200:
                parts.append(f"<p>The other {len(rows) - 200} are in the run folder.</p>")
    return "".join(parts) or ("<p>None.</p>" if run.steps else "")


def _reproduce(run: RunFiles) -> str:
    about = run.about
    if not about:
        return ""
    commit = str(about.get("git_commit", "unknown"))
    command = [str(word) for word in about.get("command") or []]
    lines = [f"git checkout {commit.removesuffix('+changes')}"] if commit != "unknown" else []
    if commit.endswith("+changes"):
        lines.append("# the working tree had changes that are not in this commit")
    if command:
        script = f"launch/{Path(command[0]).name}"
        lines.append(f"deepspeed --num_gpus {about.get('world_size', 1)} {script} {shlex.join(command[1:])}")
    lines.append(f"python tools/score.py {shlex.quote(str(run.folder))}")
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _machine(run: RunFiles) -> str:
    about = run.about
    if not about:
        return ""
    shown = ("recipe", "overrides", "world_size", "starter", "device", "attention", "git_commit", "shards")
    facts: list[dict[str, Any]] = [
        {"what": key, "value": about[key]} for key in shown if about.get(key) not in (None, [])
    ]
    for again in about.get("resumed") or []:
        changed = "; ".join(map(str, _at(again, "changed") or []))
        facts += [{"what": f"went on from step {_at(again, 'step')}", "value": changed}] if changed else []
    facts += [{"what": name, "value": version} for name, version in (about.get("versions") or {}).items()]
    return _table(["what", "value"], facts)


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(column.replace('_', ' '))}</th>" for column in columns)
    lines = ["".join(f"<td>{escape(_text(row.get(column, '')))}</td>" for column in columns) for row in rows]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _recipe(run: RunFiles) -> str:
    return _tree(run.about.get("config"))


def _deepspeed(run: RunFiles) -> str:
    return _tree(run.about.get("deepspeed"))


def _tree(settings: Any) -> str:
    """Nested settings as a table of dotted paths."""
    rows = [{"setting": path, "value": value} for path, value in _leaves(settings or {})]
    return _table(["setting", "value"], rows) if rows else ""


def _leaves(settings: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(settings, dict) and settings:
        return [
            leaf for key, value in settings.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))
        ]
    return [(path, settings)] if path else []


def _values(rows: list[dict[str, Any]], key: str, finite: bool = False) -> list[float]:
    values = [_number(row.get(key)) for row in rows]
    return [value for value in values if math.isfinite(value)] if finite else values


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "no share"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _at(value: Any, *path: str) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
