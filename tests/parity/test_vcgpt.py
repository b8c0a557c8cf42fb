"""Video-ChatGPT against numbers recorded from the original: losses, logits, gradients, ten steps, written text.

Measured (largest differences): losses 1.4e-6, logits 1.3e-5, gradients 1.5e-6, their norms 2e-6 relative; argmax, rates
and written tokens equal; over ten steps losses 5e-6.

Where the original is otherwise, and how its numbers come out of ours:

* It trains the whole embedding and detaches all of it but the two marks (cases A, F, ten steps): ours trains the marks.
* It forgets to detach rows without video (case B), and to freeze without marks (case C): `train_also`.
* Of two videos in a sample it reads the last one alone: a prompt of ours has one place for video, and another is
  refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import vcgpt_models as v
from torch import Tensor
from torch.testing import assert_close

from vlm.data.packing import Row, pack
from vlm.data.prompts import PromptEncoder
from vlm.data.tokenizers import ByteTokenizer
from vlm.models.generation import GenerationConfig, generate
from vlm.models.video_chatgpt import VideoChatGpt
from vlm.run.optim import parameter_groups, warmup_cosine
from vlm.types import IGNORE, Batch, Text, UserError, Video

Load = Callable[[str], Any]
FILES = {"A": "vcgpt_forward_AB.pt", "B": "vcgpt_forward_AB.pt", "C": "vcgpt_forward_CD.pt", "D": "vcgpt_forward_CD.pt"}
ALSO = {"A": (), "B": (), "C": ("embeddings", "lm_head"), "D": v.PARTS}
MARKED_PATCH = 3  # <vid_patch> is the third word from the end where there are marks


class Case:
    """A recorded case, its batch, and what our model makes of it."""

    def __init__(self, load: Load, letter: str) -> None:
        values, shared = load(FILES[letter]), load(FILES["A"])
        self.case = next(case for name, case in values["cases"].items() if name.startswith(letter))
        self.state = values[f"state_dict_{letter}"] if f"state_dict_{letter}" in values else shared["state_dict"]
        self.config, self.want = values["config"], self.case["outputs"]
        self.marks = self.case["use_vid_start_end"]
        features = self.case["features"]
        self.batch = v.batch(features, v.rows(self.case["inputs"], self.case["vid_patch"]))
        self.model = self.build(train_also=ALSO[letter])
        self.loss = v.learn(self.model, self.batch)
        self.norms = v.gradient_norms(self.model)

    def build(self, **settings: Any) -> VideoChatGpt:
        places = self.case["features"].shape[1]
        return v.build(self.config, self.state, places, marks=self.marks, **settings)


@pytest.fixture(scope="module", params=list(FILES))
def case(request: pytest.FixtureRequest, load_golden: Load) -> Case:
    return Case(load_golden, request.param)


def check_logits(model: VideoChatGpt, given: Batch, inputs: Mapping[str, Tensor], want: Mapping[str, Any]) -> None:
    """Where there is no padding."""
    seen = inputs["attention_mask"].bool()
    have = v.logits(model, given, seen.shape[1])
    chosen = want["logits_positions"]
    assert_close(have[:, chosen][seen[:, chosen]], want["logits_slice"][seen[:, chosen]], **v.LOGITS)
    assert torch.equal(have.argmax(-1)[seen], want["argmax_tokens"].long()[seen])
    if seen.all():
        assert float(have.abs().mean()) == pytest.approx(want["logits_abs_mean"], abs=1e-6)
        assert float(have.double().sum()) == pytest.approx(want["logits_sum"], abs=0.05)  # of 300000


class TestForward:
    def test_loss(self, case: Case) -> None:
        assert_close(case.loss, case.want["loss"], **v.LOSS)

    def test_logits(self, case: Case) -> None:
        check_logits(case.model, case.batch, case.case["inputs"], case.want)

    def test_projector_gradient(self, case: Case) -> None:
        projector = case.model.mm_projector
        assert_close(projector.weight.grad, case.want["mm_projector_weight_grad"], **v.GRADIENTS)
        assert_close(projector.bias.grad, case.want["mm_projector_bias_grad"], **v.GRADIENTS)

    def test_what_trains(self, case: Case) -> None:
        trained = {name for name, p in case.model.named_parameters() if p.requires_grad}
        recorded = {v.recorded(name) for name in trained - {"video_marks"}}
        if "video_marks" in trained:
            recorded.add("model.embed_tokens.weight")
        assert recorded == set(case.case["trainable"])

    def test_gradient_norms(self, case: Case) -> None:
        want = {name: norm for name, norm in case.want["grad_norms"].items() if norm is not None}
        have = case.norms
        if not case.case["inputs"]["attention_mask"].all() and "text" in case.case["kinds"]:
            have.pop("model.embed_tokens.weight"), want.pop("model.embed_tokens.weight")  # the next test
        assert have.keys() == want.keys()
        for name, norm in want.items():
            assert_close(have[name], norm, **v.NORMS, msg=lambda text, name=name: f"{name}: {text}")

    def test_embedding_gradient(self, case: Case) -> None:
        rows = case.want["embed_grad_nonzero_rows"].tolist()
        if "text" not in case.case["kinds"]:
            have = v.embedding_row_norms(case.model, rows)
            assert_close(have, case.want["embed_grad_row_norms"], rtol=1e-5, atol=1e-6)
            assert have.norm() == pytest.approx(float(v.embedding_row_norms(case.model, range(_words(case))).norm()))
            return
        marks = [_words(case) - 2, _words(case) - 1]
        places = [rows.index(row) for row in marks]
        assert_close(
            v.embedding_row_norms(case.model, marks), case.want["embed_grad_row_norms"][places], rtol=1e-5, atol=1e-6
        )

    def test_undetached_text(self, load_golden: Load) -> None:
        """The quirk of case B: all words of the row without video have gradients. With `embeddings` ours learn them."""
        case = Case(load_golden, "B")
        count = case.model.counts(case.batch)["dialogue"]
        model = case.build(train_also=("embeddings",))
        text = case.case["kinds"].index("text")
        inputs = {name: value[text : text + 1] for name, value in case.case["inputs"].items()}
        alone = v.batch(case.case["features"][:1], v.rows(inputs, case.case["vid_patch"]))
        (model(alone)["dialogue"].total / count).backward()
        embedding = model.get_parameter(v.EMBEDDING).grad
        assert embedding is not None
        embedding[-2:] += case.model.video_marks.grad
        rows = case.want["embed_grad_nonzero_rows"]
        assert_close(embedding[rows].norm(dim=1), case.want["embed_grad_row_norms"], rtol=1e-5, atol=1e-6)
        assert float(embedding.norm()) == pytest.approx(case.want["grad_norms"]["model.embed_tokens.weight"], rel=1e-5)


def _words(case: Case) -> int:
    return len(case.state["model.embed_tokens.weight"])


def test_stored_features_of_their_real_width(load_golden: Load) -> None:
    """The original unpatched: features as stored, in fp16, which the model itself casts."""
    values, shared = load_golden("vcgpt_forward_F_unpatched1024.pt"), load_golden(FILES["A"])
    state = {**{name: shared["state_dict"][name] for name in values["same_as_AB"]}, **values["state_dict"]}
    features, want = values["features_fp16"], values["outputs"]
    model = v.build(values["config"], state, features.shape[1])
    patch = len(state["lm_head.weight"]) - MARKED_PATCH
    given = v.batch(features, v.rows(values["inputs"], patch))
    assert given.frame_tokens.dtype == torch.float16
    assert_close(v.learn(model, given), want["loss"], **v.LOSS)
    check_logits(model, given, values["inputs"], want)
    have = v.gradient_norms(model)
    assert have == pytest.approx({n: x for n, x in want["grad_norms"].items() if x is not None}, rel=1e-5)
    weight = model.mm_projector.weight.grad
    assert_close(weight[:4, :16], want["mm_projector_weight_grad_first4rows_first16"], **v.GRADIENTS)
    assert float(weight.norm()) == pytest.approx(want["mm_projector_weight_grad_norm"], rel=1e-5)
    assert_close(model.mm_projector.bias.grad, want["mm_projector_bias_grad"], **v.GRADIENTS)
    rows = want["embed_grad_nonzero_rows"].tolist()
    assert_close(v.embedding_row_norms(model, rows), want["embed_grad_row_norms"], rtol=1e-5, atol=1e-6)


def test_new_rows(load_golden: Load) -> None:
    """The recorded marks are the mean of all rows before them. Ours too, on rows without <vid_patch>'s random one."""
    state = load_golden(FILES["A"])["state_dict"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = state[name]
        assert_close(rows[-2:], rows[:-2].mean(0, keepdim=True).expand(2, -1), rtol=0.0, atol=1e-6)


# --------------------------------------------------------------------------------------------- ten steps


LATER = {"rtol": 0.0, "atol": 5e-5}  # Adam divides gradients by their own size, so rounding grows with the steps


def test_ten_steps(load_golden: Load) -> None:
    """AdamW over the projector and two rows makes the run that the original made over the whole embedding."""
    recorded = load_golden("vcgpt_generation_training.pt")["training"]
    case = Case(load_golden, "A")
    model, steps = case.model, recorded["trajectory"]
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.0, weight_decay=0.0), betas=(0.9, 0.999), eps=1e-8)
    peak = max(step["lr"] for step in steps)
    for number, want in enumerate(steps):
        lr = warmup_cosine(
            number,
            total_steps=len(steps),
            warmup_steps=math.ceil(0.03 * len(steps)),
            peak=peak,
            final=0.0,
            peak_twice=False,
        )
        assert lr == pytest.approx(want["lr"], rel=1e-9, abs=1e-15)
        tolerance = v.LOSS if number < 2 else LATER
        assert_close(v.learn(model, case.batch), want["loss"], **tolerance, msg=lambda text, n=number: f"{n}: {text}")
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        assert norm == pytest.approx(want["grad_norm"], rel=1e-5 if number < 2 else 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for name, want in recorded["final_mm_projector"].items():
        have = model.get_parameter(name.removeprefix("model."))
        assert_close(have.detach(), want, rtol=0.0, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        assert float((have.detach() - want).abs().mean()) < 2e-5
    whole = model.get_parameter(v.EMBEDDING).detach().clone()
    whole[-2:] = model.video_marks.detach()
    assert float(whole.norm()) == pytest.approx(recorded["final_embed_norm"], abs=1e-4)


def test_what_a_checkpoint_holds(load_golden: Load) -> None:
    """The original's has the whole embedding; ours the two rows of it that differ from where training began."""
    recorded = load_golden("vcgpt_generation_training.pt")["training"]
    shapes = {name.removeprefix("model."): tuple(shape) for name, shape in recorded["checkpoint_shapes"].items()}
    assert set(recorded["checkpoint_keys"]) == {f"model.{name}" for name in shapes}
    words, dim = shapes.pop("embed_tokens.weight")
    config = {
        "hidden_size": dim,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": words - MARKED_PATCH,
        "rms_norm_eps": 1e-6,
        "mm_hidden_size": shapes["mm_projector.weight"][1],
    }
    with pytest.warns(UserWarning, match="RANDOM"):
        model = v.config_of(config, places=4).build()
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == shapes | {"video_marks": (2, dim)}


# --------------------------------------------------------------------------------------------- writing


class TestWriting:
    @pytest.fixture(scope="class")
    def values(self, load_golden: Load) -> Any:
        return load_golden("vcgpt_generation_training.pt")

    @pytest.fixture(scope="class")
    def shared(self, load_golden: Load) -> Any:
        return load_golden(FILES["A"])

    def test_greedy(self, values: Any, shared: Any) -> None:
        recorded = values["generation"]
        features, state = recorded["features"], shared["state_dict"]
        model = v.build(shared["config"], state, features.shape[1])
        patch = len(state["lm_head.weight"]) - MARKED_PATCH
        want = recorded["new_tokens_cache"][0].tolist()
        assert want == recorded["new_tokens_nocache"][0].tolist()
        prompts = v.prompt(recorded["input_ids"], patch)
        config = GenerationConfig(max_new_tokens=len(want))
        end = shared["config"]["eos_token_id"]
        assert generate(model, v.batch(features, None, prompts), config, ends=[[end]]) == [_before(want, end)]

    def test_one_video_of_two(self, values: Any, shared: Any) -> None:
        """The recorded logits are those of a row whose first video stayed <vid_patch>: of features [1] alone."""
        recorded, state = values["two_videos"], shared["state_dict"]
        assert recorded["first_video_ignored"]
        ids, features = recorded["input_ids"][0].tolist(), recorded["features"]
        places = features.shape[1]
        patch = len(state["lm_head.weight"]) - MARKED_PATCH
        last = [place for place, token in enumerate(ids) if token == patch][-places:]
        assert last == list(range(last[0], last[0] + places))
        row = Row(tuple(ids), (IGNORE,) * len(ids), (last[0], last[-1] + 1), 0)
        model = v.build(shared["config"], state, places)
        with torch.no_grad():
            found = [
                model.logits(
                    model.read(["dialogue"], [pack([row], places)], v.batch(features[number : number + 1], None))[-1:]
                )
                for number in range(len(features))
            ]
        assert min(float((have - recorded["logits_last"]).abs().max()) for have in found) < 2e-5

    def test_two_videos_are_refused(self, values: Any) -> None:
        encoder = PromptEncoder(tokenizer=ByteTokenizer(), num_video_tokens=4)
        with pytest.raises(AssertionError, match="one place for video"):
            encoder.encode((Text("a "), Video(), Text(" b "), Video(), Text(" c")))

    def test_what_the_original_refuses(self, values: Any) -> None:
        """Marks and places come from one encoder, so nothing can be missing between them; what is left is refused, and
        features that are not there too, where the original goes on with the rows of <vid_patch>."""
        assert {name for name, told in values["errors"].items() if told is None} == {
            "features_none_keeps_placeholder_embeddings"
        }
        for places in (3, 5):
            with pytest.raises(AssertionError, match="is no place for 4 tokens"):
                pack([Row((1, *[0] * places, 2), (IGNORE,) * (places + 2), (1, 1 + places))], 4)
        config = v.config_of(v.TINY, places=4)
        with pytest.warns(UserWarning, match="RANDOM"):
            model = config.build()
        text = pack([Row((1, 0, 0, 0, 0, 2), (*[IGNORE] * 5, 2), (1, 5))], 4)
        with pytest.raises(UserError, match="no features"):
            model(Batch(keys=("a",), views={"dialogue": text}))


def _before(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
