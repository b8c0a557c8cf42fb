"""Video-LLaMA and LLMVA-GEBC against numbers recorded from the originals: EVA, Q-Former, losses, gradients, schedule,
what the models read, what they write, how captions are scored.

Measured (largest differences): frame tokens 9.5e-7, video tokens 1.6e-6, losses 1.5e-6, gradient norms 1.7e-6 relative,
boundary embedding 0; ids of batches and of written texts, words, BLEU and ROUGE-L equal, CIDEr to 9e-16. Allowed for
scores: 1e-9, the rounding of `score`. The original of GEBC pads prompts at their ends, so its captions depend on the
batch; its captions one by one are what ours are in any batch. Its beams follow transformers 4.28.
"""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gebc_models as g
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vlm.data.boundaries import KINDS, LEADS, BoundaryConfig, nearest_places
from vlm.data.dialogues import DialogueConfig
from vlm.data.frames import CLIP_COLOURS
from vlm.data.packing import pack
from vlm.data.rng import SampleRng
from vlm.data.sampling import headtail_frames, uniform_frames
from vlm.data.templates import PLACE, Media, blip_caption, dialogue, frames_message
from vlm.data.tokenizers import load_tokenizer
from vlm.data.transforms import normalize
from vlm.metrics.caption import GEBC_KINDS, score
from vlm.metrics.ngrams import bleu, cider, rouge_l
from vlm.metrics.ptb import tokenize
from vlm.models.causal import CausalSystem
from vlm.models.eva import Tower
from vlm.models.generation import GenerationConfig, cut, generate
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.llmva import Llmva, LlmvaConfig, boundary_embedding
from vlm.models.name_tables import table
from vlm.models.opt_base import OptBaseConfig
from vlm.models.video_llama import VideoLlama
from vlm.models.video_llama_names import LLM, LLMVA, TOWER, VIDEO_LLAMA, to_ours
from vlm.nn.qformer import QFormerConfig, read_memory
from vlm.recipe import OptimConfig, Recipe, TrainData
from vlm.run.optim import parameter_groups
from vlm.run.train import schedule_of
from vlm.types import IGNORE, Batch, Record, Row, TextRows, Visit, Writing
from vlm.weights import rename

Load = Callable[[str], Any]
_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


# ------------------------------------------------------------------------------------------------------ EVA, Q-Former


class TestEva:
    @pytest.fixture(scope="class")
    def values(self, load_golden: Load) -> Any:
        return load_golden("gebc_eva_vit.pt")

    @pytest.fixture(scope="class")
    def tower(self, values: Any) -> Tower:
        c = values["config"]
        with pytest.warns(UserWarning, match="RANDOM"):
            tower = g.tower_config(c, _BERT, queries=2).build()
        own = {name.removeprefix("tower."): t for name, t in to_ours(values["state_dict"], TOWER).items()}
        found = tower.load_state_dict(own, strict=False)
        assert not found.unexpected_keys
        assert all(not name.startswith("vision.") for name in found.missing_keys)
        assert c["mlp_hidden"] == tower.vision.config.intermediate_size
        return tower

    def test_constants(self, values: Any, tower: Tower) -> None:
        """The norm behind the ViT has another epsilon than its blocks, which moves outputs by 7e-6 alone."""
        assert tower.vision.post_layernorm.eps == values["config"]["ln_vision_eps"]
        assert {b.layer_norm1.eps for b in tower.vision.encoder.layers} == {values["config"]["ln_eps"]}

    @torch.no_grad()
    def test_blocks(self, values: Any, tower: Tower) -> None:
        seen = tower.vision(values["inputs"]["image"], output_hidden_states=True)
        for have, want in zip(seen.hidden_states[1:], values["outputs"]["block_outputs"], strict=True):
            assert_close(have, want, **g.TOKENS)
        assert_close(seen.last_hidden_state, values["outputs"]["ln_vision"], **g.TOKENS)

    @torch.no_grad()
    def test_other_image_size(self, values: Any, tower: Tower) -> None:
        """Positions are interpolated where frames are larger, through the tower's own forward pass."""
        image = values["inputs"]["image42"]
        seen: list[Tensor] = []
        hook = tower.vision.encoder.register_forward_hook(lambda m, given, out: seen.append(out.last_hidden_state))
        tower(image)
        hook.remove()
        # seen: 3.4e-6, on a processor that knows AVX2 and no more
        assert_close(seen[0], values["outputs"]["visual_encoder_42"], rtol=0.0, atol=6e-6)
        grid = torch.empty(1, seen[0].shape[1], seen[0].shape[2])
        place = tower.vision.embeddings.interpolate_pos_encoding(grid, *image.shape[2:])
        assert_close(place, values["outputs"]["pos_embed_42"], **g.TOKENS)


class TestQFormer:
    @pytest.fixture(scope="class")
    def values(self, load_golden: Load) -> Any:
        return load_golden("gebc_qformer.pt")

    @pytest.fixture(scope="class")
    def state(self, values: Any) -> dict[str, Tensor]:
        return to_ours(values["state_dict"], TOWER)

    @pytest.fixture(scope="class")
    def qformer(self, values: Any, state: dict[str, Tensor]) -> Any:
        c = values["config"]
        made = g.qformer_config(
            c, layers=c["num_hidden_layers"], cross_every=c["cross_attention_freq"], dropout=c["hidden_dropout_prob"]
        ).build(c["encoder_width"])
        stem = "tower.qformer."
        made.load_state_dict({n.removeprefix(stem): t for n, t in state.items() if n.startswith(stem)}, strict=True)
        assert made.layernorm.eps == c["layer_norm_eps"]
        return made.eval()

    @pytest.mark.parametrize(
        ("mask", "output"),
        [(None, ""), ("mask_full", ""), ("mask_partial", "_partial_mask")],
    )
    @torch.no_grad()
    def test_outputs(self, values: Any, state: dict[str, Tensor], qformer: Any, mask: str | None, output: str) -> None:
        memory = values["inputs"]["image_embeds"]
        queries = state["tower.query_tokens"].expand(len(memory), -1, -1)
        have = read_memory(qformer, queries, memory, None if mask is None else values["inputs"][mask])
        assert_close(have, values["outputs"][f"last_hidden_state{output}"], **g.TOKENS)


# -------------------------------------------------------------------------------------------------------- Video-LLaMA

CASES = ("stage1_no_prompt_trunc12", "stage2_caption", "stage2_image4d", "stage2_instruct")


def check_norms(model: Any, have: dict[str, float], want: dict[str, float], pairs: Any) -> None:
    names = rename(want, table(pairs, to_ours=True))
    assert set(have) == set(names.values())
    for theirs, ours in names.items():
        assert_close(have[ours], want[theirs], **g.NORMS, msg=lambda text, n=theirs: f"{n}: {text}")


class TestVideoLlama:
    @pytest.fixture(scope="class")
    def values(self, load_golden: Load) -> Any:
        return load_golden("gebc_videollama.pt")

    @pytest.fixture(scope="class")
    def model(self, values: Any) -> VideoLlama:
        return g.video_llama(values)

    def batch(self, values: Any, case: str) -> Any:
        places, start = values["config"]["num_video_query_token"], [values["config"]["bos_token_id"]]
        recorded = values["outputs"]["cases"]
        video = values["inputs"]["video"]
        if case == "stage2_instruct":
            it = recorded[case]
            rows = g.recorded_rows(
                it["input_ids"], it["labels"], it["batch_attention_mask"], it["image_patch_token_id"], places
            )
            return g.clips(video, rows, "dialogue")
        prompt: tuple[list[int], list[int]] = ([], [])
        texts = recorded[case].get("text_ids")
        if case != "stage1_no_prompt_trunc12":
            asked = recorded["stage2_caption"]
            prompt, texts = (asked["p_before_ids"], asked["p_after_ids"]), asked["text_ids"]
        rows = g.caption_rows(([*start, *prompt[0]], prompt[1]), texts, places)
        return g.clips(video[:, :, :1] if case == "stage2_image4d" else video, rows)

    def test_trained(self, values: Any, model: VideoLlama) -> None:
        names = rename(values["trainable"], table(VIDEO_LLAMA, to_ours=True))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names.values())

    def test_weight_decay(self, values: Any, model: VideoLlama) -> None:
        """Matrices, learned queries and positions decay, nothing else."""
        decay = {n for x in parameter_groups(model, lr=1.0, weight_decay=0.05) if x["weight_decay"] for n in x["names"]}
        state = values["state_dict"]
        want = {n for n in values["trainable"] if state[n].ndim >= 2 and not any(x in n for x in ("bias", "ln", "bn"))}
        assert decay == set(rename(want, table(VIDEO_LLAMA, to_ours=True)).values())
        assert {"video_query_tokens", "video_frame_position_embedding.weight"} <= decay

    @torch.no_grad()
    def test_video_tokens(self, values: Any, model: VideoLlama) -> None:
        video = values["inputs"]["video"]
        assert_close(model.encode_video(g.clips(video, None)), values["outputs"]["video_tokens"], **g.TOKENS)
        first = g.clips(video[:, :, :1], None)
        assert_close(model.encode_video(first), values["outputs"]["video_tokens_t1"], **g.TOKENS)

    @torch.no_grad()
    def test_video_and_image_together(self, values: Any, model: VideoLlama) -> None:
        """The recorded tokens of each, from one pass of both."""
        video, outputs = values["inputs"]["video"].transpose(1, 2), values["outputs"]
        batch = g.clips(values["inputs"]["video"], None)
        batch.frames, batch.frame_counts = torch.cat([video[0, :1], video[1]]), (1, video.shape[1])
        have = model.encode_video(batch)
        assert_close(have[0], outputs["video_tokens_t1"][0], **g.TOKENS)
        assert_close(have[1], outputs["video_tokens"][1], **g.TOKENS)

    @pytest.mark.parametrize("case", CASES)
    def test_loss_and_gradients(self, values: Any, model: VideoLlama, case: str) -> None:
        recorded, batch = values["outputs"]["cases"][case], self.batch(values, case)
        assert sum(rows.targets.numel() for rows in batch.views.values()) == int((recorded["labels"] != IGNORE).sum())
        assert_close(g.mean_loss(model, batch), recorded["loss"], **g.LOSS)
        check_norms(model, g.gradients(model, batch), recorded["grad_norms"], VIDEO_LLAMA)

    @torch.no_grad()
    def test_inputs_and_logits(self, values: Any, model: VideoLlama) -> None:
        recorded, batch = values["outputs"]["cases"]["stage2_caption"], self.batch(values, "stage2_caption")
        rows = batch.views["caption"]
        seen = recorded["attention_mask"].bool()
        assert_close(model.embed(rows, batch), recorded["inputs_embeds"][seen], **g.TOKENS)
        hidden = model.read(["caption"], [rows], batch)
        assert_close(model.logits(hidden), recorded["logits"][seen], **g.LOGITS)


# --------------------------------------------------------------------------------------------------------- LLMVA-GEBC


class TestLlmva:
    @pytest.fixture(scope="class")
    def values(self, load_golden: Load) -> Any:
        return load_golden("gebc_llmva.pt")

    @pytest.fixture(scope="class")
    def model(self, values: Any) -> Llmva:
        """As the original: prompts padded at their ends."""
        return g.llmva(values, prompt_pad="right")

    def test_trained(self, values: Any, model: Llmva) -> None:
        names = rename(values["trainable"], table(LLMVA, to_ours=True))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names.values())

    def test_boundary_embedding(self, values: Any) -> None:
        boundary = values["inputs"]["batch"]["reference_points"]
        want = values["outputs"]["boundary_pos_embed"]
        assert_close(boundary_embedding(boundary, want.shape[2]), want, rtol=0, atol=1e-7)
        # fp32, as collated, is as good
        assert_close(boundary_embedding(boundary.float(), want.shape[2]), want, rtol=0, atol=1e-6)

    @torch.no_grad()
    def test_soft_tokens(self, values: Any, model: Llmva) -> None:
        have = model.encode_video(g.boundaries(values, range(3)))
        outputs = values["outputs"]
        assert_close(have, torch.cat([outputs["video_tokens"], outputs["other_tokens"]], dim=1), **g.TOKENS)

    def test_loss_and_gradients(self, values: Any, model: Llmva) -> None:
        batch = g.boundaries(values, range(3))
        assert_close(g.mean_loss(model, batch), values["outputs"]["loss"], **g.LOSS)
        check_norms(model, g.gradients(model, batch), values["outputs"]["grad_norms"], LLMVA)

    @torch.no_grad()
    def test_logits(self, values: Any, model: Llmva) -> None:
        """At the places whose outputs predict: of shorter prompts, the first one is a pad's."""
        batch = model.arrange(g.boundaries(values, range(3)))
        rows = batch.views["caption"]
        have = model.logits(model.read(["caption"], [rows], batch, rows.predictors))
        before = values["outputs"]["labels"][:, 1:] != IGNORE
        assert_close(have, values["outputs"]["logits"][:, :-1][before], **g.LOGITS)

    @pytest.mark.parametrize("number", range(3))
    def test_without_padding_a_row_is_as_if_alone(self, values: Any, model: Llmva, number: int) -> None:
        """The default. Alone nothing is padded, so the original's way is the same for one row."""
        plain = g.llmva(values)
        batch = g.boundaries(values, range(3))
        with torch.no_grad():
            rows = batch.views["caption"]
            mixed = plain.nll([plain.read(["caption"], [rows], batch, rows.predictors)], [rows])[0]
            mixed = mixed.split(list(rows.target_counts))[number].mean()
        alone = g.boundaries(values, [number])
        assert_close(g.mean_loss(plain, alone), float(mixed), **g.LOSS)
        assert_close(g.mean_loss(model, alone), float(mixed), **g.LOSS)

    def test_padding_matters(self, values: Any, model: Llmva) -> None:
        """Else the test above of the original's way would show nothing."""
        batch = g.boundaries(values, range(3))
        assert abs(g.mean_loss(g.llmva(values), batch) - values["outputs"]["loss"]) > 1e-3


# ----------------------------------------------------------------------------------------------------------- schedule


def recorded_schedules(values: Any) -> list[tuple[Recipe, int, list[tuple[int, float]]]]:
    """Our recipe, its number of steps, and recorded (step, rate) of each setting."""
    found = []
    for case in values.values():
        args = case["args"]
        length = args["iters_per_epoch"]
        recipe = Recipe(
            model=None,
            inputs=None,
            data=TrainData(shards=""),
            optim=OptimConfig(
                lr=args["init_lr"],
                min_lr=args["min_lr"],
                warmup_lr=args.get("warmup_start_lr", args["init_lr"]),
                warmup_steps=args["warmup_steps"],
                warmup_restart=length,
                warmup_peak_twice=False,
                cosine_from_start=True,
            ),
            views={"caption": 1.0},
            global_batch_size=1,
            steps=length * args["max_epoch"],
        )
        rates = [(epoch * length + it, rate) for epoch, it, rate in case["epoch_step_lr"]]
        found.append((recipe, length * args["max_epoch"], rates))
    return found


def test_schedule(load_golden: Load) -> None:
    """Through the recipe, as the trainer asks; measured: 0."""
    cases = recorded_schedules(load_golden("gebc_lr.json"))
    assert cases
    for recipe, total, rates in cases:
        rate = schedule_of(recipe, 1, total)
        assert_close([rate(step) for step, _ in rates], [want for _, want in rates], rtol=1e-9, atol=0)


def test_warmup_goes_on_by_default(load_golden: Load) -> None:
    """Longer than an epoch, the original's never gets to the peak; ours does unless it is told."""
    values = load_golden("gebc_lr.json")
    ((recipe, total, _),) = recorded_schedules({"": values["warmup_longer_than_epoch"]})
    recipe.optim.warmup_restart = OptimConfig(lr=1.0).warmup_restart
    warmup = recipe.optim.warmup_steps or 0
    rates = [schedule_of(recipe, 1, total)(step) for step in range(warmup)]
    assert rates == sorted(rates)
    assert rates[0] == recipe.optim.warmup_lr
    assert rates[-1] == pytest.approx(recipe.optim.lr, rel=0.01)


# --------------------------------------------------------------------------------------------------------- What is read


FILE = "gebc_data.json"


@pytest.fixture(scope="module", params=["folder", "file"])
def tokenizer(request, golden) -> Path:
    """The same words by transformers and by sentencepiece."""
    folder = golden("gebc_tokenizers") / "llama"
    return folder if request.param == "folder" else folder / "tokenizer.model"


def test_captions(load_golden):
    for case in load_golden(FILE)["blip_caption"]:
        assert blip_caption(case["in"]) == case["out"]


def test_frames_evenly_spread(load_golden):
    for name, want in load_golden(FILE)["uniform_indices_key_vlen_n"].items():
        num_frames, count = map(int, name.split(","))
        assert uniform_frames(num_frames, count).tolist() == want


def test_frames_of_both_halves(load_golden):
    for name, want in load_golden(FILE)["headtail_python_random_seed_eq_vlen_n8"].items():
        assert headtail_frames(int(name), 8, random.Random(int(name))).tolist() == want


def test_normalised_pixels(load_golden):
    golden = load_golden(FILE)["alpro_eval_norm"]
    assert (list(CLIP_COLOURS.mean), list(CLIP_COLOURS.std)) == (golden["mean"], golden["std"])
    draw = torch.Generator().manual_seed(golden["clip_u8_generator_seed"])
    clip = torch.randint(0, 256, golden["shape"], dtype=torch.uint8, generator=draw)
    assert clip.flatten()[:8].tolist() == golden["in_first8"]
    found = normalize(clip.float(), CLIP_COLOURS.mean, CLIP_COLOURS.std)
    assert found.flatten()[:8].tolist() == pytest.approx(golden["out_first8"], abs=1e-5)
    assert found.double().sum().item() == pytest.approx(golden["out_sum"], abs=1e-2)


def _places(ids: list[int], patch: int) -> tuple[list[int], int]:
    """(ids as ours have them, places of the video)."""
    return [0 if token == patch else token for token in ids], ids.count(patch)


def _config(tokenizer: Path, ids: list[int], patch: int, **settings) -> DialogueConfig:
    return DialogueConfig(tokenizer=tokenizer, num_video_tokens=_places(ids, patch)[1], **settings)


def _tokens(config: DialogueConfig, turns: list[dict[str, str]], media: Media):
    record = Record(
        key="k", shard="s", row=0, video=None, annotation={"conversations": turns}, num_frames=3, fps=0, decoders=()
    )
    return config._turns_tokens(record, media)


def _videochat(case) -> tuple[list[dict[str, str]], Media]:
    """As the source `instruct` gives VideoChat's rows."""
    turns = []
    for number, part in enumerate(case["QA"]):
        turns.append({"from": "human", "value": part["q"] if number else f"{PLACE}\n{part['q']}"})
        turns.append({"from": "gpt", "value": part["a"]})
    return turns, Media(False, case["msg"])


@pytest.mark.parametrize("template", ["vicuna_v0", "llama2"])
def test_dialogues_about_videos(load_golden, tokenizer, template):
    golden = load_golden(FILE)
    patch, name = golden["image_patch_token_id"], {"vicuna_v0": "vicuna", "llama2": "llama_v2"}[template]
    for case in golden["instruct_video"]:
        ids, labels = case[f"{name}_input_ids"], case[f"{name}_labels"]
        turns, media = _videochat(case)
        mask = "drift" if template == "vicuna_v0" else "exact"
        found = _tokens(_config(tokenizer, ids, patch, template=template, label_mask=mask), turns, media)
        assert list(found.ids) == _places(ids, patch)[0]
        assert list(found.labels) == labels


def test_dialogues_about_images(load_golden, tokenizer):
    golden = load_golden(FILE)
    case, patch = golden["instruct_llava"], golden["image_patch_token_id"]
    turns = [turn | {"value": turn["value"].replace("<image>", PLACE)} for turn in case["conversations"]]
    config = _config(tokenizer, case["input_ids"], patch, label_mask="drift")
    found = _tokens(config, turns, Media(is_image=True))
    assert list(found.ids) == _places(case["input_ids"], patch)[0]
    assert list(found.labels) == case["labels"]


def test_message_about_frames(load_golden):
    told = load_golden(FILE)["instruct_video"][0]["msg"]
    assert frames_message((0.0, 1.3, 2.5), 3) == told


def test_exact_labels_are_the_answers_and_their_ends(load_golden, tokenizer):
    """What the drift spoils: labels are the answers, whole, and the mark after each."""
    golden = load_golden(FILE)
    words = load_tokenizer(tokenizer)
    for case in golden["instruct_video"]:
        turns, media = _videochat(case)
        config = _config(tokenizer, case["vicuna_input_ids"], golden["image_patch_token_id"])
        found = _tokens(config, turns, media)
        learnt = words.decode([label for label in found.labels if label != IGNORE])
        assert learnt.split() == "".join(f" {part['a']}\n###" for part in case["QA"]).split()
        spoken = dialogue(turns, "vicuna_v0", "", media)
        assert len(spoken.answers) == len(case["QA"])


# LLMVA-GEBC -----------------------------------------------------------------------------------------------------------


def test_features_brought_to_one_length(load_golden):
    for name, want in load_golden("gebc_llmva_data.json")["resize_nearest_source_index"].items():
        length, count = map(int, name.split("->"))
        assert nearest_places(length, count).tolist() == want


def _array(values: torch.Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, values.numpy())
    return file.getvalue()


def _boundary_record(item: dict[str, Any], kind: str, text: str | None = None) -> Record:
    names = ("intern_video", "omni", "clip")
    others = dict(zip(names, item["other_features_list"], strict=True)) if "other_features_list" in item else {}
    members = {"q_former": item["image_query_tokens"], **others} if others else {}
    label = item["prompt"].removeprefix("This video describes the ").partition(".")[0]
    boundary = {
        "id": "v_0",
        "kind": label,
        "timestamp": item["timestamp"],
        "prev_timestamp": 0.0,
        "next_timestamp": item["boundary_duration"],
        **dict.fromkeys(KINDS, "-"),
        kind: item["text_input"],
    }
    return Record(
        key="v",
        shard="s",
        row=0,
        video=None,
        annotation={"duration": item["duration"], "boundaries": [boundary]},
        num_frames=-1,
        fps=0,
        decoders=(),
        members={f"{name}.npy": _array(values) for name, values in members.items()},
    )


def test_prompts_of_boundaries(load_golden):
    for label, kind, want in load_golden("gebc_llmva_data.json")["prompts"]:
        item = {"prompt": f"This video describes the {label}.", "timestamp": 1, "boundary_duration": 2, "duration": 3}
        asks = BoundaryConfig().asks(_boundary_record({**item, "text_input": "a"}, kind))
        assert asks[KINDS.index(kind)].question == want


def test_a_batch_of_boundaries(load_golden, golden):
    golden_file = load_golden("gebc_llmva.pt")
    sizes, given = golden_file["config"], golden_file["inputs"]
    want, items = given["batch"], given["raw_items"]
    _, frame_tokens, frame_dim = items[0]["image_query_tokens"].shape
    config = BoundaryConfig(
        tokenizer=golden("gebc_tokenizers") / "opt",
        frame_tokens=frame_tokens,
        frame_dim=frame_dim,
        num_video_tokens=sizes["num_video_query_token"] + sizes["num_other_feat_query_token"],
        other_dims=tuple(sizes["other_feat_dims"]),
        other_length=sizes["max_seq_len"],
        max_caption_length=sizes["max_txt_len"],
    )
    examples = []
    for item in items:
        kind = next(kind for kind in KINDS if item["prompt"].endswith(LEADS[kind]))
        record = _boundary_record(item, kind)
        examples += config.train(record, SampleRng(0), Visit(KINDS.index(kind), 0, ("caption",)))
    batch = config.collate(examples, SampleRng(0))
    assert torch.equal(batch.frame_tokens, want["image_query_tokens"].flatten(0, 1))
    assert batch.frame_counts == (len(want["image_query_tokens"][0]),) * len(items)
    assert torch.equal(batch.extra["other"], want["other_features_list"].squeeze(2))
    assert torch.equal(batch.extra["boundary"], want["reference_points"])
    rows = batch.views["caption"]
    ids, targets = rows.tokens.split(rows.lengths), rows.targets.split(rows.target_counts)
    prompts = given["prompt_ids_padded"]
    for number, (row, learnt) in enumerate(zip(ids, targets)):
        lead = [sizes["bos_token_id"], *given["video_prefix_ids"], *[0] * config.num_video_tokens]
        prompt = prompts[number][given["prompt_attention_mask"][number].bool()].tolist()
        text = [token for token in given["text_ids"][number].tolist() if token != sizes["pad_token_id"]]
        assert row.tolist() == lead + prompt + text
        assert learnt.tolist() == text


# Captions of Video-LLaMA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["stage2_caption", "stage1_no_prompt_trunc12"])
def test_rows_of_captions(load_golden, tokenizer, case):
    recorded = load_golden("gebc_videollama.pt")
    sizes, want = recorded["config"], recorded["outputs"]["cases"][case]
    asked = case == "stage2_caption"
    line = PLACE + want["prompt"].partition("</Image>")[2].removesuffix(" ###Assistant: ") if asked else ""
    config = DialogueConfig(
        tokenizer=tokenizer,
        num_video_tokens=sizes["num_video_query_token"],
        clean="none",
        prompts=(line,) if asked else (),
        caption_end=sizes["end_sym"] if asked else "\n",
        max_caption_length=sizes["max_txt_len"] if asked else max(map(len, want["text_ids"])),
    )
    lead = [sizes["bos_token_id"], *want.get("p_before_ids", []), *[0] * config.num_video_tokens]
    lead += want.get("p_after_ids", [])
    for caption, text in zip(recorded["inputs"]["captions"], want["text_ids"]):
        record = Record(
            key="k", shard="s", row=0, video=None, annotation={"caption": caption}, num_frames=1, fps=0, decoders=()
        )
        found = config._caption_tokens(record, Media(is_image=True), SampleRng(0))
        assert list(found.ids) == lead + text
        assert list(found.labels) == [IGNORE] * len(lead) + text


# ------------------------------------------------------------------------------------------------------ What is written


NEW = 29  # the original's max_length=30 counts the begin token that 4.28 puts before embedded prompts


@pytest.fixture(scope="module")
def recorded_llmva(load_golden: Callable[[str], Any]) -> dict[str, Any]:
    return load_golden("gebc_llmva.pt")


@pytest.fixture(scope="module")
def writer(recorded_llmva: dict[str, Any]) -> Llmva:
    c = recorded_llmva["config"]
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
        frame_tokens=recorded_llmva["inputs"]["batch"]["image_query_tokens"].shape[2],
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
    found = model.load_state_dict(to_ours(recorded_llmva["state_dict"], (*LLMVA, *LLM)), strict=False)
    assert not found.missing_keys
    assert not found.unexpected_keys
    return model.eval()


def batch_of(recorded_llmva: dict[str, Any], chosen: list[int]) -> Batch:
    inputs, places = recorded_llmva["inputs"], recorded_llmva["outputs"]["video_tokens"].shape[1]
    places += recorded_llmva["outputs"]["other_tokens"].shape[1]
    rows = []
    for place, number in enumerate(chosen):
        prompt = inputs["prompt_ids_padded"][number][inputs["prompt_attention_mask"][number].bool()].tolist()
        start = [recorded_llmva["config"]["bos_token_id"], *inputs["video_prefix_ids"]]
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


def texts(writer: Llmva, recorded_llmva: dict[str, Any], chosen: list[int], **settings: Any) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=NEW, **settings)
    end = recorded_llmva["config"]["eos_token_id"]
    return generate(writer, batch_of(recorded_llmva, chosen), config, ends=[[end]])


def recorded_texts(ids: Tensor, recorded_llmva: dict[str, Any]) -> list[list[int]]:
    """Without the begin token, and up to the end."""
    return [cut(row[1:], [[recorded_llmva["config"]["eos_token_id"]]]) for row in ids.tolist()]


@pytest.mark.parametrize(("name", "beams"), [("greedy", 1), ("beam2_yaml", 2), ("beam5_default", 5)])
def test_the_batch_of_the_original(writer: Llmva, recorded_llmva: dict[str, Any], name: str, beams: int) -> None:
    want = recorded_texts(recorded_llmva["outputs"]["generate"][name]["ids"], recorded_llmva)
    assert texts(writer, recorded_llmva, [0, 1, 2], num_beams=beams, rules="4.28", prompt_pad="right") == want


@pytest.mark.parametrize(("name", "beams"), [("greedy", 1), ("beam2", 2)])
def test_one_by_one(writer: Llmva, recorded_llmva: dict[str, Any], name: str, beams: int) -> None:
    ids = recorded_llmva["outputs"][f"generate_single_{name}_ids"]
    want = [recorded_texts(row, recorded_llmva)[0] for row in ids]
    assert [texts(writer, recorded_llmva, [n], num_beams=beams, rules="4.28")[0] for n in range(len(ids))] == want
    if beams == 1:
        assert texts(writer, recorded_llmva, [2, 0, 1]) == [want[2], want[0], want[1]]


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


# --------------------------------------------------------------------------------------------------------------- Scores


Words = list[list[str]]


@pytest.fixture
def challenge(load_golden: Callable[[str], Any]) -> Any:
    return load_golden("gebc_metrics.json")


@pytest.fixture
def challenge_words(challenge: Any) -> tuple[Words, list[Words]]:
    """The words of texts and of references, from the recorded words themselves."""
    split = challenge["tokenized"]
    texts = [text.split(" ") if text else [] for text in split["hyp"]]
    return texts, [[one.split(" ") if one else [] for one in several] for several in split["refs"]]


def test_words(challenge: Any) -> None:
    for pair, own, others in zip(
        challenge["pairs"], challenge["tokenized"]["hyp"], challenge["tokenized"]["refs"], strict=True
    ):
        assert " ".join(tokenize(pair["hyp"])) == own
        assert [" ".join(tokenize(text)) for text in pair["refs"]] == others


def test_bleu(challenge: Any, challenge_words: tuple[Words, list[Words]]) -> None:
    assert bleu(*challenge_words) == pytest.approx(challenge["scores"]["Bleu"], abs=1e-12)
    each = [bleu([text], [others]) for text, others in zip(*challenge_words, strict=True)]
    for order in range(4):
        scores = challenge["scores"]["per_item"][f"Bleu_{order + 1}"]
        assert [one[order] for one in each] == pytest.approx(scores, abs=1e-12)


def test_rouge_l(challenge: Any, challenge_words: tuple[Words, list[Words]]) -> None:
    scores = rouge_l(*challenge_words)
    assert scores == pytest.approx(challenge["scores"]["per_item"]["ROUGE_L"], abs=1e-12)
    assert sum(scores) / len(scores) == pytest.approx(challenge["scores"]["ROUGE_L"], abs=1e-12)


def test_cider(challenge: Any, challenge_words: tuple[Words, list[Words]]) -> None:
    scores = cider(*challenge_words)
    assert scores == pytest.approx(challenge["scores"]["per_item"]["CIDEr"], abs=1e-12)
    assert sum(scores) / len(scores) == pytest.approx(challenge["scores"]["CIDEr"], abs=1e-12)


def writings(pairs: list[Any], **more: Any) -> list[Writing]:
    return [Writing(key=str(at), text=pair["hyp"], references=pair["refs"], **more) for at, pair in enumerate(pairs)]


def test_whole_set(challenge: Any) -> None:
    figures = score(writings(challenge["pairs"]))
    assert [figures[f"bleu{order}"] for order in range(1, 5)] == pytest.approx(challenge["scores"]["Bleu"], abs=1e-9)
    assert figures["rouge_l"] == pytest.approx(challenge["scores"]["ROUGE_L"], abs=1e-9)
    assert figures["cider"] == pytest.approx(challenge["scores"]["CIDEr"], abs=1e-9)


def test_the_challenge_s_figures(challenge: Any) -> None:
    """The first reference of the first thirds of the pairs, as subject, status before, status after, in percent."""
    truth = challenge["gebc_style_first_ref_only"]
    pairs = [{"hyp": pair["hyp"], "refs": pair["refs"][:1]} for pair in challenge["pairs"]]
    third = len(pairs) // 3
    rows = [
        row
        for number, kind in enumerate(GEBC_KINDS)
        for row in writings(pairs[number * third : (number + 1) * third], kind=kind, video="v")
    ]
    for row in rows:
        row.id, row.key = row.key, f"{row.key}/{row.kind}"
    figures = score(rows)
    for ours, theirs in (("rouge_l", "ROUGE_L"), ("cider", "CIDEr")):
        for kind in GEBC_KINDS:
            assert 100 * figures[f"{ours}_{kind}"] == pytest.approx(truth[kind][theirs], abs=1e-6)
        assert figures[f"mean_{ours}"] == pytest.approx(truth[f"mean_{theirs}"], abs=1e-8)
    total = truth["mean_ROUGE_L"] + truth["mean_CIDEr"]
    assert figures["overall_cider_rouge_l"] == pytest.approx(total, abs=1e-8)
