"""Has answers in free words judged by a language model: Video-ChatGPT's five aspects, and zero-shot question answering.

python tools/judge.py runs/instruct --aspect correctness detail context --endpoint http://localhost:8000/v1 --model NAME
python tools/judge.py pred_qa.json --aspect qa --endpoint https://HOST/v1 --model NAME --key-env OPENAI_API_KEY
python tools/judge.py pred.json --aspect temporal --dry-run           what would be asked, and roughly how many tokens
python tools/judge.py pred.json --recorded judged.jsonl               score recorded replies again, asking nobody
python tools/judge.py runs/instruct --export pred.json --form general      predictions as the published judges read them

Judgements are added to judged.jsonl in --out; the same command goes on where it was stopped. docs/judge.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.files import write_json
from vlm.metrics.judged import ASPECTS, Item
from vlm.metrics.judged_files import KINDS, items_of_run, published_rows, read_published
from vlm.run.judge import Judge, OpenAICompatible, Recorded
from vlm.run.judging import FIGURES, Outcome, Work, judge, requests_of
from vlm.run.report_judged import line_of
from vlm.run.run_folder import read_predictions
from vlm.types import UserError, Writing

_SHOWN = 3  # prompts of each aspect that --dry-run prints
_LISTED = 10


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", type=Path, metavar="RUN|FILE", help="folder of a run that wrote texts, its "
                        "predictions.jsonl, or a published prediction file (.json)")  # fmt: skip
    parser.add_argument("--aspect", nargs="+", choices=tuple(ASPECTS), metavar="NAME",
                        help=f"what is judged: {', '.join(ASPECTS)} (default: by form or kinds)")  # fmt: skip
    parser.add_argument("--kind", help="of a run, only the texts of this kind")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="of judged.jsonl and judged.json (default: the run; of a file, FILE_judged)")  # fmt: skip
    parser.add_argument("--limit", type=_count, metavar="N", help="only the first N items of each aspect")
    parser.add_argument("--dry-run", action="store_true", help="print requests and their number, and ask nobody")
    group = parser.add_argument_group("the judge")
    group.add_argument(
        "--endpoint", metavar="URL", help="of an OpenAI-compatible server, such as http://localhost:8000/v1"
    )
    group.add_argument("--model", metavar="NAME", help="as the server calls it; with --recorded: whose replies")
    group.add_argument(
        "--key-env", metavar="VARIABLE", help="environment variable that holds the key (default: none is sent)"
    )
    group.add_argument("--temperature", type=_temperature, default=0.0, metavar="T",
                       help="of its sampling; none: the server's own (default: 0)")  # fmt: skip
    group.add_argument("--max-tokens", type=_count, metavar="N", help="longest reply (default: the server's)")
    group.add_argument("--no-json-mode", action="store_true",
                       help="do not send response_format, which some servers refuse")  # fmt: skip
    group.add_argument("--recorded", type=Path, metavar="JUDGED.jsonl", help="take replies from here instead")
    group = parser.add_argument_group("patience")
    group.add_argument("--threads", type=_count, default=4, metavar="N", help="requests at a time (default: 4)")
    group.add_argument("--per-minute", type=float, metavar="N", help="most requests a minute (default: no limit)")
    group.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="of a request (default: 60)")
    group.add_argument("--retries", type=int, default=6, metavar="N",
                       help="times that a request is sent again which found no answer (default: 6)")  # fmt: skip
    group.add_argument("--attempts", type=_count, default=3, metavar="N",
                       help="replies without verdict after which an item is left (default: 3)")  # fmt: skip
    group.add_argument("--again", action="store_true", help="ask again about items that stayed unjudged")
    group = parser.add_argument_group("for other judges")
    group.add_argument("--export", type=Path, metavar="FILE", help="write the predictions in a published form instead")
    group.add_argument("--form", choices=("general", "consistency", "qa"), help="which form (default: general)")
    options = parser.parse_args(arguments)
    for name, without in _said_in_vain(parser, options):
        parser.error(f"--{name.replace('_', '-')} says nothing {without}: leave it out")
    options.form = options.form or "general"
    if not options.dry_run and options.export is None:
        if (options.recorded is None) == (options.endpoint is None):
            parser.error("give --endpoint and --model, or --recorded, or --dry-run")
        if options.endpoint is not None and not options.model:
            parser.error("--endpoint needs --model: scores bear its name")
    for name in ("timeout", "per_minute"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be a number above 0")
    if options.retries < 0:
        parser.error("--retries must be 0 or more")
    return options


_OF_REQUESTS = ("key_env", "temperature", "max_tokens", "no_json_mode", "per_minute", "timeout", "retries")
_OF_JUDGING = ("endpoint", "recorded", "limit", "attempts", "threads", "again", "out", *_OF_REQUESTS)


def _said_in_vain(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(option, without what) of each that was given and would be passed over."""
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    if options.form is not None and options.export is None:
        yield "form", "without --export"
    if options.export is not None:
        yield from ((name, "of an --export") for name in (*_OF_JUDGING, "dry_run") if name in given)
        if options.aspect is not None and len(options.aspect) > 1:
            yield "aspect with several names", "of an --export"
    elif options.recorded is not None:
        yield from ((name, "of recorded replies") for name in _OF_REQUESTS if name in given)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _temperature(text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2, or none")
    return value


# What is judged -------------------------------------------------------------------------------------


def works_of(what: Path, aspects: Sequence[str] | None, kind: str | None) -> list[Work]:
    """The items of a run or a file, for each aspect.

    Raises:
        UserError: the file cannot be read, holds no texts, or does not say what it is to be judged by.
    """
    path = what / "predictions.jsonl" if what.is_dir() else what
    if path.suffix != ".jsonl" or not _is_of_run(path):
        return _works_of_file(path, aspects, kind)
    rows = read_predictions(path)
    writings = [row for row in rows if isinstance(row, Writing)]
    if len(writings) < len(rows):
        raise UserError(f"{path}: its predictions are no answers in free words, so they are not judged but scored")
    if kind is not None:
        found = sorted({row.kind for row in writings})
        writings = [row for row in writings if row.kind == kind]
        if not writings:
            raise UserError(f"{path}: has no texts of the kind {kind!r}; its kinds are {', '.join(map(repr, found))}")
    kinds = {row.kind for row in writings}
    by_kind = kinds <= KINDS.keys()
    if aspects is None:
        if not by_kind:
            raise UserError(f"{path}: does not say what its texts are to be judged by: give --aspect")
        aspects = [name for one in KINDS if one in kinds for name in KINDS[one]]
    works = []
    for name in dict.fromkeys(aspects):
        own = [row for row in writings if not by_kind or name in KINDS[row.kind]]
        items, without = items_of_run(own, pairs=ASPECTS[name].asks_twice)
        if not items:
            why = (
                "answers to compare with are not published" if without else f"its kinds are {', '.join(sorted(kinds))}"
            )
            raise UserError(f"{path}: has no text that is judged by {name} ({why})")
        works.append(Work(aspect=ASPECTS[name], items=tuple(items), file=path, without_answer=tuple(without)))
    return works


def _is_of_run(path: Path) -> bool:
    """Whether JSON lines are rows of a run, not of a published form."""
    try:
        with path.open(encoding="utf-8") as file:
            return '"text"' in file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _works_of_file(path: Path, aspects: Sequence[str] | None, kind: str | None) -> list[Work]:
    if kind is not None:
        raise UserError("--kind is for runs; the published files have no kinds")
    items = read_published(path)
    if aspects is None:
        if len(items[0].questions) == 2:
            aspects = KINDS["consistency"]
        else:
            raise UserError(f"{path}: does not say what its answers are to be judged by: give --aspect")
    return [Work(aspect=ASPECTS[name], items=tuple(items), file=path) for name in dict.fromkeys(aspects)]


def _exported_aspect(options: argparse.Namespace) -> str:
    """An aspect by which the texts that are to be written elsewhere are judged.

    Raises:
        UserError: they are of several kinds, which published judges read from a file each.
    """
    if options.aspect is not None:
        return options.aspect[0]
    if options.form == "consistency":
        return "consistency"
    path = options.what / "predictions.jsonl" if options.what.is_dir() else options.what
    if path.suffix != ".jsonl" or not _is_of_run(path):
        return "qa"
    rows = [row for row in read_predictions(path) if isinstance(row, Writing)]
    kinds = {row.kind for row in rows if options.kind in (None, row.kind)}
    if not kinds or not kinds <= KINDS.keys():
        return "qa"
    asked_once = [kind for kind in KINDS if kind in kinds and kind != "consistency"]
    if len(asked_once) != 1:
        raise UserError(
            f"{path}: its texts are of the kinds {', '.join(sorted(kinds))}, and the form {options.form} holds one: "
            "give --kind, or --form consistency"
        )
    return KINDS[asked_once[0]][0]


def folder_of(options: argparse.Namespace) -> Path:
    """Where the files go."""
    if options.out is not None:
        return options.out
    what: Path = options.what
    if what.is_dir():
        return what
    return what.parent if what.name == "predictions.jsonl" else what.with_name(f"{what.stem}_judged")


# What is done ---------------------------------------------------------------------------------------


def dry_run(works: Sequence[Work], limit: int | None) -> None:
    """Print some requests whole, and how many there are; four characters are taken for a token."""
    total = tokens = 0
    for work in works:
        requests = requests_of(work)[:limit]
        for number, request in enumerate(requests[: limit or _SHOWN], 1):
            print(_printable(f"==== {work.aspect.name} {number} of {len(requests)}: {request.item.key}"))
            print(_printable(f"[system]\n{request.system}\n[user]\n{request.user}\n"))
        total += len(requests)
        tokens += sum(len(one.system) + len(one.user) for one in requests) // 4
    print(f"{total:,} requests, roughly {tokens:,} tokens; replies add some {20 * total:,}")


def _printable(text: str) -> str:
    """Without letters that steer a terminal or that none can show: texts are of strangers."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def export(items: Sequence[Item], file: Path, form: str) -> None:
    rows = published_rows(items, form)
    write_json(file, rows)
    print(f"{file}: {len(rows):,} predictions")


def _judge(options: argparse.Namespace) -> Judge:
    if options.recorded is not None:
        return Recorded(options.recorded, options.model)
    found = OpenAICompatible(
        options.endpoint,
        options.model,
        key_variable=options.key_env,
        temperature=options.temperature,
        json_mode=not options.no_json_mode,
        max_tokens=options.max_tokens,
        timeout=options.timeout,
        retries=options.retries,
        per_minute=options.per_minute,
    )
    if found.is_open:
        print(f"warning: the key goes to {found.name.endpoint} unencrypted; use https", file=sys.stderr)
    return found


def report(outcome: Outcome, folder: Path) -> int:
    """Print the figures; 1 where something is left to be asked."""
    for entry in outcome.entries:
        print(_printable(line_of(entry)))
        for bare in entry["unjudged_items"][:_LISTED]:
            print(_printable(f"  without verdict: {bare['key']}: {bare['problem']}"), file=sys.stderr)
    models = {json.dumps([entry["aspect"], entry["judge"]]) for entry in outcome.entries}
    if len(models) < len(outcome.entries):
        print("the server named several models under one name: figures are apart for each", file=sys.stderr)
    for key, problem in outcome.unanswered[:_LISTED]:
        print(_printable(f"not asked: {key}: {problem}"), file=sys.stderr)
    if outcome.unanswered:
        print(
            f"{len(outcome.unanswered):,} items found no reply; the same command asks about them again", file=sys.stderr
        )
    if outcome.entries:
        print(f"{folder / FIGURES}: written")
    return 1 if outcome.unanswered else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.export is not None:
            works = works_of(options.what, [_exported_aspect(options)], options.kind)
            export(works[0].items, options.export, options.form)
            return 0
        works = works_of(options.what, options.aspect, options.kind)
        if options.dry_run:
            dry_run(works, options.limit)
            return 0
        asked, folder = _judge(options), folder_of(options)
        outcome = judge(
            works,
            asked,
            folder,
            print,
            threads=options.threads,
            attempts=options.attempts,
            limit=options.limit,
            again=options.again,
        )
        return report(outcome, folder)
    except UserError as error:
        print(_printable(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was judged is kept, and the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
