"""BLEU (Papineni et al. 2002), ROUGE-L (Lin 2004), CIDEr (Vedantam et al. 2015) of captions, as COCO's evaluation has
them: written from the papers and from what that evaluation computes where it departs from them.

A caption is the list of its words (vlm.metrics.ptb); I captions, each with one reference or more. A word that holds a
no-break space is one word to ROUGE-L and several to the others, as there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

ORDERS = 4  # n-grams of 1 … 4 words

BETA = 1.2  # ROUGE-L: recall weighs beta² times as much as precision
SIGMA = 6.0  # CIDEr: deviation of the Gaussian over the difference of lengths

_NO_MATCH, _NO_GUESS = 1e-15, 1e-9  # added to BLEU's counts, so that no match and no n-gram have a value


def bleu(texts: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 … BLEU-4 of a corpus: counts of all captions are added up first. 0 … 1.

    The length that a caption is held against is that of the reference closest in length, the shorter of two.
    """
    matches, guesses = [0] * ORDERS, [0] * ORDERS
    length = wanted = 0
    for text, several in zip(texts, references, strict=True):
        own, *others = (_grams(words) for words in (text, *several))
        size = _size(own)
        length += size
        wanted += min((abs(_size(other) - size), _size(other)) for other in others)[1]
        most: Grams = Counter()
        for other in others:
            most |= other
        for gram, count in own.items():
            guesses[len(gram) - 1] += count
            matches[len(gram) - 1] += min(count, most[gram])
    ratio = (length + _NO_MATCH) / (wanted + _NO_GUESS)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order, (right, all_) in enumerate(zip(matches, guesses), 1):
        product *= (right + _NO_MATCH) / (all_ + _NO_GUESS)
        scores.append(product ** (1 / order) * brevity)
    return scores


def rouge_l(texts: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """(I,) F-measure of each caption from its longest common subsequences with its references, 0 … 1.

    The best precision and the best recall are taken, be they of one reference or of two. A caption without words is
    one empty word.
    """
    scores = []
    for text, several in zip(texts, references, strict=True):
        own = text or [""]
        others = [other or [""] for other in several]
        common = [_common(own, other) for other in others]
        precision = max(common) / len(own)
        recall = max(part / len(other) for part, other in zip(common, others))
        total = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / total if total else 0.0)
    return scores


def cider(texts: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """(I,) CIDEr of each caption, 0 … 10: similarity of tf-idf vectors of its n-grams with those of its references.

    Rarity is that in these references: a set of one caption has none, and its CIDEr is 0. As in CIDEr-D counts are
    clipped and lengths may not differ; unlike there, length is counted in pairs of words.
    """
    cooked = [[_grams(words) for words in several] for several in references]
    seen = Counter(gram for several in cooked for gram in set().union(*several))
    rarity = {gram: math.log(len(cooked)) - math.log(count) for gram, count in seen.items()}
    unseen = math.log(len(cooked)) if cooked else 0.0
    scores = []
    for text, several in zip(texts, cooked, strict=True):
        own = _Vector(_grams(text), rarity, unseen)
        total = sum(own.similarity(_Vector(other, rarity, unseen)) for other in several)
        scores.append(10 * total / len(several))
    return scores


class _Vector:
    """The tf-idf weights of a caption's n-grams."""

    def __init__(self, grams: Grams, rarity: dict[tuple[str, ...], float], unseen: float) -> None:
        self.weights = {gram: count * rarity.get(gram, unseen) for gram, count in grams.items()}
        squares = [0.0] * ORDERS
        for gram, weight in self.weights.items():
            squares[len(gram) - 1] += weight * weight
        self.norms = [math.sqrt(square) for square in squares]
        self.pairs = sum(count for gram, count in grams.items() if len(gram) == 2)

    def similarity(self, reference: _Vector) -> float:
        """The mean over the orders of clipped cosines, times the penalty for a difference of lengths."""
        products = [0.0] * ORDERS
        for gram, weight in self.weights.items():
            other = reference.weights.get(gram, 0.0)
            products[len(gram) - 1] += min(weight, other) * other
        norms = [own * other for own, other in zip(self.norms, reference.norms)]
        cosines = [product / norm if norm else product for product, norm in zip(products, norms)]
        penalty = math.exp(-((self.pairs - reference.pairs) ** 2) / (2 * SIGMA**2))
        return sum(cosines) / ORDERS * penalty


def _grams(words: Words) -> Grams:
    parts = " ".join(words).split()
    return Counter(tuple(parts[at : at + n]) for n in range(1, ORDERS + 1) for at in range(len(parts) - n + 1))


def _size(grams: Grams) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 1)


def _common(left: Words, right: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        before = 0  # of the row before, one place to the left
        for at, other in enumerate(right, 1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]
