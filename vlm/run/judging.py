"""Predictions, a judge, and what is kept: judged.jsonl (a row for each judgement, only ever added to) and judged.json
(figures for each aspect and judge, made from the rows).

A row says who judged (model, endpoint, settings, and the model that the server named), by which wording, which request,
when, what was replied and what that was taken to be. The same command goes on where it was stopped. An item whose
replies hold no verdict has a row too, without score; figures say over how many they are.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from vlm.files import sole_writer, write_json
from vlm.metrics.judged import (
    LARGEST_SCORE,
    LONGEST_REPLY,
    Aspect,
    Item,
    Verdict,
    digest_of,
    figures,
    parse,
    prompts_of,
    version_of,
)
from vlm.run.judge import Judge, JudgeName, Refused, Unanswered, now
from vlm.run.run_folder import read_json, read_rows
from vlm.types import UserError

ROWS, FIGURES = "judged.jsonl", "judged.json"
_IN_HAND = 2  # requests that are made out for each thread
_Asked = Future[tuple[dict[str, Any] | None, str]]
_SAID_EVERY = 10.0  # seconds
_REFUSED = "refused"
_MOST_WITHOUT = 20  # items in a row whose replies hold no verdict, after which the run stops


@dataclass(frozen=True, kw_only=True)
class Work:
    """The items of a file that are judged by one aspect."""

    aspect: Aspect
    items: tuple[Item, ...]
    file: Path  # that they are from
    without_answer: tuple[str, ...] = ()  # rows of it that nothing is known to be right for


class Request(NamedTuple):
    """One item, as it is asked about."""

    aspect: Aspect
    item: Item
    system: str
    user: str
    asked: str

    @property
    def name(self) -> tuple[str, str, str]:
        return self.aspect.name, self.item.key, self.asked


def requests_of(work: Work) -> list[Request]:
    """What is asked about the items of one aspect, in order."""
    found = []
    for item in work.items:
        system, user = prompts_of(work.aspect, item)
        found.append(Request(work.aspect, item, system, user, digest_of(system, user)))
    return found


class Outcome(NamedTuple):
    """What came of a call: entries of judged.json, and items that found no reply."""

    entries: list[dict[str, Any]]
    unanswered: list[tuple[str, str]]  # key, why


def judge(
    works: Sequence[Work],
    asked: Judge,
    folder: Path,
    say: Callable[[str], None],
    *,
    threads: int = 4,
    attempts: int = 3,
    limit: int | None = None,
    again: bool = False,
) -> Outcome:
    """Ask about every item that this judge has not judged yet, and write both files.

    Args:
        attempts: requests about one item until a reply holds a verdict.
        limit: only the first items of each aspect are asked about; the figures say how many were not.
        again: ask again about items that stayed without verdict.

    Raises:
        UserError: the judge cannot be asked at all; what it said before is kept.
    """
    with sole_writer(folder, "give another --out"):
        path = folder / ROWS
        _mend_end(path)
        known = {} if not path.exists() else _known(read_judged(path), asked.name, again=again)
        todo = [
            one for work in works for one in requests_of(work)[: len(work.items) if limit is None else limit]
            if one.name not in known
        ]  # fmt: skip
        say(f"{len(todo):,} items for {asked.name}; {len(known):,} were judged before")
        unanswered = _ask_all(todo, asked, path, say, threads, attempts)
        rows = read_judged(path) if path.exists() else []
        entries = [entry for work in works for entry in entries_of(work, rows, asked.name)]
        _add_entries(folder / FIGURES, entries)
    return Outcome(entries, unanswered)


# Asking -----------------------------------------------------------------------------------------------


def _ask_all(
    todo: Sequence[Request], judge: Judge, path: Path, say: Callable[[str], None], threads: int, attempts: int
) -> list[tuple[str, str]]:
    """Adds a row for each item that got a reply; returns those that got none, with why."""
    unanswered: list[tuple[str, str]] = []
    stop = _Patience(judge, path)
    told = time.monotonic()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="judge")
    running: dict[_Asked, Request] = {}
    with path.open("a", encoding="utf-8") as file:
        try:
            for number, (request, future) in enumerate(
                _finished(pool, todo, lambda one: _row(one, judge, attempts), running, threads * _IN_HAND), 1
            ):
                row, problem = future.result()
                if row is not None:
                    _keep(file, row)
                else:
                    unanswered.append((request.item.key, problem))
                stop.check(row, problem)
                if time.monotonic() - told > _SAID_EVERY:
                    told = time.monotonic()
                    say(f"  {number:,} of {len(todo):,}")
        finally:
            judge.close()
            pool.shutdown(wait=True, cancel_futures=True)
            for future in running:  # a reply that came while the run was ended is kept too
                if not future.cancelled() and future.exception() is None:
                    row, _ = future.result()
                    if row is not None:
                        _keep(file, row)
    return unanswered


def _keep(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


@dataclass
class _Patience:
    """Ends a run that comes to nothing."""

    judge: Judge
    path: Path
    without_reply: int = 0
    without_verdict: int = 0

    def check(self, row: dict[str, Any] | None, problem: str) -> None:
        """Takes note of the outcome of one item. UserError: too many in a row were in vain."""
        self.without_reply = self.without_reply + 1 if problem else 0
        bare = row is not None and row["score"] is None and not problem
        self.without_verdict = self.without_verdict + 1 if bare else 0
        if self.judge.patience is None:
            return
        if self.without_reply >= self.judge.patience:
            raise UserError(
                f"{self.judge.name.endpoint}: {self.without_reply} requests in a row had no success, the last one: "
                f"{problem}; what was judged before is in {self.path}, and the same command goes on"
                f"{' (with --again, about these too)' if problem.startswith(_REFUSED) else ''}"
            )
        if row is not None and self.without_verdict >= _MOST_WITHOUT:
            raise UserError(
                f"{self.judge.name}: no verdict in the replies about {self.without_verdict} items in a row, the last "
                f"one: {row['problem']}; is this model fit to judge? Replies are in {self.path}"
            )


def _finished(
    pool: ThreadPoolExecutor,
    todo: Sequence[Request],
    call: Callable[[Request], tuple[dict[str, Any] | None, str]],
    running: dict[_Asked, Request],
    most: int,
) -> Iterator[tuple[Request, _Asked]]:
    """Requests as they are done; those in hand, no more than `most`, stand in `running`."""
    waiting = iter(todo)
    while True:
        for request in waiting:
            running[pool.submit(call, request)] = request
            if len(running) >= most:
                break
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future


def _row(request: Request, judge: Judge, attempts: int) -> tuple[dict[str, Any] | None, str]:
    """(the row of one item; None: no reply came, why there is no reply; "" where there is one)."""
    reply, verdict, problem, refused = None, None, "", ""
    asked = 0
    while verdict is None and asked < attempts:
        asked += 1
        try:
            reply = judge.ask(request.system, request.user)
            verdict = parse(request.aspect, reply)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            problem = str(error)
        except Refused as error:
            problem = refused = f"{_REFUSED}: {error}"
            break
        except Unanswered as error:
            return None, str(error)
    return {
        "aspect": request.aspect.name,
        "key": request.item.key,
        "video": request.item.video,
        **({"score": None} if verdict is None else _said(verdict)),
        "judge": asdict(judge.name),
        "answered_by": getattr(reply, "model", ""),
        "prompts": version_of(request.aspect),
        "asked": request.asked,
        "date": getattr(reply, "date", "") or now(),
        "attempts": asked,
        "reply": (reply or "")[:LONGEST_REPLY],
        "problem": "" if verdict is not None else problem,
    }, refused


def _said(verdict: Verdict) -> dict[str, Any]:
    return {"score": verdict.score} | ({} if verdict.right is None else {"right": verdict.right})


# What is kept -----------------------------------------------------------------------------------------


def read_judged(path: Path) -> list[dict[str, Any]]:
    """The rows of a judged.jsonl. UserError for a damaged line."""
    damaged: list[str] = []
    rows = read_rows(path, damaged)
    if damaged:
        raise UserError(f"{path.parent}: {damaged[0]}; take this line out, and what it judged is asked about again")
    for row in rows:
        score = row.get("score", "missing")
        good = type(score) in (int, float) and 0 <= score <= LARGEST_SCORE
        if not (score is None or good) or not isinstance(row.get("date"), str):
            raise UserError(
                f"{path}: the row of {str(row.get('key'))[:100]!r} has the score {repr(score)[:30]} and the date "
                f"{repr(row.get('date'))[:30]}; take this line out, and what it judged is asked about again"
            )
    return rows


def _mend_end(path: Path) -> None:
    """Take away the half line of a process that was killed while it wrote; its item is asked about again."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _known(rows: Sequence[dict[str, Any]], name: JudgeName, *, again: bool) -> dict[tuple[str, str, str], Any]:
    """The rows of one judge by aspect, key and request; of several, the last."""
    own = asdict(name)
    mine = [row for row in rows if row.get("judge") == own]
    last = {(str(row.get("aspect")), str(row.get("key")), str(row.get("asked"))): row for row in mine}
    return {key: row for key, row in last.items() if not again or row.get("score") is not None}


def entries_of(work: Work, rows: Sequence[dict[str, Any]], name: JudgeName) -> list[dict[str, Any]]:
    """The figures of one aspect by one judge, from the rows about its present items; apart for each model that the
    server named, since a name may come to mean another model.

    Rows about other predictions than those of `work`, or by another wording, do not count.
    """
    known = _known(rows, name, again=False)
    found = [(request, known.get(request.name)) for request in requests_of(work)]
    having = [row for _, row in found if row is not None]
    models = sorted({str(row.get("answered_by", "")) for row in having} - {""}) or [""]
    return [_entry(work, name, model, [(request, row) for request, row in found]) for model in models if having]


def _entry(
    work: Work, name: JudgeName, model: str, found: Sequence[tuple[Request, dict[str, Any] | None]]
) -> dict[str, Any]:
    own = [(one, row) for one, row in found if row is not None and row.get("answered_by") in (model, "")]
    judged = [row for _, row in own if row["score"] is not None]
    bare = [(one.item.key, str(row["problem"])) for one, row in own if row["score"] is None]
    dates = sorted(str(row["date"]) for _, row in own)
    return {
        "aspect": work.aspect.name,
        "judge": asdict(name),
        "answered_by": model,
        "prompts": version_of(work.aspect),
        "first": dates[0],
        "last": dates[-1],
        "predictions": {"file": str(work.file), "sha256": hashlib.sha256(work.file.read_bytes()).hexdigest()},
        "items": len(found),
        **figures(work.aspect, verdicts_of(judged)),
        "unjudged": len(bare),
        "not_asked": len(found) - len(own),
        "without_answer": len(work.without_answer),
        "unjudged_items": [{"key": key, "problem": problem} for key, problem in bare],
    }


def verdicts_of(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """What rows of one judge say.

    Raises:
        UserError: they are of several judges, or by several wordings: their mean would mean nothing.
    """
    for what in ("judge", "answered_by", "prompts", "aspect"):
        values = sorted({json.dumps(row.get(what), sort_keys=True) for row in rows})
        if len(values) > 1:
            raise UserError(f"scores that do not go together, since their {what} differs: {' and '.join(values)}")
    return [Verdict(row["score"], row.get("right")) for row in rows]


def _add_entries(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Into judged.json, in the place of earlier ones of the same aspect, judge and wording."""

    def name(entry: dict[str, Any]) -> str:
        return json.dumps([entry.get("aspect"), entry.get("judge"), entry.get("prompts")], sort_keys=True)

    new = {name(entry) for entry in entries}
    before = read_json(path).get("judged") if path.exists() else []
    if not isinstance(before, list):
        raise UserError(f"{path}: has no list `judged`; take it away, and the same command makes it from {ROWS}")
    kept = [entry for entry in before if isinstance(entry, dict) and name(entry) not in new]
    if entries or kept:
        write_json(path, {"judged": [*kept, *entries]})
