"""Video-ChatGPT: what trains, rows of the marks, the variant's encodings and fusion in any batch, what starts it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_chat as s
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from vlm import config as settings_of
from vlm.data.packing import Row, pack, pack_trees, share_prefixes
from vlm.models.frozen_hashes import _llm_hash
from vlm.models.generation import GenerationConfig, generate
from vlm.models.llama_base import llama
from vlm.models.video_chatgpt import VideoChatGpt, VideoChatGptConfig, breakfast_variant
from vlm.models.video_chatgpt_parts import add_words
from vlm.nn.language import blocks_of
from vlm.types import IGNORE, Batch, UserError

ROWS = (s.row(1, 9, 3, video=0), s.row(2, 14, 4, video=1), s.row(3, 7, 2, video=-1), s.row(4, 8, 3, video=0))
ENCODED = {"pes.0.positional_encodings", "pes.1.positional_encodings"}
FUSING = {
    f"{part}.{n}.{name}" for part in ("reducers", "projecters") for n in range(s.STATES) for name in ("weight", "bias")
}
BASE = {"mm_projector.weight", "mm_projector.bias", "video_marks"}


@pytest.fixture(scope="module")
def model() -> VideoChatGpt:
    return s.build()


@pytest.fixture(scope="module")
def fused() -> VideoChatGpt:
    return s.fused()


def trained(model: VideoChatGpt) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: VideoChatGpt, *batches: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    for batch in batches:
        model(batch)["dialogue"].total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def losses(model: VideoChatGpt, batch: Batch) -> Tensor:
    """Of each predicted token."""
    rows = batch.views["dialogue"]
    return model.nll(model.read_at(["dialogue"], [rows], [rows.predictors], batch), [rows])[0]


# ------------------------------------------------------------------------------------------------------- what trains


@pytest.mark.parametrize(
    ("settings", "names", "parts"),
    [
        ({}, BASE, ()),
        ({"marks": False}, BASE - {"video_marks"}, ()),
        ({"positional_encodings": True}, BASE | {"pes.0.positional_encodings"}, ()),
        (s.FUSED, BASE | ENCODED | FUSING, ()),
        ({**s.FUSED, "train_also": s.PARTS}, BASE | ENCODED | FUSING, ("layers.0.", "layers.2.", "norm.", "lm_head")),
        ({"train_also": ("embeddings", "layers")}, BASE, ("embed_tokens", "layers.")),
    ],
)
def test_what_trains(settings: dict[str, Any], names: set[str], parts: tuple[str, ...]) -> None:
    model = s.build(**settings)
    own = {name for name in trained(model) if not name.startswith("llm.")}
    assert own == names
    frozen = {name for name, _ in model.named_parameters() if name.startswith("llm.")} - trained(model)
    inside = {name.removeprefix("llm.").removeprefix("model.") for name in trained(model) - own}
    assert all(name.startswith(parts) for name in inside)
    assert not any(name.removeprefix("llm.").removeprefix("model.").startswith(parts) for name in frozen if parts)
    batch = s.batch(s.states(2, model.config.frame_tokens), [_marked(row, model) for row in ROWS])
    have = gradients(model, batch)
    assert have.keys() == trained(model)
    assert all(gradient.any() for gradient in have.values())
    assert all(model.reached(name, batch) for name in have)


def _marked(row: Row, model: VideoChatGpt) -> Row:
    """The row as a model without marks knows it."""
    if model.config.marks:
        return row
    return row._replace(ids=tuple(0 if token > s.WORDS else token for token in row.ids))


def test_published_numbers_of_weights() -> None:
    """The original trains 135.3 million with a 7B, of which all but two rows of the embedding are idle; its variant
    801.7 million."""
    whole = 32006 * 4096
    for config, published in (
        (VideoChatGptConfig(llama=llama("llava_lightning_7b")), 135.3),
        (breakfast_variant(llama=llama("llava_lightning_7b")), 801.7),
    ):
        with torch.device("meta"):
            model = VideoChatGpt(config)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert (count + whole - 2 * 4096) / 1e6 == pytest.approx(published, abs=0.05)
        assert model.frozen_hash() == "no weights: built on the meta device"


def test_new_words(model: VideoChatGpt) -> None:
    """Rows of the three new words are the mean of the language model's."""
    for rows in (model.llm.get_input_embeddings().weight, model.llm.lm_head.weight):
        assert rows.shape == (s.WORDS + 3, s.WIDTH)
        assert_close(rows[s.WORDS :], rows[: s.WORDS].mean(0, keepdim=True).expand(3, -1))
    assert_close(model.video_marks.detach(), model.llm.get_input_embeddings().weight[-2:])
    assert model.llm.config.vocab_size == s.WORDS + 3
    assert len(s.build(marks=False).llm.lm_head.weight) == s.WORDS + 1
    wide = s.build(llama=s.llama(dtype="bfloat16")).llm
    assert_close(wide.lm_head.weight[-1], wide.lm_head.weight[: s.WORDS].float().mean(0).bfloat16())
    assert add_words(wide, 1).dtype == torch.float32


def test_marks_are_read_from_their_own_rows(model: VideoChatGpt) -> None:
    ids = torch.tensor([[3, s.START, s.PATCH], [s.END, 5, s.START]])
    rows = model.llm.get_input_embeddings().weight
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.video_marks.add_(1)
        for one in (model, changed):
            out = one.llm.get_input_embeddings()(ids)
            assert torch.equal(out[0, 1], one.video_marks[0])
            assert torch.equal(out[1, 2], one.video_marks[0])
            assert torch.equal(out[1, 0], one.video_marks[1])
            assert torch.equal(out[[0, 0, 1], [0, 2, 1]], rows[[3, s.PATCH, 5]])


def test_frozen_hash_is_that_of_the_language_model() -> None:
    """Whatever is added to it; what trains of it is no part."""
    with pytest.warns(UserWarning, match="RANDOM"):
        read = _llm_hash(s.llama())
    assert s.build().frozen_hash() == s.build(marks=False).frozen_hash() == s.fused().frozen_hash() == read
    learning = s.build(train_also=("lm_head",))
    assert learning.frozen_hash() != read
    with torch.no_grad():
        learning.llm.lm_head.weight.add_(1)
    assert learning._hash_frozen() == learning.frozen_hash()


# ------------------------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize("parts", [(), ("first_layer",), ("norm",), ("lm_head", "embeddings"), s.PARTS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_trains_is_fp32(parts: tuple[Any, ...], dtype: str) -> None:
    """Among frozen blocks stored in bf16 too; the frozen ones stay as they are."""
    model = s.fused(llama=s.llama(dtype=dtype), train_also=parts)
    for name, p in model.named_parameters():
        stored = getattr(torch, dtype) if name.startswith("llm.") else torch.float32
        assert p.dtype == (torch.float32 if p.requires_grad else stored), name
    batch = s.batch(s.states(2, s.STATES), ROWS)
    have = gradients(model, batch)
    want = gradients(s.fused(train_also=parts), batch)
    assert have.keys() == want.keys() == trained(model)
    assert all(gradient.dtype == torch.float32 for gradient in have.values())
    same = {"float32": 0.0, "bfloat16": 0.1}[dtype]
    assert_close(have["mm_projector.weight"].norm(), want["mm_projector.weight"].norm(), rtol=same, atol=0)
    assert len(generate(model, prompts(), GenerationConfig(max_new_tokens=2), ends=[[2]])) == len(PROMPTS)


def test_matrices_of_few_bits_do_not_train() -> None:
    few = s.llama(quantise="8bit")
    with pytest.raises(ValueError, match=r"model\.train_also has first_layer"):
        s.config(llama=few, train_also=("norm", "first_layer"))
    assert s.config(llama=few, train_also=("norm", "lm_head")).train_also


# ---------------------------------------------------------------------------------------------- rows of several videos


@pytest.mark.parametrize("also", [(), s.PARTS])
def test_a_row_is_as_if_alone(also: tuple[Any, ...]) -> None:
    """Losses and gradients of packed rows about two videos, one, and none."""
    model, states = s.fused(train_also=also), s.states(2, s.STATES)
    together = s.batch(states, ROWS)
    apart = [s.batch(states[row.sample][None], [row._replace(sample=0)]) for row in ROWS]
    assert_close(losses(model, together), torch.cat([losses(model, one) for one in apart]), rtol=0, atol=2e-5)
    have, want = gradients(model, together), gradients(model, *apart)
    for name, gradient in want.items():
        assert_close(have[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_fusion_reaches_every_token_of_rows_with_a_video(fused: VideoChatGpt) -> None:
    """Those before the video too, as published; rows without video get nothing of another's."""
    one, two = s.states(2, s.STATES), s.states(2, s.STATES, seed=2)
    changed = torch.cat([one[:1], two[1:]])
    rows = pack([*ROWS], s.PLACES)
    with torch.no_grad():
        before, after = (
            fused.read(["dialogue"], [rows], s.batch(states, rows)).split(rows.lengths) for states in (one, changed)
        )
    moved = [bool(((a - b).abs().amax(1) > 1e-4).all()) for a, b in zip(before, after)]
    same = [torch.equal(a, b) for a, b in zip(before, after)]
    assert moved == [False, True, False, False]
    assert same == [True, False, True, True]


def test_block_l_reads_state_l(fused: VideoChatGpt) -> None:
    """By the published sentence: after block l, 0.1 * projecters_j(reducers_j(states_j)), j = min(l, Q - 1)."""
    states, rows = s.states(1, s.STATES), pack([ROWS[0]], s.PLACES)
    batch = s.batch(states, rows)
    outputs: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.mlp.register_forward_hook(lambda m, given, out: outputs.append((given[0], out)))
        for block in blocks_of(fused.llm)
    ]
    hidden: list[Tensor] = []
    hooks += [b.register_forward_hook(lambda m, given, out: hidden.append(out)) for b in blocks_of(fused.llm)]
    residuals: list[Tensor] = []
    hooks += [
        b.post_attention_layernorm.register_forward_hook(lambda m, given, out: residuals.append(given[0]))
        for b in blocks_of(fused.llm)
    ]
    with torch.no_grad():
        fused.read(["dialogue"], [rows], batch)
        for hook in hooks:
            hook.remove()
        for number in range(fused.config.llama.layers):
            j = min(number, s.STATES - 1)
            state = states[0, :, j].float() + fused.pes[j].positional_encodings
            over_time = state.T @ fused.reducers[j].weight[0] + fused.reducers[j].bias
            vector = fused.projecters[j](over_time) * fused.config.fusion_scale
            assert_close(hidden[number] - residuals[number] - outputs[number][1], vector.expand_as(hidden[number]))


def test_rows_that_share_a_beginning(fused: VideoChatGpt) -> None:
    """Options of a question score what whole rows score; rows of two videos cannot share one."""
    first = s.row(5, 9, video=1)
    options = [Row((*first.ids, *text), (*first.labels, *text), first.video, 1) for text in ((7, 8), (9,), (11, 12))]
    states = s.states(2, s.STATES)
    tree = pack_trees([share_prefixes([options])], s.PLACES)
    whole = pack(options, s.PLACES, [(0, 1, 2)])
    assert max(tree.parents) >= 0
    with torch.no_grad():
        have, want = (fused.predict(s.batch(states, rows, "options")) for rows in (tree, whole))
    assert_close(have, want, rtol=0, atol=1e-5)
    mixed = [options[0], options[1]._replace(sample=0)]
    with pytest.raises(UserError, match="rows of different videos share their beginning"):
        fused.predict(s.batch(states, pack_trees([share_prefixes([mixed])], s.PLACES), "options"))


def test_a_video_of_which_nothing_is_asked(fused: VideoChatGpt) -> None:
    """What the engine gives to a batch of text alone: the same modules run, with gradients of exactly 0."""
    text = s.batch(s.states(1, s.STATES), [ROWS[2]])
    bare = replace(text, frame_tokens=None, frame_counts=())
    assert torch.equal(losses(fused, text), losses(fused, bare))
    have = gradients(fused, text)
    assert have.keys() == trained(fused)
    assert not any(gradient.any() for gradient in have.values())
    assert not any(fused.reached(name, text) for name in have)
    learning = s.fused(train_also=("norm",))
    assert learning.reached("llm.model.norm.weight", text)


@pytest.mark.parametrize("also", [(), s.PARTS])
def test_recomputed_activations(also: tuple[Any, ...]) -> None:
    batch = s.batch(s.states(2, s.STATES), ROWS)
    want = gradients(s.fused(train_also=also).train(), batch)
    model = s.fused(train_also=also, activation_checkpointing=True).train()
    calls: list[int] = []
    blocks_of(model.llm)[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    have = gradients(model, batch)
    assert len(calls) == 2
    for name, gradient in want.items():
        assert_close(have[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_narrowed_last_block(fused: VideoChatGpt, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = s.batch(s.states(2, s.STATES), ROWS)
    monkeypatch.setattr(fused, "_narrows", lambda places, tokens: True)
    narrow = losses(fused, batch)
    monkeypatch.setattr(fused, "_narrows", lambda places, tokens: False)
    assert_close(narrow, losses(fused, batch), rtol=0, atol=1e-5)


def test_one_order_of_modules_whatever_the_mix(fused: VideoChatGpt) -> None:
    """ZeRO-3 gathers weights module by module, so all ranks must call the same ones in the same order."""

    def calls(batch: Batch) -> list[str]:
        made: list[str] = []
        hooks = [
            module.register_forward_hook(lambda m, given, out, name=name: made.append(name))
            for name, module in fused.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        ]
        fused(batch)
        for hook in hooks:
            hook.remove()
        return made

    one = calls(s.batch(s.states(1, s.STATES), ROWS[:1]))
    assert one == calls(s.batch(s.states(2, s.STATES), ROWS)) == calls(s.batch(s.states(1, s.STATES), ROWS[2:3]))
    assert one.count("mm_projector") == one.count("reducers.0") == one.count("projecters.1") == 1


# --------------------------------------------------------------------------------------------------- nothing to learn


@pytest.mark.parametrize("settings", [{}, {**s.FUSED, "train_also": s.PARTS}])
def test_a_sample_without_labels(settings: dict[str, Any]) -> None:
    """Its loss is 0 with a graph, of 0 tokens, and gives gradients of 0; beside others it changes nothing."""
    model = s.build(**settings)
    cut = ROWS[0]._replace(labels=(IGNORE,) * len(ROWS[0].ids))
    states = s.states(2, model.config.frame_tokens)
    batch = s.batch(states, [cut])
    term = model(batch)["dialogue"]
    assert (float(term.total.detach()), term.count) == (0.0, 0)
    assert model.counts(batch) == {"dialogue": 0}
    term.total.backward()
    assert not any(p.grad is not None and (p.grad.isnan().any() or p.grad.any()) for p in model.parameters())
    assert model.mm_projector.weight.grad is not None
    want = gradients(model, s.batch(states, [ROWS[1]]))
    have = gradients(model, s.batch(states, [cut, ROWS[1]]))
    for name, gradient in want.items():
        assert_close(have[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


# ------------------------------------------------------------------------------------------------------------ writing

NEW, END = 5, 2
PROMPTS = (s.row(1, 6, video=0), s.row(2, 13, video=1), s.row(3, 4, video=1), s.row(4, 9, video=-1))
CONFIGS = {
    "greedy": GenerationConfig(max_new_tokens=NEW),
    "beams": GenerationConfig(max_new_tokens=NEW, num_beams=3),
    "old beams": GenerationConfig(max_new_tokens=NEW, num_beams=2, rules="4.28"),
    "sampling": GenerationConfig(max_new_tokens=NEW, sample=True, temperature=1.5),
}
KEYS = ("a", "b", "c", "d")


def prompts(rows: tuple[Row, ...] = PROMPTS) -> Batch:
    return s.batch(s.states(2, s.STATES), rows, "prompts")


def by_hand(model: VideoChatGpt, row: Row) -> list[int]:
    """Greedy, the whole row anew for each word, through the pass that training makes."""
    written: list[int] = []
    while len(written) < NEW:
        ids = (*row.ids, *written)
        rows = pack([row._replace(ids=ids, labels=(IGNORE,) * len(ids))], s.PLACES)
        hidden = model.read(["dialogue"], [rows], s.batch(s.states(2, s.STATES), rows))
        word = int(model.logits(hidden[-1:]).argmax())
        if word == END:
            break
        written.append(word)
    return written


def test_greedy_is_what_training_would_predict(fused: VideoChatGpt) -> None:
    """With a cache, in a batch: fusion acts at every step, on each row that of its own video."""
    with torch.no_grad():
        want = [by_hand(fused, row) for row in PROMPTS]
    assert generate(fused, prompts(), CONFIGS["greedy"], ends=[[END]]) == want
    assert len({tuple(text) for text in want}) == len(want)
    without = s.fused(fusion_scale=0.0)
    assert generate(without, prompts(), CONFIGS["greedy"], ends=[[END]]) != want


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_text_does_not_depend_on_its_neighbours(fused: VideoChatGpt, kind: str) -> None:
    together = generate(fused, prompts(), CONFIGS[kind], ends=[[END]], keys=KEYS, seed=3)
    for number, row in enumerate(PROMPTS):
        alone = generate(fused, prompts((row,)), CONFIGS[kind], ends=[[END]], keys=KEYS[number : number + 1], seed=3)
        assert alone == together[number : number + 1]
    back = generate(fused, prompts(PROMPTS[::-1]), CONFIGS[kind], ends=[[END]], keys=KEYS[::-1], seed=3)
    assert back == together[::-1]


def test_written_marks_are_read_as_marks(model: VideoChatGpt) -> None:
    """Where a model writes <vid_start>, it goes on from the row that trains."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.llm.lm_head.weight.zero_()
        changed.llm.lm_head.weight[s.START] = changed.llm.lm_head.weight[5] = 0
    rows = pack([s.row(1, 6)], s.PLACES)
    batch = s.batch(s.states(1), rows, "prompts")

    def favour(word: int) -> None:
        hook = changed.llm.lm_head.register_forward_hook(lambda m, given, out: _only(out, word))
        hooks.append(hook)

    hooks: list[Any] = []
    inputs: list[Tensor] = []
    blocks_of(changed.llm)[0].register_forward_pre_hook(lambda m, given: inputs.append(given[0]))
    favour(s.START)
    assert generate(changed, batch, GenerationConfig(max_new_tokens=3), ends=[[END]]) == [[s.START] * 3]
    for hook in hooks:
        hook.remove()
    assert torch.equal(inputs[1][0, 0], changed.video_marks[0].detach())


def _only(out: Tensor, word: int) -> Tensor:
    return torch.full_like(out, -1.0).index_fill(-1, torch.tensor([word]), 1.0)


# ---------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"frame_tokens": 2}, r"model\.frame_tokens is 2, but model\.fusion is false"),
        ({"fusion": True, "frame_tokens": 4}, r"model\.llama\.layers is 3"),
        ({"num_video_tokens": 0}, r"model\.num_video_tokens is 0"),
        ({"train_also": ("head",)}, r"no part is called 'head'"),
        ({"init_from": "a", "projection_from": "b"}, "the latter has a projector too"),
        ({"fusion_scale": float("nan")}, "model.fusion_scale is nan; it must be a number"),
    ],
)
def test_settings_that_contradict(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        s.config(**changes)


def test_settings_from_the_command_line() -> None:
    config = settings_of.override(s.config(), ["train_also=norm,lm_head", "marks=false"])
    assert config.train_also == ("norm", "lm_head")
    with pytest.raises(UserError, match="expected one of"):
        settings_of.override(s.config(), ["train_also=norm,head"])


def inputs(**changes: Any) -> Any:
    own = {"num_video_tokens": s.PLACES, "frame_tokens": 1, "frame_dim": s.DIM, "marks": True, "tokenizer": None}
    return SimpleNamespace(**{**own, "vocab_size": s.WORDS + 3, **changes})


def test_inputs() -> None:
    s.config().check_inputs(inputs())
    s.config(marks=False).check_inputs(inputs(marks=False, vocab_size=s.WORDS + 1))
    for name, value in {"num_video_tokens": 6, "frame_tokens": 2, "frame_dim": 13, "marks": False}.items():
        with pytest.raises(UserError, match=rf"model\.{name} is .*, but inputs\.{name} is {value}"):
            s.config().check_inputs(inputs(**{name: value}))
    with pytest.raises(UserError, match=r"begin at 57, but model\.llama\.vocab_size is 60"):
        s.config().check_inputs(inputs(vocab_size=s.WORDS))


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (s.batch(s.states(1, 2)), r"video0: a place's stored states are \(2, 12\), but .* are \(1, 12\)"),
        (
            replace(s.batch(s.states(1)), frame_counts=(4,)),
            "videos of 4 places in 5, but model.num_video_tokens",
        ),
        (replace(s.batch(s.states(2)), frame_counts=(5,)), "videos of 5 places in 10"),
        (Batch(keys=("a",), frames=torch.zeros(1, 3, 8, 8), frame_counts=(1,)), "reads CLIP's stored features"),
    ],
)
def test_batches_that_do_not_fit(model: VideoChatGpt, batch: Batch, match: str) -> None:
    with pytest.raises(UserError, match=match):
        model.encode_video(batch)


def test_places_without_a_video(model: VideoChatGpt) -> None:
    with pytest.raises(UserError, match="places for video, but the batch has no features"):
        model(s.batch(None, ROWS[:1]))


# ------------------------------------------------------------------------------------------------ what it begins with


def projector(rows: int | None = None, prefix: str = "model.", dim: int = s.WIDTH) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(7)
    tensors = {"mm_projector.weight": torch.randn(dim, s.DIM, generator=draw), "mm_projector.bias": torch.randn(dim)}
    if rows is not None:
        tensors["embed_tokens.weight"] = torch.randn(rows, dim, generator=draw)
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model."])
@pytest.mark.parametrize("rows", [None, s.WORDS + 3, s.WORDS + 2])
def test_released_projector(tmp_path: Path, prefix: str, rows: int | None) -> None:
    """LLaVA's has rows of its own two marks, which the published code takes for the video's."""
    file = tmp_path / "mm_projector.bin"
    tensors = projector(rows, prefix)
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, file)
    model = s.build(projection_from=file)
    assert_close(model.mm_projector.weight.detach(), tensors[f"{prefix}mm_projector.weight"].half().float())
    assert_close(model.mm_projector.bias.detach(), tensors[f"{prefix}mm_projector.bias"].half().float())
    if rows is None:
        assert torch.equal(model.video_marks, s.build().video_marks)
    else:
        assert_close(model.video_marks.detach(), tensors[f"{prefix}embed_tokens.weight"][-2:].half().float())


def test_projectors_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "mm_projector.bin"
    for tensors, match in (
        (projector(dim=40), "a LLaMA of width 32"),
        ({"x": torch.zeros(1)}, r"holds no mm_projector\.weight"),
        ({**projector(), "model.embed_tokens.weight": torch.zeros(4, 9)}, "no rows for a LLaMA of width 32"),
    ):
        torch.save(tensors, file)
        with pytest.raises(UserError, match=match):
            s.build(projection_from=file)


def test_a_folder_of_llava(tmp_path: Path) -> None:
    """It is the language model and holds a projector, which is taken where it is named; rows of its own marks are
    not the video's."""
    with pytest.warns(UserWarning, match="RANDOM"):
        own = {name: tensor.clone() for name, tensor in s.llama().build().state_dict().items()}
    tensors = projector()
    save_file({**own, **tensors}, tmp_path / "model.safetensors")
    read = s.llama(path=tmp_path)
    fresh = s.config(llama=read).build()
    assert not torch.equal(fresh.mm_projector.weight, tensors["model.mm_projector.weight"])
    model = s.config(llama=read, projection_from=tmp_path).build()
    assert torch.equal(model.mm_projector.weight, tensors["model.mm_projector.weight"])
    assert torch.equal(model.video_marks, fresh.video_marks)
    assert model.frozen_hash() == s.build().frozen_hash()


def test_cost(model: VideoChatGpt) -> None:
    """What trains of the language model moves from one count to the other; the sum stays."""
    batch = s.batch(s.states(2), ROWS)
    base, more = model.cost(batch), s.build(train_also=s.PARTS).cost(batch)
    assert more.tokens == base.tokens == sum(len(row.ids) for row in ROWS)
    assert more.trained_flops + more.frozen_flops == pytest.approx(base.trained_flops + base.frozen_flops)
    assert more.trained_flops > base.trained_flops > 2 * 2 * s.PLACES * s.DIM * s.WIDTH
    learnt = sum(label != IGNORE for row in ROWS for label in row.labels)
    head = s.build(train_also=("lm_head",)).cost(batch)
    assert head.trained_flops - base.trained_flops == 2.0 * learnt * s.WIDTH * (s.WORDS + 3)
    two = s.batch(s.states(2, s.STATES), ROWS)
    fusion = 2 * s.STATES * s.DIM * (s.PLACES + s.WIDTH)
    assert s.fused().trained_flops(two, 0) - model.trained_flops(batch, 0) == 2.0 * fusion
