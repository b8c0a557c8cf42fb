"""Answers in free words, judged by a language model: what it is asked, and what its replies are worth.

Video-ChatGPT's benchmark (Maaz et al. 2023, https://arxiv.org/abs/2306.05424): five aspects, each a score from 0 to 5,
and zero-shot question answering, a yes or no with such a score. Nothing here asks anybody: `prompts_of` makes the two
messages of a request, `parse` reads a reply, `figures` adds replies up (vlm.run.judge asks; docs/judge.md).
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from vlm.types import UserError

LONGEST_REPLY = 20_000  # characters of a reply that are looked at; a verdict has some twenty
_LONGEST_OBJECT = 2_000  # characters of an object in it that is parsed
_MOST_OBJECTS = 20
LARGEST_SCORE = 5


class Item(NamedTuple):
    """What is judged in one request: a question and what was answered, or two ways to ask for the same thing."""

    key: str
    questions: tuple[str, ...]  # one, or the two of consistency
    answer: str  # as people, or the data set, have it
    predictions: tuple[str, ...]  # what the model wrote, for each question
    video: str = ""
    id: str = ""  # of the question, as its data set calls it


class Aspect(NamedTuple):
    """What a judge is to look at."""

    name: str
    judges: str  # "evaluating … of generative outputs"
    task: str
    rules: tuple[str, ...]
    score: str  # what the score is called
    asks_twice: bool = False  # two questions for one answer
    has_verdict: bool = False  # a yes or no beside the score


class Verdict(NamedTuple):
    """What a reply says."""

    score: float  # 0 … 5, as the judge gave it
    right: bool | None = None  # yes or no, where it is asked for


_SYNONYMS = "Consider synonyms or paraphrases as valid matches."

ASPECTS = {
    aspect.name: aspect
    for aspect in (
        Aspect(
            name="correctness",
            judges="the factual accuracy",
            task="Compare the predicted answer with the correct answer and find out whether they agree in their facts.",
            rules=(
                "Look at the facts: the prediction must state nothing wrong and must not mislead about the video.",
                "What it states may be worded in another way, as long as it is in line with the correct answer.",
                _SYNONYMS,
                "Judge how far the prediction is correct beside the correct answer.",
            ),
            score="factual accuracy",
        ),
        Aspect(
            name="detail",
            judges="the detail orientation",
            task="Compare the predicted answer with the correct answer and find out how much of its detail is there: "
            "whether it is complete, and whether it is specific.",
            rules=(
                "Look for completeness: the prediction must cover all major points of the correct answer.",
                "Look for specifics: particular points of this video count, generic statements do not.",
                _SYNONYMS,
                "Give one score for both, the completeness and the specificity of the prediction.",
            ),
            score="detail orientation",
        ),
        Aspect(
            name="context",
            judges="the contextual understanding",
            task="Compare the predicted answer with the correct answer and find out whether it fits the overall "
            "context of what happens in the video.",
            rules=(
                "Look at the context: the prediction must not be at odds with the main theme of the video.",
                "It must catch what the correct answer is mainly about.",
                _SYNONYMS,
                "Judge how well the prediction understands the context beside the correct answer.",
            ),
            score="contextual understanding",
        ),
        Aspect(
            name="temporal",
            judges="the temporal understanding",
            task="Compare the predicted answer with the correct answer and find out whether it has the events of the "
            "video in their right order.",
            rules=(
                "Look at time: the prediction must keep the sequence of events that the correct answer gives.",
                "Consider synonyms or paraphrases as valid matches, but only if the order of events is kept.",
                "Judge how well the prediction understands time beside the correct answer.",
            ),
            score="temporal accuracy",
        ),
        Aspect(
            name="consistency",
            judges="the consistency",
            task="You are given two questions about the same thing in a video, their common correct answer, and a "
            "predicted answer to each. Find out whether the two predictions say the same, and agree with the "
            "correct answer.",
            rules=(
                "Look at the two predictions together: to similar questions they must give the same information.",
                "Both must be in line with the correct answer, and neither may contradict the other.",
                _SYNONYMS,
                "Judge the consistency of the two predictions beside the correct answer.",
            ),
            score="consistency",
            asks_twice=True,
        ),
        Aspect(
            name="qa",
            judges="the correctness",
            task="Compare the predicted answer with the correct answer and decide whether they mean the same.",
            rules=(
                "Look for a match in meaning between the predicted and the correct answer.",
                _SYNONYMS,
                "Judge whether the prediction is correct beside the correct answer.",
            ),
            score="match",
            has_verdict=True,
        ),
    )
}
"""Every aspect by its name: the five of the benchmark, and `qa` for zero-shot question answering."""


# What a judge is asked --------------------------------------------------------------------------------


def prompts_of(aspect: Aspect, item: Item) -> tuple[str, str]:
    """(system, user): the messages of one request.

    Raises:
        UserError: the item has not as many questions as the aspect asks.
    """
    wanted = 2 if aspect.asks_twice else 1
    if len(item.questions) != wanted or len(item.predictions) != wanted:
        raise UserError(
            f"{item.key}: {len(item.questions)} questions and {len(item.predictions)} predictions, but "
            f"{aspect.name} is judged by {wanted} of each"
        )
    return _system(aspect), _user(aspect, item)


def _system(aspect: Aspect) -> str:
    rules = "".join(f"\n- {rule}" for rule in aspect.rules)
    return (
        f"You are an intelligent chatbot designed for evaluating {aspect.judges} of generative outputs for video-based "
        f"question-answer pairs. {aspect.task}\n------\n##INSTRUCTIONS:{rules}"
    )


def _user(aspect: Aspect, item: Item) -> str:
    if aspect.asks_twice:
        (first, second), (said_first, said_second) = item.questions, item.predictions
        lines = [
            f"Question 1: {first}",
            f"Question 2: {second}",
            f"Correct Answer: {item.answer}",
            f"Predicted Answer to Question 1: {said_first}",
            f"Predicted Answer to Question 2: {said_second}",
        ]
    else:
        lines = [
            f"Question: {item.questions[0]}",
            f"Correct Answer: {item.answer}",
            f"Predicted Answer: {item.predictions[0]}",
        ]
    body = "\n".join(lines)
    return f"Please evaluate the following video-based question-answer pair:\n\n{body}\n\n{_demand(aspect)}"


def _demand(aspect: Aspect) -> str:
    score = f"a {aspect.score} score, an integer value between 0 and {LARGEST_SCORE}, with {LARGEST_SCORE} the best"
    if aspect.has_verdict:
        return (
            f"Give your evaluation as yes or no and {score}. Reply with one JSON object that has the keys "
            '"pred", whose value is the string "yes" or "no", and "score", whose value is that INTEGER. '
            "Write the JSON object alone, no other text and no explanation."
        )
    return (
        f"Give your evaluation as {score}. Reply with one JSON object that has the key "
        '"score", whose value is that INTEGER. Write the JSON object alone, no other text and no explanation.'
    )


def version_of(aspect: Aspect) -> str:
    """Names the wording of an aspect's requests: it changes when a word of them does."""
    questions = ("Q1", "Q2")[: 1 + aspect.asks_twice]
    return digest_of(*prompts_of(aspect, Item("", questions, "A", questions)))[:12]


def digest_of(system: str, user: str) -> str:
    """Names one request (sha256, 64 hex digits)."""
    return hashlib.sha256(json.dumps([system, user]).encode()).hexdigest()


# What it replies --------------------------------------------------------------------------------------


def parse(aspect: Aspect, reply: str) -> Verdict:
    """The verdict that a reply holds: as JSON, or as the Python dictionary that the published prompts ask for, also
    with their doubled quotes (`{''score': 4.8}`). Text around it is passed over, and so are thoughts
    (`<think>…</think>`). Nothing is evaluated but literals.

    Raises:
        ValueError: there is no verdict in it, two that differ, or one that is no score from 0 to 5: what is wrong.
    """
    text = reply[:LONGEST_REPLY].rpartition("</think>")[2].partition("<think>")[0]
    objects = re.findall(r"\{[^{}]*\}", text)
    if not objects:
        raise ValueError(f"no object in {_short(reply)}")
    if len(objects) > _MOST_OBJECTS:
        raise ValueError(f"{len(objects)} objects in one reply")
    verdicts, problem = [], ""
    for one in objects:
        try:
            verdicts.append(_verdict(aspect, _literal(one)))
        except ValueError as error:
            problem = problem or str(error)
    if not verdicts:
        raise ValueError(problem)
    if len(set(verdicts)) > 1:
        raise ValueError(f"verdicts that differ in {_short(reply)}")
    return verdicts[0]


def _literal(text: str) -> dict[Any, Any]:
    """An object of JSON, or a dictionary of Python's literals."""
    if len(text) > _LONGEST_OBJECT:
        raise ValueError(f"an object of {len(text)} characters")
    readings = (
        lambda: json.loads(text, object_pairs_hook=_once),
        lambda: _python(text),
        lambda: _python(re.sub(r"''(\w+)'", r"'\1'", text)),
    )
    for read in readings:
        try:
            value = read()
        except _Twice:
            raise
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict):
            return value
    raise ValueError(f"neither JSON nor a dictionary: {_short(text)}")


class _Twice(ValueError):
    pass


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise _Twice("an object that has a key twice")
    return dict(pairs)


def _python(text: str) -> Any:
    """A literal of Python's; of a dictionary its pairs, so that a key that comes twice is seen."""
    found = ast.parse(text.strip(), mode="eval").body
    if not isinstance(found, ast.Dict):
        return None
    return _once(
        [(ast.literal_eval(key or found), ast.literal_eval(value)) for key, value in zip(found.keys, found.values)]
    )


def _verdict(aspect: Aspect, value: dict[Any, Any]) -> Verdict:
    score = value.get("score")
    if isinstance(score, str) and re.fullmatch(r"\s*\d(?:\.\d+)?\s*", score):
        score = float(score)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= LARGEST_SCORE:
        raise ValueError(f"its score is {_short(repr(score))}, not a number from 0 to {LARGEST_SCORE}")
    if not aspect.has_verdict:
        return Verdict(float(score))
    said = str(value.get("pred")).strip().rstrip(".!").lower()
    if said not in ("yes", "no"):
        raise ValueError(f"its pred is {_short(repr(value.get('pred')))}, not yes or no")
    return Verdict(float(score), said == "yes")


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r} …"


# What the replies are worth ---------------------------------------------------------------------------


def figures(aspect: Aspect, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What replies about one aspect add up to; nothing of a judgement that is not there.

    Returns: `judged`, how many there are; `score`, their mean as the judge gave them; `score_int`, the mean of their
        whole parts, which the published scripts report (int() of 4.8 is 4; the same where the judge kept to integers);
        `scores`, how many have each whole part; for `qa` also `accuracy`, yes / (yes + no), as a fraction, and both
        counts. Means are None where nothing was judged.
    """
    scores = [verdict.score for verdict in verdicts]
    whole = Counter(int(score) for score in scores)
    found: dict[str, Any] = {
        "judged": len(scores),
        "score": _mean(scores),
        "score_int": _mean([int(score) for score in scores]),
        "scores": {str(score): whole[score] for score in range(LARGEST_SCORE + 1)},
    }
    if aspect.has_verdict:
        yes = sum(verdict.right is True for verdict in verdicts)
        found |= {"accuracy": yes / len(verdicts) if verdicts else None, "yes": yes, "no": len(verdicts) - yes}
    return found


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 9) if values else None
