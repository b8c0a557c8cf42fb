"""NExT-QA, multiple choice (Xiao et al. 2021, https://arxiv.org/abs/2105.08276): why, how, before, after, what, where.

The published tree is that of Vamos and of ViCo: `{root}/{train,val,test}.csv` (columns video, question, answer, qid,
type, a0 … a4), `clipvitl14.pth` (video -> frames at 1 a second) and captions `llava_v15_{7b,13b}_n6.json`. Videos are
found below the root by name (`2909445186.mp4`), also in VidOR's folders. The CSV whose answers are texts of options
(NExT-GQA's) is read too. Papers report on `val`, by the first letter of the kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.sources.common_questions import find_tree, gather, read_option_table
from vlm.types import Rejected, Sample

KINDS = ("CH", "CW", "TN", "TC", "TP", "DL", "DC", "DO")
CAPTIONS = ("llava_v15_7b_n6.json", "llava_v15_13b_n6.json")


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
