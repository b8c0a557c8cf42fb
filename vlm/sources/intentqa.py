"""IntentQA (Li et al. 2023, ICCV 2023): why and how people act, asked about videos of NExT-QA.

The published tree is that of Vamos and of ViCo: `{root}/{train,val,test}.csv` (NExT-QA's columns, the video under
`video_id`; also action, lemma, lemma_id), `clipvitl14.pth` (video -> frames at 1 a second) and captions
`blip2_n6.json`. Videos are found below the root by name. Papers report on `test`; training is watched on `val`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.sources.common_questions import find_tree, gather, read_option_table
from vlm.types import Rejected, Sample

KINDS = ("CW", "CH", "TN", "TP")
CAPTIONS = ("blip2_n6.json",)


def read(root: Path, split: str, annotations: Sequence[Path] = ()) -> Iterator[Sample | Rejected]:
    """Samples with `questions` of five options, `captions` by file name, and `features.npy` (frames, width).

    Args:
        root: the folder of the dataset.
        split: train, val or test.
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
    yield from gather(read_option_table(tree.questions, num_options=5, kinds=KINDS), tree, fps=1.0)
