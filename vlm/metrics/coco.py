"""COCO's own caption evaluation, where it is installed: pycocoevalcap (extra "metrics") and its Java programs.

Nothing here downloads: Java is the user's, and so are the CoreNLP models that SPICE parses with.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vlm.metrics.ptb import DROPPED, LINE_BREAKS
from vlm.types import UserError

SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

_PACKAGE = "pycocoevalcap"
_TOKENIZER = ("tokenizer/stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer")
_BETWEEN = "x"  # a line between two captions: whether a last "a." keeps its point depends on how the next line begins


def missing() -> str:
    """What COCO's evaluation lacks here, in a sentence; "" where it can run."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return f"{_PACKAGE} is not installed (pip install -e '.[metrics]')"
    if not _java_runs():
        return "its tokenizer needs Java, and no program `java` runs (on Debian and Ubuntu: openjdk-17-jre-headless)"
    return ""


def describe() -> str:
    """What scores captions through `tokenize` and the three measures below."""
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # a folder on the path, not installed
        version = "of unknown version"
    return f"{_PACKAGE} {version}, PTBTokenizer of CoreNLP 3.4.1 in Java"


@cache
def _java_runs() -> bool:
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0


def _folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(missing())
    return Path(spec.submodule_search_locations[0])


def tokenize(texts: Sequence[str]) -> list[list[str]]:
    """The words of each text, by the Java program.

    Raises:
        UserError: Java failed, or answered with another number of lines than it was given.
    """
    if not texts:
        return []
    jar, program = _TOKENIZER
    lines = "".join(f"{LINE_BREAKS.sub(' ', text)}\n{_BETWEEN}\n" for text in texts)
    command = ["java", "-cp", str(_folder() / jar), program, "-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    answer = _run(command, lines).split("\n")
    told = answer[1::2]
    if len(answer) != 2 * len(texts) + 1 or any(line.strip() != _BETWEEN for line in told):
        raise UserError(
            f"the Java tokenizer answered {len(answer) // 2} of {len(texts)} texts in their order: its jar is not that "
            "of pycocoevalcap 1.2, or a text upsets it"
        )
    return [[word for word in line.rstrip().split(" ") if word not in DROPPED and word] for line in answer[:-1:2]]


def _run(command: list[str], given: str) -> str:
    done = subprocess.run(command, input=given.encode(), capture_output=True, check=False)
    if done.returncode:
        program = next(part for part in command if part.startswith("edu."))
        said = done.stderr.decode(errors="replace").split("\n")
        told = [line.strip() for line in said if "Error" in line or "Exception" in line] or [" ".join(said).strip()]
        raise UserError(f"java {program} ended with status {done.returncode}: {told[-1] or 'no message'}")
    return done.stdout.decode()


def bleu(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """As `vlm.metrics.ngrams.bleu`."""
    from pycocoevalcap.bleu.bleu import Bleu  # type: ignore[import-not-found]  # the extra "metrics"

    return [float(value) for value in _scores(Bleu(4), texts, references)[0]]


def rouge_l(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """As `vlm.metrics.ngrams.rouge_l`."""
    from pycocoevalcap.rouge.rouge import Rouge  # type: ignore[import-not-found]

    return [float(value) for value in _scores(Rouge(), texts, references)[1]]


def cider(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """As `vlm.metrics.ngrams.cider`."""
    from pycocoevalcap.cider.cider import Cider  # type: ignore[import-not-found]

    return [float(value) for value in _scores(Cider(), texts, references)[1]]


def _scores(scorer: Any, texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Any:
    truth = {at: [" ".join(words) for words in several] for at, several in enumerate(references)}
    given = {at: [" ".join(words)] for at, words in enumerate(texts)}
    with contextlib.redirect_stdout(io.StringIO()):  # BLEU prints its counts
        return scorer.compute_score(truth, given)


def check_spice(folder: Path) -> None:
    """Whether SPICE can run with the CoreNLP in `folder`.

    Raises:
        UserError: naming all that is missing and where it comes from.
    """
    lacking = [str(folder / name) for name in SPICE_JARS if not (folder / name).is_file()]
    problems = [missing()] if missing() else []
    if lacking:
        problems.append(
            f"{' and '.join(lacking)} must be there; they are in stanford-corenlp-full-2015-12-09.zip of "
            "https://stanfordnlp.github.io/CoreNLP/history.html, which is not downloaded for you"
        )
    if problems:
        raise UserError(f"SPICE parses captions in Java with CoreNLP 3.6.0: {'; '.join(problems)}")


def spice(texts: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], folder: Path) -> list[float]:
    """(I,) SPICE of each caption (Anderson et al. 2016), 0 … 1, from its words, as COCO's evaluation gives them to it.

    A caption of which SPICE can make no score (there is nothing in it) counts 0.

    Args:
        folder: holds `SPICE_JARS`.
    Raises:
        UserError: as `check_spice`; Java failed; a caption is not in what it answers.
    """
    check_spice(folder)
    home = _folder() / "spice"
    jars = [home / "spice-1.0.jar", *sorted((home / "lib").glob("*.jar")), *(folder / name for name in SPICE_JARS)]
    rows = [
        {"image_id": at, "test": " ".join(words), "refs": [" ".join(other) for other in references[at]]}
        for at, words in enumerate(texts)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        given, answer = Path(temporary, "captions.json"), Path(temporary, "scores.json")
        given.write_text(json.dumps(rows), encoding="utf-8")
        memory = os.environ.get("VLM_SPICE_MEMORY", "8G")
        command = ["java", f"-Xmx{memory}", "-cp", ":".join(str(jar.resolve()) for jar in jars)]
        _run([*command, "edu.anu.spice.SpiceScorer", str(given), "-out", str(answer), "-silent"], "")
        scores = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(answer.read_text())}
    lost = [at for at in range(len(texts)) if at not in scores]
    if lost:
        raise UserError(f"SPICE gave no score for {len(lost)} of {len(texts)} captions: {rows[lost[0]]['test']!r:.80}")
    values = [float(scores[at] if isinstance(scores[at], float | int) else 0.0) for at in range(len(texts))]
    return [0.0 if math.isnan(value) else value for value in values]
