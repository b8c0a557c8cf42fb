"""Our caption scores against COCO's own evaluation, where that can run; and what is said where it cannot."""

from __future__ import annotations

import csv
import gzip
import json
import random
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm.metrics import coco, ngrams
from vlm.metrics.caption import GEBC_KINDS, describe, score
from vlm.metrics.ptb import tokenize
from vlm.types import UserError, Writing

RECORDED = Path(__file__).with_name("treebank_words.json.gz")
reference = pytest.mark.skipif(bool(coco.missing()), reason=f"needs Java and pycocoevalcap: {coco.missing()}")


def texts_in(value: Any) -> Iterator[str]:
    """All texts of some words in a JSON value or a table."""
    if isinstance(value, str) and " " in value:
        yield " ".join(value.split())
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from texts_in(one)


def captions(folder: Path) -> list[str]:
    """The texts in published annotation files."""
    found: set[str] = set()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            found.update(texts_in(json.loads(path.read_text())))
        elif path.suffix in (".csv", ".tsv"):
            with path.open(newline="") as file:
                found.update(texts_in(list(csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ","))))
    return sorted(found)


@reference
def test_recorded_answers_are_still_the_program_s() -> None:
    rows = json.loads(gzip.decompress(RECORDED.read_bytes()))
    assert [" ".join(words) for words in coco.tokenize([text for text, _ in rows])] == [words for _, words in rows]


@reference
def test_words_of_published_captions(realdata: Path) -> None:
    texts = captions(realdata / "annotations")
    assert len(texts) > 5000
    java = coco.tokenize(texts)
    assert [
        (text, own) for text, own, other in zip(texts, map(tokenize, texts), java, strict=True) if own != other
    ] == []


@reference
def test_words_do_not_depend_on_the_texts_around() -> None:
    texts = ["the letter y.", "The letter y.", "made by Inc.", "The end", "a\r\nb\u2028c", "", "d"]
    assert coco.tokenize(texts) == [coco.tokenize([text])[0] for text in texts] == [tokenize(text) for text in texts]


def rows_of(seed: int, count: int) -> list[Writing]:
    """Texts with one reference or more: some equal, some empty, some of few words."""
    draw = random.Random(seed)
    bank = ["a", "the", "man", "dog", "red", "can't", "it's", "walks", ".", ",", "(left)", "1/2", "&", "over", "café ½"]

    def text(longest: int = 12) -> str:
        return " ".join(draw.choices(bank, k=draw.randint(0, longest)))

    rows = []
    for at in range(count):
        others = [text() or "a man" for _ in range(draw.randint(1, 4))]
        own = draw.choice([others[0], text(), f"{others[0]} {text(3)}", ""])
        kind = GEBC_KINDS[at % 3]
        rows.append(Writing(key=str(at), text=own, references=others, kind=kind, id=str(at // 3), video="v"))
    return rows


@reference
@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 2), (2, 7), (3, 60), (4, 300)])
def test_same_scores_either_way(seed: int, count: int) -> None:
    rows = rows_of(seed, count)
    assert score(rows, "coco") == pytest.approx(score(rows, "python"), abs=1e-9, rel=0)
    texts = [tokenize(row.text) for row in rows]
    others = [[tokenize(text) for text in row.references] for row in rows]
    for measure in ("bleu", "rouge_l", "cider"):
        theirs, ours = getattr(coco, measure)(texts, others), getattr(ngrams, measure)(texts, others)
        assert theirs == pytest.approx(ours, abs=1e-12, rel=0)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = rows_of(3, 6)
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: None)
    assert describe() == "Python: vlm.metrics.ptb, vlm.metrics.ngrams"
    with pytest.raises(UserError, match=r"pycocoevalcap is not installed \(pip install -e '\.\[metrics\]'\)"):
        score(rows, "coco")
    assert score(rows, "auto") == score(rows, "python")
    with pytest.raises(UserError, match=r"pycocoevalcap.*stanford-corenlp-3\.6\.0-models\.jar must be there"):
        score(rows, spice=tmp_path)


def test_java_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    coco._java_runs.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(coco.importlib.util, "find_spec", lambda name: object())
    assert "needs Java" in coco.missing()
    coco._java_runs.cache_clear()
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert "needs Java" in coco.missing()
    coco._java_runs.cache_clear()


# Programs in Java's place: SPICE's answers as SpiceScorer does, from what it is given.

STAND_IN = """#!{python}
import json, sys
if "-version" in sys.argv: sys.exit(0)
assert "edu.anu.spice.SpiceScorer" in sys.argv, sys.argv
classes = sys.argv[sys.argv.index("-cp") + 1].split(":")
assert any(name.endswith("stanford-corenlp-3.6.0-models.jar") for name in classes), classes
assert any(name.endswith("spice-1.0.jar") for name in classes), classes
given = sys.argv[sys.argv.index("edu.anu.spice.SpiceScorer") + 1]
rows = json.load(open(given))
scores = [{{"image_id": row["image_id"], "scores": {{"All": {{"f": SCORE(row)}}}}}} for row in rows]
json.dump(scores, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


@pytest.fixture
def spice_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with CoreNLP's names, and a `java` that gives 0.5 where a text is its reference, NaN to an empty one."""
    package = tmp_path / "pycocoevalcap"
    (package / "spice" / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    jars = tmp_path / "corenlp"
    jars.mkdir()
    for name in coco.SPICE_JARS:
        (jars / name).touch()
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    rule = '(float("nan") if not row["test"] else 0.5 if row["test"] in row["refs"] else 0.0)'
    program.write_text(STAND_IN.format(python=sys.executable).replace("SCORE(row)", rule))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    coco._java_runs.cache_clear()
    monkeypatch.setattr(coco, "_folder", lambda: package)
    yield jars
    coco._java_runs.cache_clear()


def test_spice_joins_the_challenge_s_figures(spice_folder: Path) -> None:
    texts = {"subject": "A man.", "status_before": "no", "status_after": ""}
    rows = [
        Writing(key=kind, text=text, references=["a man"], kind=kind, id="b", video="v") for kind, text in texts.items()
    ]
    figures = score(rows, "python", spice=spice_folder)
    assert [figures[f"spice_{kind}"] for kind in GEBC_KINDS] == [0.5, 0.0, 0.0]
    assert figures["mean_spice"] == pytest.approx(50 / 3, abs=1e-8)
    total = figures["mean_spice"] + figures["mean_cider"] + figures["mean_rouge_l"]
    assert figures["overall_score"] == pytest.approx(total, abs=1e-8)
    assert figures["mean_score"] == pytest.approx(total / 3, abs=1e-8)
    assert "overall_cider_rouge_l" not in figures


def test_spice_that_fails_is_told(spice_folder: Path) -> None:
    program = spice_folder.parent / "bin" / "java"
    program.write_text('#!/bin/sh\n[ "$1" = -version ] && exit 0\necho "Unsupported class file" >&2\nexit 3\n')
    rows = [Writing(key="a", text="a man", references=["a man"])]
    with pytest.raises(UserError, match=r"SpiceScorer ended with status 3: Unsupported class file"):
        score(rows, "python", spice=spice_folder)


def test_an_answer_that_is_not_to_the_texts_is_told(spice_folder: Path) -> None:
    program = spice_folder.parent / "bin" / "java"
    program.write_text('#!/bin/sh\n[ "$1" = -version ] && exit 0\nread line\necho $line\n')
    with pytest.raises(UserError, match=r"answered 1 of 2 texts in their order"):
        coco.tokenize(["a man", "a dog"])
    rows = [Writing(key="a", text="a man", references=["a man"])]
    with pytest.warns(UserWarning, match=r"in their order.*scored in Python"):
        score(rows)
    with pytest.raises(UserError, match="in their order"):
        score(rows, "coco")
