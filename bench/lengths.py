"""How long the rows of NExT-QA's validation questions are, and how many of them a video has.

    python bench/lengths.py --annotations val.csv --tokenizer pretrained/llama/tokenizer.model

writes bench/data/nextqa_lengths.json: two histograms, no text. `draw` makes questions of these sizes out of random
tokens: questions of a video share instruction, video and caption, options of a question all but the letter.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlm.data.prompts import PromptEncoder
from vlm.data.tokenizers import load_tokenizer
from vlm.data.views import VIEWS, items
from vlm.sources import nextqa
from vlm.sources.common_questions import read_option_table
from vlm.types import Rejected, UserError

HISTOGRAMS = Path(__file__).parent / "data" / "nextqa_lengths.json"

LEAD = 18
"""Tokens before the video."""
# Tokens of the parts of a row, LLaMA 1 and 2: <s> instruction | video | newline | "Video:" caption newline |
# "Question:" text, options | "Answer: The answer is" | " (" letter ")" </s>
LABEL, CUE, LEARNT = 2, 5, 4


class Question(NamedTuple):
    """The rows of one question's options, of equal length; they differ in the letter."""

    video: int  # which video of the drawing
    rows: tuple[tuple[int, ...], ...]  # token ids; the video's places hold 3
    answer: int

    @property
    def length(self) -> int:
        return len(self.rows[0])


def read(path: Path = HISTOGRAMS) -> dict[str, dict[int, int]]:
    """`row_lengths` (tokens without caption, 6 places for video included) and `questions_per_video`: value -> count."""
    stored = json.loads(path.read_text())
    names = ("row_lengths", "questions_per_video")
    return {name: {int(value): count for value, count in stored[name].items()} for name in names}


def draw(
    rng: random.Random,
    counts: Sequence[int],
    *,
    captions: tuple[int, int] | None,
    words: int = 32000,
    num_frames: int = 6,
    options: int = 5,
    shortest: int = 0,
) -> list[Question]:
    """Questions of several videos.

    Args:
        counts: questions of each video.
        captions: least and greatest number of a caption's tokens, one caption a video; None: no captions.
        words: size of the vocabulary; ids 0 to 2 (padding, begin, end) are not drawn.
        shortest: rows of fewer tokens are not drawn.
    """
    histogram = {length: n for length, n in read()["row_lengths"].items() if length >= shortest}
    lengths, weights = list(histogram), list(histogram.values())

    def text(count: int) -> list[int]:
        return [rng.randrange(3, words) for _ in range(count)]

    instruction, newline, label, cue, (bracket, close) = text(LEAD - 1), text(1), text(LABEL), text(CUE), text(2)
    letters = rng.sample(range(3, words), options)
    head = [1, *instruction, *[3] * num_frames, *newline]
    questions = []
    for video, count in enumerate(counts):
        caption = [*label, *text(rng.randint(*captions)), *newline] if captions else []
        for _ in range(count):
            length = rng.choices(lengths, weights)[0]
            body = text(length - len(head) - LABEL - CUE - LEARNT)
            row = [*head, *caption, *label, *body, *cue, bracket]
            rows = tuple((*row, letter, close, 2) for letter in letters)
            questions.append(Question(video, rows, rng.randrange(options)))
    return questions


def measure(annotations: Path, tokenizer: Path) -> dict[str, Any]:
    """The histograms of NExT-QA's published csv, by the encoder that training uses."""
    encoder = PromptEncoder(tokenizer=load_tokenizer(tokenizer), num_video_tokens=6)
    rows: Counter[int] = Counter()
    questions: Counter[str] = Counter()
    for asked in read_option_table(annotations, num_options=5, kinds=nextqa.KINDS):
        if isinstance(asked, Rejected):
            raise UserError(asked.reason)
        questions[asked.video] += 1
        (item,) = items({"questions": [asked.question]})
        rows[len(encoder.encode(VIEWS["answer"](item, item.answer or 0)).ids)] += 1
    return {
        "of": "NExT-QA val.csv, LLaMA 1/2 tokenizer, 6 places for video, no caption, begin and end token included",
        "row_lengths": dict(sorted(rows.items())),
        "questions_per_video": dict(sorted(Counter(questions.values()).items())),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="NExT-QA's val.csv")
    parser.add_argument("--tokenizer", type=Path, required=True, help="LLaMA's tokenizer.model")
    parser.add_argument("--out", type=Path, default=HISTOGRAMS)
    chosen = parser.parse_args(arguments)
    measured = measure(chosen.annotations, chosen.tokenizer)
    chosen.out.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
