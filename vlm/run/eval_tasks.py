"""What a test asks, by the task of a recipe's inputs: how records go through the model, and the row that each thing
asked becomes in predictions.jsonl.

    task = task_of(recipe, engine, world)
    rows = task.rows(items, probes)

Every rank makes the same number of passes over the same modules, whatever its records hold (ZeRO-3 gathers weights in
each): a rank with nothing left runs the inputs' blank example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vlm.data.loader import TestItem
from vlm.distributed import World, sum_over_ranks
from vlm.metrics.classify import mean_probabilities
from vlm.metrics.segment_answers import class_name, read_answer
from vlm.models.generation import generate
from vlm.recipe import Recipe
from vlm.run.modalities import Blank
from vlm.types import Ask, Batch, Example, Prediction, Segmentation, Span, UserError, Writing


@dataclass
class Task:
    """Base of all. `engine` is vlm.run.engine.Engine, or anything with `model` and `deepspeed`."""

    recipe: Recipe
    engine: Any
    world: World

    def __post_init__(self) -> None:
        self.blank = Blank(self.recipe.inputs)

    def problem(self, ask: Ask) -> UserError | None:
        """Why something cannot be asked of a model."""
        if ask.truth is not None:
            return None
        return UserError(
            f"{ask.key} has no published answer or label, so it cannot be scored; use a labelled split (eval.shards)"
        )

    def rows(self, items: Sequence[TestItem], probes: Sequence[str]) -> list[Any]:
        """The rows of a few records, a pass (or several) for each condition; every rank calls it equally often."""
        answers = {condition: self.answers(items, condition) for condition in ("", *probes)}
        asked = [(item, ask) for item in items for ask in item.asks]
        for condition, several in answers.items():
            assert len(several) == len(asked), f"{len(several)} answers to {len(asked)} ({condition or 'test'})"
        return [
            self.row(item, ask, {condition: several[number] for condition, several in answers.items()})
            for number, (item, ask) in enumerate(asked)
        ]

    def answers(self, items: Sequence[TestItem], condition: str) -> list[Any]:
        """What the model made of each thing asked of these records, in order."""
        raise NotImplementedError

    def row(self, item: TestItem, ask: Ask, own: dict[str, Any]) -> Any:
        """The row of one thing asked, from what the model made of it under each condition ("": the test itself)."""
        raise NotImplementedError

    def batch(self, examples: Sequence[Example]) -> Batch:
        """A test batch of these, or of the blank example, on this rank's device; one of text gets what it lacks."""
        inputs = self.recipe.inputs
        batch = inputs.test_batch(list(examples) or [inputs.blank()])
        return (self.blank.complete(batch) if self.engine.model.reads_text else batch).to(self.world.device)

    def scores(self, items: Sequence[TestItem], condition: str) -> np.ndarray:
        """(rows, K) scores of all examples of these records."""
        examples = [example for item in items for example in item.views[condition]]
        return self.engine.model.predict(self.batch(examples)).float().cpu().numpy()


class Classes(Task):
    """A clip is of one class; its views are averaged."""

    def answers(self, items: Sequence[TestItem], condition: str) -> list[np.ndarray]:
        """(K,) probabilities of each record."""
        scores = self.scores(items, condition)
        counts = [len(item.views[condition]) for item in items]
        assert not items or sum(counts) == len(scores)
        parts = np.split(scores, np.cumsum(counts)[:-1]) if items else []
        return [mean_probabilities(part) for part in parts]

    def row(self, item: TestItem, ask: Ask, own: dict[str, np.ndarray]) -> Prediction:
        return _prediction(ask, own)


class Choices(Task):
    """Each question of a record has options, of which one is right."""

    def answers(self, items: Sequence[TestItem], condition: str) -> list[np.ndarray]:
        """(options,) scores of each question."""
        scores = self.scores(items, condition)
        asks = [ask for item in items for ask in item.asks]
        assert not items or len(asks) == len(scores)
        return [row[: len(ask.options) or None] for ask, row in zip(asks, scores)]

    def row(self, item: TestItem, ask: Ask, own: dict[str, np.ndarray]) -> Prediction:
        row = _prediction(ask, own)
        row.kind, row.video, row.id = ask.kind, item.key, ask.id
        row.question, row.options = ask.question, list(ask.options)
        return row


class Texts(Task):
    """Base of the two in which the model writes."""

    def answers(self, items: Sequence[TestItem], condition: str) -> list[str]:
        """The text for each prompt of each record; at most eval.batch_size are written together."""
        config, inputs = self.recipe.eval, self.recipe.inputs
        assert config is not None
        assert config.generation is not None
        keys = iter([ask.key for item in items for ask in item.asks])
        groups = list(_groups([e for item in items for e in item.views[condition]], config.batch_size))
        texts = []
        for number in range(self._most(len(groups))):
            group = groups[number] if number < len(groups) else []
            batch = self.batch(group)
            assert batch.prompts is not None
            names = [next(keys) for example in group for _ in example.prompts]
            ids = generate(
                self.engine.model,
                batch,
                config.generation,
                ends=inputs.ends,
                seed=self.recipe.seed,
                keys=names or [""] * len(batch.prompts.lengths),
            )
            texts += [inputs.decode(one).strip() for one in ids[: len(names)]]
        return texts

    def _most(self, groups: int) -> int:
        """The largest number of groups that any rank has, and one at least."""
        own = [float(groups) if rank == self.world.rank else 0.0 for rank in range(self.world.size)]
        return max(1, int(max(sum_over_ranks(own, self.world.device))))


class Captions(Texts):
    """Texts are to be written, with or without others' to compare them with."""

    def problem(self, ask: Ask) -> UserError | None:
        return None

    def row(self, item: TestItem, ask: Ask, own: dict[str, str]) -> Writing:
        return Writing(
            key=ask.key,
            text=own[""],
            references=list(ask.references),
            kind=ask.kind or "",
            video=item.key,
            id=ask.id,
            question=ask.question,
            probes={condition: text for condition, text in own.items() if condition},
        )


class Segments(Texts):
    """What happens when in each video is to be written, in lines that are then read strictly."""

    def problem(self, ask: Ask) -> UserError | None:
        if not ask.segments:
            return UserError(f"{ask.key} has no segments, so its segmentation cannot be scored; use a labelled split")
        if ask.num_frames < 1:
            return UserError(
                f"{ask.key}: it is not known how many frames its video has, so times say nothing; make its shards with "
                "their videos checked"
            )
        if not any(start < ask.num_frames for start, _, _ in ask.segments):
            return UserError(
                f"{ask.key}: its segments begin at frame {ask.segments[0][0]}, but its video has {ask.num_frames}: "
                "these are labels of another video, and to say nothing would be right"
            )
        return None

    def row(self, item: TestItem, ask: Ask, own: dict[str, str]) -> Segmentation:
        read = {condition: self._read(text, ask.num_frames) for condition, text in own.items()}
        prediction, problem = read[""]
        return Segmentation(
            key=ask.key,
            text=own[""],
            truth=[
                (start, min(end, ask.num_frames), class_name(label))  # labels may go on after a camera has stopped
                for start, end, label in ask.segments
                if start < ask.num_frames
            ],
            prediction=prediction,
            num_frames=ask.num_frames,
            problem=problem,
            kind=ask.kind or "",
            video=item.key,
            question=ask.question,
            probes={
                condition: {"text": own[condition], "prediction": spans, "problem": why}
                for condition, (spans, why) in read.items()
                if condition
            },
        )

    def _read(self, text: str, num_frames: int) -> tuple[list[Span], str]:
        """What an answer says, in frames. Spans so short that no frame is theirs are left out."""
        axis = self.recipe.inputs.axis(num_frames)
        spans, problem = read_answer(text, axis.places)
        found = [(axis.frame(start), axis.frame(end), label) for start, end, label in spans]
        return [span for span in found if span[0] < span[1]], problem


TASKS: dict[str, type[Task]] = {"classes": Classes, "choice": Choices, "caption": Captions, "segments": Segments}


def task_of(recipe: Recipe, engine: Any, world: World) -> Task:
    """The task of a recipe's inputs."""
    return TASKS[recipe.inputs.task](recipe, engine, world)


def line_of(row: Prediction | Writing | Segmentation) -> dict[str, Any]:
    """A row as it stands in predictions.jsonl; clips have none of the fields of questions."""
    line = asdict(row)
    if isinstance(row, Prediction) and row.kind is None:
        for name in ("kind", "video", "id", "question", "options"):
            del line[name]
    return line


def _prediction(ask: Ask, own: dict[str, np.ndarray]) -> Prediction:
    assert ask.truth is not None
    listed = {condition: [round(float(value), 6) for value in scores] for condition, scores in own.items()}
    return Prediction(
        key=ask.key,
        truth=ask.truth,
        prediction=int(np.argmax(listed[""])),  # of the rounded scores, so that the row agrees with itself
        scores=listed.pop(""),
        probes=listed,
    )


def _groups(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """The examples in order, cut so that each group has at most `size` prompts."""
    group: list[Example] = []
    room = size
    for example in examples:
        prompts = example.prompts
        while prompts:
            group.append(replace(example, prompts=prompts[:room]))
            prompts, room = prompts[room:], room - len(group[-1].prompts)
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group
