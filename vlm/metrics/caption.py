"""Captions: what texts that a model wrote are worth beside what people wrote.

BLEU-1 … 4, ROUGE-L, CIDEr on the words of COCO's caption evaluation; by kind of text; and for Kinetics-GEB+ (subject,
status before, status after of a boundary) the figures of the LOVEU challenge. What each figure is: docs/captions.md.

They come from COCO's own evaluation where that runs (pycocoevalcap is installed and there is Java), else from
vlm.metrics.ptb and vlm.metrics.ngrams, which give the same: figures are rounded to nine places.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from vlm.metrics import coco, ngrams
from vlm.metrics.probes import names_of_probes
from vlm.metrics.ptb import tokenize
from vlm.types import UserError, Writing

Scorer = Literal["auto", "coco", "python"]
"""coco: COCO's evaluation, an error where it cannot run; python: ours; auto: coco where it runs."""

GEBC_KINDS = ("subject", "status_before", "status_after")

_PLACES = 9
_FINAL_STOP = re.compile(r"\s*[.。]$")


class _Measures(NamedTuple):
    words: Callable[[Sequence[str]], list[list[str]]]  # texts -> their words
    bleu: Callable[..., list[float]]
    rouge_l: Callable[..., list[float]]
    cider: Callable[..., list[float]]


_PYTHON = _Measures(lambda texts: [tokenize(text) for text in texts], ngrams.bleu, ngrams.rouge_l, ngrams.cider)
_COCO = _Measures(coco.tokenize, coco.bleu, coco.rouge_l, coco.cider)


def describe(scorer: Scorer = "auto") -> str:
    """What scores captions here, for the record of an evaluation.

    Raises:
        UserError: it is to be COCO's evaluation, and that cannot run: says what is missing.
    """
    return coco.describe() if _measures(scorer) is _COCO else "Python: vlm.metrics.ptb, vlm.metrics.ngrams"


def _measures(scorer: Scorer) -> _Measures:
    problem = coco.missing() if scorer != "python" else ""
    if problem and scorer == "coco":
        raise UserError(f"COCO's caption evaluation cannot run: {problem}; without it captions are scored in Python")
    return _PYTHON if problem or scorer == "python" else _COCO


def normalise(text: str) -> str:
    """What exact matches compare: small letters, single blanks, none around it, no full stop at the end."""
    return _FINAL_STOP.sub("", " ".join(text.split()).lower())


def score(writings: Sequence[Writing], scorer: Scorer = "auto", spice: Path | None = None) -> dict[str, float]:
    """What a list of written texts is worth.

    Args:
        spice: folder of the CoreNLP that SPICE needs (vlm.metrics.coco.check_spice); None: no SPICE.
    Returns: counts: `texts` scored, `texts_empty` of them, `texts_without_references` that are left out. Fractions:
        `exact_match`, `exact_match_<probe>`, `bleu1` … `bleu4`, `rouge_l`, and `spice`; `cider`, 0 … 10. All of these
        again with `_<kind>` where texts have kinds, idf being that of the kind. With the three kinds of GEBC, in
        percent: `mean_<measure>` over the kinds; with SPICE `overall_score` and `mean_score` as the challenge has
        them, else `overall_cider_rouge_l`, a sum of two that compares with neither; and the count
        `boundaries_incomplete` of those that lack a text of a kind.
    Raises:
        UserError: no text, or none with references; rows that do not agree on the probes; a kind that is named like a
            probe; a boundary with two texts of a kind; `scorer` or `spice` asks for what is not installed.
    """
    _check(writings)
    rows = [row for row in writings if row.references]
    if not rows:
        raise UserError(f"none of {len(writings)} texts has references to be scored by: use a split with captions")
    words, measures = _words(rows, _measures(scorer), scorer)
    figures: dict[str, float] = {
        "texts": len(rows),
        "texts_empty": sum(not row.text.strip() for row in rows),
        "texts_without_references": len(writings) - len(rows),
    }
    figures |= _figures(rows, words, measures, spice)
    for probe in rows[0].probes:
        figures[f"exact_match_{probe}"] = _exact(rows, [row.probes[probe] for row in rows])
    kinds = sorted({row.kind for row in rows if row.kind})
    for kind in kinds:
        own = _figures([row for row in rows if row.kind == kind], words, measures, spice)
        figures |= {f"{name}_{kind}": value for name, value in own.items()}
    if set(GEBC_KINDS) <= set(kinds):
        figures |= _challenge(rows, figures)
    return {name: round(value, _PLACES) for name, value in figures.items()}


def _check(writings: Sequence[Writing]) -> None:
    if not writings:
        raise UserError("there are no texts to score: the evaluation wrote no rows")
    probes = names_of_probes(writings, "text")
    for row in writings:
        if row.kind in probes:
            raise UserError(
                f"text {row.key!r}: {row.kind!r} is a kind of text and a probe; exact_match_{row.kind}: whose?"
            )


def _words(rows: Sequence[Writing], measures: _Measures, scorer: Scorer) -> tuple[dict[str, list[str]], _Measures]:
    """The words of all texts and references, and what is to score them: Python where Java gives none and need not."""
    texts = sorted({text for row in rows for text in (row.text, *row.references)})
    try:
        found = measures.words(texts)
    except UserError as error:
        if scorer == "coco":
            raise
        warnings.warn(f"{error}; these captions are scored in Python", stacklevel=3)
        measures = _PYTHON
        found = measures.words(texts)
    return dict(zip(texts, found, strict=True)), measures


def _exact(rows: Sequence[Writing], texts: Sequence[str]) -> float:
    hits = [normalise(text) in {normalise(other) for other in row.references} for row, text in zip(rows, texts)]
    return sum(hits) / len(hits)


def _figures(
    rows: Sequence[Writing], words: dict[str, list[str]], measures: _Measures, spice: Path | None
) -> dict[str, float]:
    texts = [words[row.text] for row in rows]
    references = [[words[other] for other in row.references] for row in rows]
    figures = {"exact_match": _exact(rows, [row.text for row in rows])}
    figures |= {f"bleu{order}": value for order, value in enumerate(measures.bleu(texts, references), 1)}
    figures["rouge_l"] = _mean(measures.rouge_l(texts, references))
    figures["cider"] = _mean(measures.cider(texts, references))
    if spice is not None:
        figures["spice"] = _mean(coco.spice(texts, references, spice))
    return figures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _challenge(rows: Sequence[Writing], figures: dict[str, float]) -> dict[str, float]:
    """The figures of the boundary captioning challenge, from those of its three kinds."""
    counts = Counter((row.video, row.id, row.kind) for row in rows if row.kind in GEBC_KINDS)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        video, boundary, kind = twice[0]
        raise UserError(f"boundary {boundary!r} of video {video!r} has {counts[twice[0]]} texts of the kind {kind!r}")
    boundaries = Counter((video, boundary) for video, boundary, _ in counts)
    measures = [name for name in ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider", "spice") if name in figures]
    means = {name: 100 * _mean([figures[f"{name}_{kind}"] for kind in GEBC_KINDS]) for name in measures}
    found: dict[str, float] = {f"mean_{name}": value for name, value in means.items()}
    found["boundaries_incomplete"] = sum(count < len(GEBC_KINDS) for count in boundaries.values())
    overall = means["rouge_l"] + means["cider"]
    if "spice" not in means:
        return found | {"overall_cider_rouge_l": overall}
    return found | {"overall_score": overall + means["spice"], "mean_score": (overall + means["spice"]) / 3}
