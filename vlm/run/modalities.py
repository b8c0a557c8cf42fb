"""Every rank runs the same modules in the same order in every micro-step, whatever its samples hold.

ZeRO-3 gathers a module's weights when the module runs, so all ranks must run it; ZeRO-2 sums gradients in the order in
which they arise. Where one rank's micro-batch has a video and another's has text alone, the ranks then wait for each
other for ever, or sum what does not belong together (DeepSpeed issues 7170, 7998, 8262). So the engine makes every
micro-batch whole before a step, for every system that reads text:

* It has no video: it gets the blank one of the recipe's inputs, for which no row has a place. All that makes video
  tokens runs on it, and gets gradients that are exactly 0, since nothing is taken from what it made.
* It has no rows of a view that the recipe weighs: it gets a row of one token, of which nothing is to be learnt.
* A rank has fewer micro-batches than the step, or none: blank ones with weight 0 fill it up.

Always, and not only in steps in which another rank has a video. To know that would cost nothing (the counts of a step
travel between ranks anyway), but:

* ZeRO-3 records in which order modules run and fetches weights ahead by that record. A pass in another order throws it
  away: that pass fetches as it goes, the next records, and only the one after is ahead again (DeepSpeed's "Invalidate
  trace cache"). With modalities at random there would hardly ever be a valid record.
* What has no gradient at all Adam passes over at stage 0, but from stage 1 on it decays it and moves it by its moments,
  as if the gradient were 0. A step would depend on the stage, and on who shares it.

So one order and zeros everywhere; the price is the video path on one blank video where a micro-batch has none. What no
blank can mend is told before the first module runs, by all ranks together (`check`).

What a system must do for this: make video tokens (`encode_video`) by the same calls of modules whatever number of
videos and frames there is, so never in a loop over videos.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlm.data.loader import MicroBatch
from vlm.data.packing import pack
from vlm.data.rng import SampleRng
from vlm.distributed import World, gather_objects
from vlm.types import IGNORE, Batch, Row, UserError

VIDEO = ("video", "features", "frames", "frame_tokens")
"""Fields of a batch, one of which a batch with video has."""


class Blank:
    """What a recipe's inputs give where there is nothing: made when it is first needed, and then once."""

    def __init__(self, inputs: Any) -> None:
        """
        Args:
            inputs: of a recipe, with `blank`, `test_batch` and `collate`; None: there is nothing to give.
        """
        self.inputs = inputs
        self._media: Batch | None = None

    def complete(self, batch: Batch) -> Batch:
        """A batch of text that has a video, where these inputs know of any; and with it passages to choose from."""
        if self.inputs is None or any(getattr(batch, name) is not None for name in VIDEO):
            return batch
        if self._media is None:
            self._media = self.inputs.test_batch([self.inputs.blank()])
        given = {name: getattr(self._media, name) for name in (*VIDEO, "frame_counts", "extra", "colours")}
        return replace(batch, passages=batch.passages or self._media.passages, **given)

    def clips(self) -> Batch:
        """A training batch of a system that knows no text, to be weighed 0."""
        if self.inputs is None:
            raise UserError("a process has no samples for this step, and the recipe has no inputs that give blank ones")
        # two, since mixup pairs clips
        return self.inputs.collate([replace(self.inputs.blank(), label=0)] * 2, SampleRng(0))


class Modalities:
    """Makes the micro-batches of a step whole."""

    def __init__(
        self, reads_text: bool, inputs: Any, views: Mapping[str, float], micro_steps: int, world: World
    ) -> None:
        """
        Args:
            reads_text: of the system.
            inputs: of the recipe. views: the losses that it weighs.
            micro_steps: micro-batches of a step.
        """
        self.reads_text, self.views, self.micro_steps, self.world = reads_text, views, micro_steps, world
        self.blank = Blank(inputs)
        self._nothing = pack([Row((0,), (IGNORE,))], 1)

    def complete(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """This rank's micro-batches of a step, as many and as whole as every other rank's."""
        assert len(micro_batches) <= self.micro_steps, f"{len(micro_batches)} micro-batches of {self.micro_steps}"
        missing = self.micro_steps - len(micro_batches)
        if not self.reads_text:
            filled = [MicroBatch(self.blank.clips(), 0)] * missing if missing else []
            return [*micro_batches, *filled]
        every = [*micro_batches, *[MicroBatch(Batch(keys=()), 0)] * missing]
        return [MicroBatch(self._whole(item.batch), item.weight) for item in every]

    def _whole(self, batch: Batch) -> Batch:
        batch = self.blank.complete(batch)
        # in the order of the recipe: losses with modules of their own must run in one order too
        views = {name: batch.views.get(name, self._nothing) for name in self.views}
        return replace(batch, views={**views, **batch.views})  # the engine refuses by name what the recipe has not

    # ------------------------------------------------------------------------------------------ what no blank can mend

    def marks(self, micro_batches: Sequence[MicroBatch]) -> list[float]:
        """Two numbers for each micro-batch, to be summed over all ranks for `check`."""
        found = [float(_mark(item.batch)) for item in micro_batches]
        return [*found, *[mark * mark for mark in found]]

    def check(self, micro_batches: Sequence[MicroBatch], summed: Sequence[float]) -> None:
        """UserError on all ranks if their micro-batches would run different modules.

        Marks are equal where their variance is 0; whole numbers of 20 bits, so exact for thousands of ranks.
        """
        size, steps = self.world.size, len(micro_batches)
        wrong = [n for n in range(steps) if int(summed[n]) ** 2 != size * int(summed[steps + n])]
        if not wrong:
            return
        batch = micro_batches[wrong[0]].batch
        told = gather_objects(f"{_kind(batch)} ({', '.join(batch.keys[:3]) or 'no sample'})")
        listed = "; ".join(f"rank {rank}: {kind}" for rank, kind in enumerate(told or []))
        raise UserError(
            f"in micro-batch {wrong[0] + 1} of this step ranks would run different modules, and wait for each other "
            f"for ever: {listed or 'rank 0 lists them'}. Mend: let blank() of the recipe's inputs "
            f"({type(self.blank.inputs).__name__}) give everything that a sample can have"
        )


def _kind(batch: Batch) -> str:
    """What decides which modules run."""
    parts = [name for name in (*VIDEO, "passages") if getattr(batch, name) is not None]
    return ", ".join([*(parts or ["no video"]), *sorted(batch.extra), *(f"view {name}" for name in batch.views)])


def _mark(batch: Batch) -> int:
    return zlib.crc32(_kind(batch).encode()) & 0xFFFFF
