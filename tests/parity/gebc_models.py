"""Recorded models of Video-LLaMA and LLMVA-GEBC as ours: sizes and weights are read from the goldens.

Tolerances are about ten times what was measured (see test_gebc.py), and no wider than what an independent build on the
same transformers modules was seen to differ by.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.data.packing import Row, pack
from vlm.models.eva import TowerConfig
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llmva import Llmva, LlmvaConfig
from vlm.models.name_tables import Pairs
from vlm.models.opt_base import OptBaseConfig
from vlm.models.video_llama import VideoLlama, VideoLlamaConfig
from vlm.models.video_llama_names import LLM, LLMVA, TOWER, VIDEO_LLAMA, to_ours
from vlm.nn.qformer import QFormerConfig
from vlm.types import IGNORE, Batch, TextRows

TOKENS = {"rtol": 0.0, "atol": 3e-6}  # of frames and videos
LOSS = {"rtol": 0.0, "atol": 1e-5}
LOGITS = {"rtol": 0.0, "atol": 1.5e-5}
NORMS = {"rtol": 1e-5, "atol": 1e-7}  # key biases have 0 but for rounding, 1e-9


def tower_config(eva: Mapping[str, Any], bert: Mapping[str, Any], queries: int) -> TowerConfig:
    """The frozen part that sees; either half may be of any size where it is not looked at."""
    return TowerConfig(
        image_size=eva["img_size"],
        patch_size=eva["patch_size"],
        dim=eva["embed_dim"],
        layers=eva["depth"],
        heads=eva["num_heads"],
        hidden=int(eva["embed_dim"] * eva["mlp_ratio"]),
        queries=queries,
        query_dim=bert["hidden_size"],
        query_layers=bert["num_hidden_layers"],
        query_heads=bert["num_attention_heads"],
        query_hidden=bert["intermediate_size"],
    )


def qformer_config(bert: Mapping[str, Any], **settings: Any) -> QFormerConfig:
    return QFormerConfig(
        dim=bert["hidden_size"], heads=bert["num_attention_heads"], hidden=bert["intermediate_size"], **settings
    )


def video_llama(golden: Mapping[str, Any]) -> VideoLlama:
    """Video-LLaMA as recorded, in evaluation mode."""
    c = golden["config"]
    size = c["llama"]
    config = VideoLlamaConfig(
        tower=tower_config(c["eva"], c["bert"], c["num_query_token"]),
        frame_tokens=c["num_query_token"],
        frame_dim=c["bert"]["hidden_size"],
        num_video_tokens=c["num_video_query_token"],
        max_frames=c["max_frame_pos"],
        qformer=qformer_config(
            c["bert"], layers=c["video_qformer_layers"], cross_every=c["video_qformer_cross_attention_freq"]
        ),
        llama=LlamaBaseConfig(
            dim=size["hidden_size"],
            layers=size["num_hidden_layers"],
            heads=size["num_attention_heads"],
            hidden=size["intermediate_size"],
            vocab_size=size["vocab_size"],
            norm_eps=size["rms_norm_eps"],
        ),
    )
    return _loaded(config, golden["state_dict"], (*TOWER, *VIDEO_LLAMA, *LLM))


def llmva(golden: Mapping[str, Any], **changes: Any) -> Llmva:
    """LLMVA-GEBC as recorded, in evaluation mode."""
    c, opt = golden["config"], golden["config"]["opt"]
    frames = golden["inputs"]["batch"]["image_query_tokens"]
    config = LlmvaConfig(
        opt=OptBaseConfig(
            dim=opt["hidden_size"],
            layers=opt["num_hidden_layers"],
            heads=opt["num_attention_heads"],
            hidden=opt["ffn_dim"],
            vocab_size=opt["vocab_size"],
            max_positions=opt["max_position_embeddings"],
        ),
        frame_tokens=frames.shape[2],
        frame_dim=frames.shape[3],
        num_video_tokens=c["num_video_query_token"],
        max_frames=c["max_frame_pos"],
        qformer=qformer_config(c["bert"]),
        other_tokens=c["num_other_feat_query_token"],
        other_dim=c["other_feat_total_size"],
        max_other=c["max_other_features_pos"],
        **changes,
    )
    return _loaded(config, golden["state_dict"], (*LLMVA, *LLM))


def _loaded(config: Any, state: Mapping[str, Tensor], pairs: Pairs) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen .* RANDOM weights")  # they are replaced
        model = config.build()
    model.load_state_dict(to_ours(state, pairs), strict=True)
    return model.eval()


def row(ids: Sequence[int], labels: Sequence[int], slots: Sequence[int], sample: int) -> Row:
    """One recorded row; `slots` are the places of its video tokens."""
    video = (slots[0], slots[-1] + 1) if slots else (0, 0)
    return Row(tuple(ids), tuple(labels), video, sample)


def caption_rows(prompt: tuple[Sequence[int], Sequence[int]], texts: Sequence[Sequence[int]], places: int) -> TextRows:
    """Rows of what stands before the video, the video, what stands between it and the text, and the text."""
    before, after = prompt
    rows = []
    for number, text in enumerate(texts):
        start = [*before, *[0] * places, *after]
        slots = range(len(before), len(before) + places)
        rows.append(row([*start, *text], [*[IGNORE] * len(start), *text], slots, number))
    return pack(rows, places)


def recorded_rows(ids: Tensor, labels: Tensor, seen: Tensor, mark: int, places: int) -> TextRows:
    """Rows of recorded ids (B, L) in which the video stands where `mark` is; `seen` (B, L) is 0 where there is none."""
    rows = []
    for number, keep in enumerate(seen.bool()):
        own = ids[number][keep]
        slots = (own == mark).nonzero()[:, 0].tolist()
        assert len(slots) == places
        rows.append(row(own.masked_fill(own == mark, 0).tolist(), labels[number][keep].tolist(), slots, number))
    return pack(rows, places)


def clips(video: Tensor, rows: TextRows | None, view: str = "caption") -> Batch:
    """A batch of videos (B, C, T, H, W)."""
    count, _, frames = video.shape[:3]
    return Batch(
        keys=tuple(map(str, range(count))),
        frames=video.transpose(1, 2).flatten(0, 1),
        frame_counts=(frames,) * count,
        views={} if rows is None else {view: rows},
    )


def boundaries(golden: Mapping[str, Any], chosen: Sequence[int]) -> Batch:
    """Recorded boundaries of LLMVA-GEBC, each with its own prompt and caption, without padding."""
    inputs, c = golden["inputs"], golden["config"]
    given, end = inputs["batch"], c["pad_token_id"]
    chosen = list(chosen)
    places = c["num_video_query_token"] + c["num_other_feat_query_token"]
    start = [c["bos_token_id"], *inputs["video_prefix_ids"]]
    rows = []
    for place, number in enumerate(chosen):
        prompt = inputs["prompt_ids_padded"][number][inputs["prompt_attention_mask"][number].bool()].tolist()
        text = [token for token in inputs["text_ids"][number].tolist() if token != end]
        lead = [*start, *[0] * places, *prompt]
        rows.append(row([*lead, *text], [*[IGNORE] * len(lead), *text], range(len(start), len(start) + places), place))
    frames = given["image_query_tokens"][chosen]
    return Batch(
        keys=tuple(given["boundary_id"][number] for number in chosen),
        frame_tokens=frames.flatten(0, 1),
        frame_counts=(frames.shape[1],) * len(chosen),
        extra={
            "boundary": given["reference_points"][chosen],
            "other": given["other_features_list"][chosen].flatten(2),
        },
        views={"caption": pack(rows, places)},
    )


def gradients(model: Any, batch: Batch) -> dict[str, float]:
    """Norms of the gradients of the mean loss, by our names."""
    model.zero_grad()
    term = model(batch)[next(iter(batch.views))]
    (term.total / term.count).backward()
    return {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.requires_grad}


def mean_loss(model: Any, batch: Batch) -> float:
    with torch.no_grad():
        term = model(batch)[next(iter(batch.views))]
    assert model.counts(batch) == {next(iter(batch.views)): term.count}
    return float(term.total / term.count)
