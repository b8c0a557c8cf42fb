"""Writing: what a row becomes is what a step-by-step pass as in training gives, whatever stands beside it."""

from __future__ import annotations

import warnings

import pytest
import small_llama as small
import torch
from test_causal import Least
from torch import Tensor, nn

from vlm.config import override
from vlm.data.packing import Row, pack
from vlm.models.beams_428 import _Kept
from vlm.models.causal import CausalSystem
from vlm.models.generation import GenerationConfig, cut, generate
from vlm.models.opt_base import OptBaseConfig
from vlm.types import IGNORE, Batch, UserError

END = 2
NEW = 8
KEYS = ("a", "b", "c", "d")
SYSTEMS = ("llama", "opt", "vamos", "llama_vqa")
CONFIGS = {
    "greedy": GenerationConfig(max_new_tokens=NEW),
    "repeating": GenerationConfig(max_new_tokens=NEW, repetition_penalty=1.7, min_new_tokens=3),
    "beams": GenerationConfig(max_new_tokens=NEW, num_beams=3, length_penalty=0.7),
    "sampling": GenerationConfig(max_new_tokens=NEW, sample=True, temperature=1.5, top_p=0.9),
}


class OnOpt(CausalSystem):
    """As Least, on an OPT, whose positions are learned."""

    def __init__(self) -> None:
        config = OptBaseConfig(dim=32, layers=3, heads=4, hidden=48, vocab_size=small.WORDS, max_positions=40)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the frozen OPT has RANDOM weights")
            super().__init__(config.build())
        torch.manual_seed(3)
        self.project = nn.Linear(small.WIDTH, 32)
        with torch.no_grad():  # else all texts are alike
            for name, parameter in self.llm.named_parameters():
                if "embed" in name:
                    parameter.mul_(20)
        self.freeze()

    def encode_video(self, batch: Batch) -> Tensor | None:
        return None if batch.features is None else self.project(batch.features)


def system(name: str) -> CausalSystem:
    if name == "llama":
        return Least().eval()
    if name == "opt":
        return OnOpt().eval()
    if name == "vamos":
        return small.system().eval()
    return small.system(temporal_embedding=True, video_bias=2.0).eval()


ROWS = (
    small.row(1, 6, 0, 0),
    small.row(2, 19, 0, 1, start=9),
    small.row(3, 5, 0, 1),  # it ends with its video
    small.row(4, 11, 0, video=False),
)


def batch(rows: tuple[Row, ...] = ROWS) -> Batch:
    return Batch(keys=("x", "y"), features=small.features(), prompts=pack(rows, small.FRAMES))


def by_hand(model: CausalSystem, row: Row, count: int, ends: tuple[int, ...] = (END,)) -> list[int]:
    """Greedy, the whole row anew for each token, through the pass that training makes."""
    written: list[int] = []
    while len(written) < count:
        ids = (*row.ids, *written)
        rows = pack([row._replace(ids=ids, labels=(IGNORE,) * len(ids))], small.FRAMES)
        hidden = model.read(["answer"], [rows], Batch(keys=("x",), features=small.features()))
        word = int(model.logits(hidden[-1:]).argmax())
        if word in ends:
            break
        written.append(word)
    return written


@pytest.mark.parametrize("name", SYSTEMS)
def test_greedy_is_what_training_would_predict(name: str) -> None:
    """The third system's bias acts on what is written after a video too."""
    model = system(name)
    with torch.no_grad():
        want = [by_hand(model, row, NEW) for row in ROWS]
    assert generate(model, batch(), CONFIGS["greedy"], ends=[[END]]) == want
    assert len({tuple(text) for text in want}) > 1


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["llama", "opt", "llama_vqa"])
def test_a_text_does_not_depend_on_its_neighbours(name: str, kind: str) -> None:
    model, config = system(name), CONFIGS[kind]
    ends = [[END], [40], [7, 7]]
    together = generate(model, batch(), config, ends=ends, keys=KEYS, seed=3)
    for number, row in enumerate(ROWS):
        alone = generate(model, batch((row,)), config, ends=ends, keys=KEYS[number : number + 1], seed=3)
        assert alone == together[number : number + 1]
    back = generate(model, batch(ROWS[::-1]), config, ends=ends, keys=KEYS[::-1], seed=3)
    assert back == together[::-1]


def test_beams_find_likelier_texts_than_greedy() -> None:
    model = system("llama")

    def likelihood(texts: list[list[int]]) -> Tensor:
        rows = [
            Row((*row.ids, *text), (*[IGNORE] * len(row.ids), *text), row.video, row.sample)
            for row, text in zip(ROWS, texts)
        ]
        views = {"caption": pack(rows, small.FRAMES)}
        return -model.losses(Batch(keys=("x",), features=small.features(), views=views))["caption"].total

    with torch.no_grad():
        greedy, beams = (
            likelihood(generate(model, batch(), GenerationConfig(max_new_tokens=8, num_beams=n), ends=[[0]]))
            for n in (1, 6)
        )
    assert beams > greedy + 0.1


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 0.8), (7, 1.0), (7, 0.6)])
def test_sampling_follows_probabilities_and_seed(top_k: int | None, top_p: float) -> None:
    """Among the `top_k` likeliest, and of these among those that have the share `top_p` of their probability."""
    model, row = system("llama"), ROWS[0]
    draws = 400
    config = GenerationConfig(max_new_tokens=1, sample=True, temperature=0.5, top_k=top_k, top_p=top_p)

    def words(seed: int) -> list[int]:
        keys = [str(number) for number in range(draws)]
        return [text[0] for text in generate(model, batch((row,) * draws), config, ends=[[0, 0]], keys=keys, seed=seed)]

    with torch.no_grad():
        rows = pack([row], small.FRAMES)
        hidden = model.read(["answer"], [rows], Batch(keys=("x",), features=small.features()))
        chances = (model.logits(hidden[-1:])[0] / 0.5).softmax(0)
    likely, order = chances.sort(descending=True)
    shares = likely[:top_k].cumsum(0) / likely[:top_k].sum()
    nucleus = order[:top_k][: int((shares < top_p).sum()) + 1]
    drawn = words(0)
    assert set(drawn) <= set(nucleus.tolist())
    want = chances[nucleus] / chances[nucleus].sum()
    got = torch.bincount(torch.tensor(drawn), minlength=small.WORDS)[nucleus] / draws
    assert (got - want).abs().max() < 0.08
    assert drawn == words(0) != words(1)


def test_ends_and_least_length() -> None:
    model = system("llama")
    free = generate(model, batch(), CONFIGS["greedy"], ends=[[0]])
    text = next(text for text in free if len(set(text[2:])) > 3)
    number, end = free.index(text), text[4:6]
    stopped = generate(model, batch(), CONFIGS["greedy"], ends=[[0], end])
    assert stopped[number] == cut(text, [end]) != text
    first = min(text[:3])
    place = text.index(first)
    longer = GenerationConfig(max_new_tokens=NEW, min_new_tokens=place + 1)
    assert len(generate(model, batch(), longer, ends=[[first]])[number]) > place
    assert len(generate(model, batch(), CONFIGS["greedy"], ends=[[first]])[number]) == place
    assert cut([5, 6, 7, 8], [[7, 8], [9]]) == [5, 6]
    assert cut([9, 5, 9], [[9]], at_least=1) == [9, 5]


def test_rules_of_4_28() -> None:
    """A text's length counts a begin token and no end; the first row of a batch is as alone; rows of one length need no
    padding, so its side does not matter. Recorded captions: tests/parity/test_gebc.py."""
    kept = _Kept(2, 1.0)
    kept.add([5], -2.0)
    assert not kept.is_settled(-100.0, 9)
    kept.add([5, 6, 7], -3.6)
    assert kept.best() == [5, 6, 7]
    assert [score for score, _ in kept.texts] == pytest.approx([-1.0, -0.9])
    assert kept.is_settled(-4.1, 4)
    assert not kept.is_settled(-4.1, 5)
    kept.add([8], -3.0)
    assert len(kept.texts) == 2
    kept.add([8], -1.0)
    assert kept.best() == [8]
    assert kept.worst == pytest.approx(-0.9)

    model, ends = system("llama"), [[word] for word in range(2, small.WORDS, 6)]
    for settings in ({"num_beams": 3}, {"num_beams": 2, "repetition_penalty": 1.5, "min_new_tokens": 3}):
        config = GenerationConfig(max_new_tokens=NEW, rules="4.28", **settings)
        texts = generate(model, batch(), config, ends=ends)
        assert generate(model, batch(ROWS[:1]), config, ends=ends) == texts[:1]
        assert min(map(len, texts)) >= config.min_new_tokens
        assert not {word for text in texts for word in text[config.min_new_tokens :]} & {end for (end,) in ends}
    rows = tuple(small.row(seed, 9, 0, seed % 2) for seed in range(5))
    config = GenerationConfig(max_new_tokens=NEW, rules="4.28", prompt_pad="right")
    assert generate(model, batch(rows), config, ends=ends) == generate(model, batch(rows), CONFIGS["greedy"], ends=ends)


def test_what_cannot_be_is_refused() -> None:
    model = system("llama")
    with pytest.raises(UserError, match="no prompts to go on from"):
        generate(model, Batch(keys=("x",)), CONFIGS["greedy"], ends=[[END]])
    model = system("opt")
    with pytest.raises(UserError, match=r"may have 43 tokens, but the language model knows 40 positions"):
        generate(model, batch(), GenerationConfig(max_new_tokens=24), ends=[[END]])
    assert generate(model, batch(), GenerationConfig(max_new_tokens=21), ends=[[0]])
    with pytest.raises(UserError, match="places for video, but the batch has no features"):
        generate(model, Batch(keys=("x",), prompts=pack(ROWS, small.FRAMES)), CONFIGS["greedy"], ends=[[END]])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["temperature=0.5"], "temperature is 0.5; it must be 1 unless generation.sample is true"),
        (["top_p=0.5"], "top_p is 0.5; it must be 1 unless generation.sample is true"),
        (["sample=true", "num_beams=2"], "num_beams is 2; it must be 1 where generation.sample is true"),
        (["length_penalty=2"], "length_penalty is 2.0; it must be 1 with one beam"),
        (["rules=4.28", "sample=true"], "rules is 4.28; it must be hf where"),
        (["prompt_pad=right"], "prompt_pad is right; it must be left unless generation.rules is 4.28"),
        (["max_new_tokens=0"], "max_new_tokens is 0; it must be 1 or more"),
        (["min_new_tokens=40"], "min_new_tokens is 40; it must be at most generation.max_new_tokens=32"),
        (["top_k=5"], "top_k is 5; it must be none unless generation.sample is true"),
        (["sample=true", "top_k=0"], "top_k is 0; it must be above 0, or none"),
        (["sample=true", "top_p=0"], "top_p is 0.0; it must be above 0 and at most 1"),
        (["rules=4.29"], "expected one of hf, 4.28"),
    ],
)
def test_settings_that_contradict_are_refused(settings: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        override(GenerationConfig(), settings)


@pytest.mark.parametrize("name", ["greedy", "sampling"])
def test_watched_token_by_token(name: str) -> None:
    model, config = system("llama"), CONFIGS[name]
    whole = generate(model, batch(), config, ends=[(END,)], keys=KEYS)
    seen: list[list[list[int]]] = []
    watched = generate(model, batch(), config, ends=[(END,)], keys=KEYS, watch=lambda ids: bool(seen.append(ids)))
    assert watched == whole
    assert [len(rows[0]) for rows in seen] == list(range(1, len(seen) + 1))
    for written, final in zip(whole, seen[-1], strict=True):
        assert written == cut(final, [(END,)])
    stopped = generate(model, batch(), config, ends=[(END,)], keys=KEYS, watch=lambda ids: len(ids[0]) == 3)
    assert stopped == [ids[:3] for ids in whole]
    with pytest.raises(AssertionError, match="watched"):
        generate(model, batch(), CONFIGS["beams"], ends=[(END,)], watch=lambda ids: False)
