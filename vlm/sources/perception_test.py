"""Perception Test, multiple choice (Pătrăucean et al. 2023, https://arxiv.org/abs/2305.13786): three options.

The published tree is that of Vamos: `{root}/{train,val}.csv` (columns video, num_option, qid, a0, a1, a2, answer,
question; val also start, end), `clipvitl14.pth` (video -> frames at 1 a second) and captions
`llava_v15_{7b,13b}_n6.json` or, as the published code opens them, `llava_{7b,13b}_n6.json`; a record of the latter has
its caption under both names. Where a row has start and end (cup games, stability), the rest of the video gives the
answer away: the question's `span`, with the record's `span_rule` "inside", says that nothing outside of these seconds
may be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.sources.common_questions import find_tree, gather, read_option_table
from vlm.types import Rejected, Sample

CAPTIONS = ("llava_v15_7b_n6.json", "llava_v15_13b_n6.json", "llava_7b_n6.json", "llava_13b_n6.json")
ALSO = {"llava_7b_n6": "llava_v15_7b_n6", "llava_13b_n6": "llava_v15_13b_n6"}
"""The code's name of a caption file -> the README's, which recipes say."""


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `questions` of three options, `captions` by file name, and `features.npy` (frames, width).

    Args:
        root: the folder of the dataset.
        split: train or val.
        annotations: a CSV, a file of features and caption files, each instead of those under `root`; all optional.

    Raises UserError for a file that is missing or damaged as a whole.
    """
    tree = find_tree(
        root,
        annotations,
        questions=(f"{split}.csv",),
        captions=CAPTIONS,
        is_questions=lambda file: file.suffix.lower() == ".csv",
    )
    for name, also in ALSO.items():
        if name in tree.captions:
            tree.captions.setdefault(also, tree.captions[name])
    asked = read_option_table(tree.questions, num_options=3, kinds=None, spans=True)
    yield from gather(asked, tree, fps=1.0, extra={"span_rule": "inside"})
