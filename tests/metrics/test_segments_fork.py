"""Texts of another project, read as far as they can be read, and its figures with what is odd about them."""

from __future__ import annotations

import math
import random

import pytest

from vlm.metrics import segments_fork as fork
from vlm.types import Segmentation

TRUTH = "1-5 SIL \n\n5-9 stir_milk \n\n9-11 SIL \n"


def sample(pred: str, truth: str = TRUTH) -> fork.Sample:
    return fork.Sample("a", truth, pred)


def test_read() -> None:
    truth, said = fork.read(sample("1-3 SIL \nno line\n3-4-5 cut\n2 to 9 cut\n5-8 stir milk\n7-20 take  it\n9-4 cut"))
    assert fork.spans_of(truth) == [(0, 4, "SIL"), (4, 8, "stir_milk"), (8, 10, "SIL")]
    assert fork.spans_of(said) == [(0, 2, "SIL"), (4, 6, "stir_milk"), (6, 10, "take__it")]
    assert said[2:4] == [fork.UNSAID] * 2


def test_numbers_below_one_count_from_the_end_in_that_project_alone() -> None:
    said = sample("1-0 SIL\n0-3 stir milk")
    assert fork.spans_of(fork.read(said, slices=True)[1]) == [(0, 9, "SIL")]
    assert fork.spans_of(fork.read(said)[1]) == [(0, 2, "stir_milk")]
    figures = fork.figures_of(said)
    assert figures is not None
    assert figures["fork_mof"] == 0.5


@pytest.mark.parametrize("truth", ["", "nothing", "1-x SIL", "1-1 SIL", f"1-{10**12} SIL"])
def test_a_truth_without_an_end(truth: str) -> None:
    with pytest.raises(ValueError, match=r"truth|invalid literal"):
        fork.read(sample("1-3 SIL", truth))
    assert fork.figures_of(sample("1-3 SIL", truth)) is None


def test_a_video_of_which_nothing_can_be_read_is_left_out() -> None:
    good, bad = sample("1-11 SIL"), sample("I cannot see it.")
    assert fork.figures_of(bad) is None
    figures = fork.score([good, bad, bad])
    assert figures["fork_errors"] == 2
    assert figures["fork_mof"] == 0.6
    assert "fork_spearman" not in figures  # of one label alone there is none
    assert fork.score([bad]) == {"fork_errors": 1}


def test_figures_by_hand() -> None:
    """Ten frames: 0-3 and 8-9 SIL, 4-7 stir_milk; nothing is said of the last, and the last stretch is short."""
    figures = fork.figures_of(sample("1-4 SIL\n4-10 stir milk"))
    assert figures is not None
    truth, said = ["SIL"] * 4 + ["stir"] * 4 + ["SIL"] * 2, ["SIL"] * 3 + ["stir"] * 6 + [""]
    assert figures["fork_mof"] == sum(a == b for a, b in zip(truth, said)) / 10
    assert figures["fork_mean_f1"] == pytest.approx(0.6 * (2 * 3 / (6 + 3)) + 0.4 * (2 * 4 / (4 + 6)))
    assert figures["fork_action_accuracy"] == 1
    assert figures["fork_edit"] == pytest.approx(2 / 3)
    assert figures["fork_f1_25"] == pytest.approx(2 * 2 / (3 + 2), abs=1e-9)  # (0, 3) and (3, 9) claim (0, 4), (4, 8)


def test_figures_of_frames_are_their_definitions() -> None:
    """F1 by class, shares and rank correlation, against the definitions frame by frame."""
    draw = random.Random(1)
    for _ in range(100):
        borders = sorted(draw.sample(range(2, 40), 4))
        names = [draw.choice("abc") for _ in borders]
        truth = "\n\n".join(f"{a}-{b} {name}" for a, b, name in zip([1, *borders], borders, names))
        pred = "\n".join(f"{draw.randint(1, 20)}-{draw.randint(15, 45)} {draw.choice('abcd')}" for _ in range(3))
        figures = fork.figures_of(sample(pred, truth))
        y, p = fork.read(sample(pred, truth), slices=True)
        if figures is None:
            assert set(p) == {fork.UNSAID}
            continue
        assert figures["fork_mof"] == pytest.approx(sum(a == b for a, b in zip(y, p)) / len(y))
        assert figures["fork_mean_f1"] == pytest.approx(
            sum(
                y.count(name) / len(y) * 2 * sum(a == b == name for a, b in zip(y, p)) / (y.count(name) + p.count(name))
                for name in set(y)
            )
        )
        ranks = [[sum(b < a for b in side) + (side.count(a) + 1) / 2 for a in side] for side in (y, p)]
        mean = (len(y) + 1) / 2
        products = [sum((a - mean) * (b - mean) for a, b in zip(*pair)) for pair in
                    (ranks, (ranks[0], ranks[0]), (ranks[1], ranks[1]))]  # fmt: skip
        if products[1] and products[2]:
            expected = products[0] / math.sqrt(products[1] * products[2])
            assert figures["fork_spearman"] == pytest.approx(expected)
        else:
            assert math.isnan(figures["fork_spearman"])


def test_rows_as_texts() -> None:
    """Breakfast's own lines: each begins with the frame that ends the one before."""
    row = Segmentation(
        key="a", text="", num_frames=12, truth=[(0, 5, "SIL"), (5, 9, "stir_milk"), (9, 11, "SIL")],
        prediction=[(0, 5, "SIL"), (5, 9, "stir_milk"), (9, 11, "SIL")],
    )  # fmt: skip
    written = fork.sample_of(row)
    assert written.truth == TRUTH
    assert written.pred == "1-5 SIL\n5-9 stir milk\n9-11 SIL"
    figures = fork.figures_of(written)
    assert figures is not None
    assert figures["fork_mof"] == figures["fork_edit"] == 1
