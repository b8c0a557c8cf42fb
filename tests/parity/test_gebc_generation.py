"""The captions of LLMVA-GEBC's original and the answer of Video-LLaMA's demo, token by token.

Measured: all ids equal. The original pads prompts at their ends, so its captions depend on the batch; its captions one
by one are what ours are in any batch. Its beams follow transformers 4.28.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from vlm.data.packing import pack
from vlm.models.causal import CausalSystem
from vlm.models.generation import GenerationConfig, cut, generate
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llmva import Llmva, LlmvaConfig
from vlm.models.opt_base import OptBaseConfig
from vlm.models.video_llama_names import LLM, LLMVA, to_ours
from vlm.nn.qformer import QFormerConfig
from vlm.types import IGNORE, Batch, Row, TextRows

NEW = 29  # the original's max_length=30 counts the begin token that 4.28 puts before embedded prompts


@pytest.fixture(scope="module")
def recorded(load_golden: Callable[[str], Any]) -> dict[str, Any]:
    return load_golden("gebc_llmva.pt")


@pytest.fixture(scope="module")
def model(recorded: dict[str, Any]) -> Llmva:
    c = recorded["config"]
    bert, opt = c["bert"], c["opt"]
    qformer = QFormerConfig(
        dim=c["q_former_hidden_size"], heads=bert["num_attention_heads"], hidden=bert["intermediate_size"], dropout=0.0
    )
    config = LlmvaConfig(
        opt=OptBaseConfig(
            dim=opt["hidden_size"],
            layers=opt["num_hidden_layers"],
            heads=opt["num_attention_heads"],
            hidden=opt["ffn_dim"],
            vocab_size=opt["vocab_size"],
            max_positions=opt["max_position_embeddings"],
        ),
        frame_tokens=recorded["inputs"]["batch"]["image_query_tokens"].shape[2],
        frame_dim=c["q_former_hidden_size"],
        num_video_tokens=c["num_video_query_token"],
        max_frames=c["max_frame_pos"],
        qformer=qformer,
        other_tokens=c["num_other_feat_query_token"],
        other_dim=c["other_feat_total_size"],
        max_other=c["max_other_features_pos"],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen OPT has RANDOM weights")
        model = config.build()
    found = model.load_state_dict(to_ours(recorded["state_dict"], (*LLMVA, *LLM)), strict=False)
    assert not found.missing_keys
    assert not found.unexpected_keys
    return model.eval()


def batch_of(recorded: dict[str, Any], chosen: list[int]) -> Batch:
    inputs, places = recorded["inputs"], recorded["outputs"]["video_tokens"].shape[1]
    places += recorded["outputs"]["other_tokens"].shape[1]
    rows = []
    for place, number in enumerate(chosen):
        prompt = inputs["prompt_ids_padded"][number][inputs["prompt_attention_mask"][number].bool()].tolist()
        start = [recorded["config"]["bos_token_id"], *inputs["video_prefix_ids"]]
        ids = (*start, *[0] * places, *prompt)
        rows.append(Row(ids, (IGNORE,) * len(ids), (len(start), len(start) + places), place))
    given = {name: inputs["batch"][name][chosen] for name in ("image_query_tokens", "reference_points")}
    frames = given["image_query_tokens"]
    return Batch(
        keys=tuple(inputs["batch"]["boundary_id"][number] for number in chosen),
        frame_tokens=frames.flatten(0, 1),
        frame_counts=(frames.shape[1],) * len(chosen),
        extra={
            "boundary": given["reference_points"],
            "other": inputs["batch"]["other_features_list"][chosen].flatten(2),
        },
        prompts=pack(rows, places),
    )


def texts(model: Llmva, recorded: dict[str, Any], chosen: list[int], **settings: Any) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW, **settings)
    end = recorded["config"]["eos_token_id"]
    return generate(model, batch_of(recorded, chosen), config, ends=[[end]])


def recorded_texts(ids: Tensor, recorded: dict[str, Any]) -> list[list[int]]:
    """Without the begin token, and up to the end."""
    return [cut(row[1:], [[recorded["config"]["eos_token_id"]]]) for row in ids.tolist()]


@pytest.mark.parametrize(("name", "beams"), [("greedy", 1), ("beam2_yaml", 2), ("beam5_default", 5)])
def test_the_batch_of_the_original(model: Llmva, recorded: dict[str, Any], name: str, beams: int) -> None:
    want = recorded_texts(recorded["outputs"]["generate"][name]["ids"], recorded)
    assert texts(model, recorded, [0, 1, 2], num_beams=beams, rules="4.28", prompt_pad="right") == want


@pytest.mark.parametrize(("name", "beams"), [("greedy", 1), ("beam2", 2)])
def test_one_by_one(model: Llmva, recorded: dict[str, Any], name: str, beams: int) -> None:
    ids = recorded["outputs"][f"generate_single_{name}_ids"]
    want = [recorded_texts(row, recorded)[0] for row in ids]
    assert [texts(model, recorded, [n], num_beams=beams, rules="4.28")[0] for n in range(len(ids))] == want
    if beams == 1:
        assert texts(model, recorded, [2, 0, 1]) == [want[2], want[0], want[1]]


class Spoken(CausalSystem):
    """A language model whose prompt was embedded elsewhere."""

    def __init__(self, llm: Any, text: Tensor) -> None:
        super().__init__(llm)
        self.text = text

    def embed(self, rows: TextRows, batch: Batch) -> Tensor:
        return self.text


def test_the_demo_of_video_llama(load_golden: Callable[[str], Any]) -> None:
    recorded = load_golden("gebc_videollama.pt")
    size, demo = recorded["config"]["llama"], recorded["outputs"]["demo"]
    config = LlamaBaseConfig(
        dim=size["hidden_size"],
        layers=size["num_hidden_layers"],
        heads=size["num_attention_heads"],
        hidden=size["intermediate_size"],
        vocab_size=size["vocab_size"],
        norm_eps=size["rms_norm_eps"],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA has RANDOM weights")
        llm = config.build()
    stored = {name: t for name, t in recorded["state_dict"].items() if name.startswith("llama_model.")}
    llm.load_state_dict({name.removeprefix("llm."): t for name, t in to_ours(stored, LLM).items()})
    text = demo["context_emb"][0]
    ids = (0,) * len(text)
    batch = Batch(keys=("demo",), prompts=pack([Row(ids, (IGNORE,) * len(ids))], 1))
    want = demo["greedy_ids"][0, 1:].tolist()
    written = generate(
        Spoken(llm, text).eval(), batch, GenerationConfig(max_new_tokens=len(want)), ends=[[size["eos_token_id"]]]
    )
    assert written == [cut(want, [[size["eos_token_id"]]])]
