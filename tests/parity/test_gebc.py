"""Video-LLaMA and LLMVA-GEBC against numbers recorded from the originals: EVA, Q-Former, losses, gradients, schedule.

Measured (largest differences): frame tokens 9.5e-7, video tokens 1.6e-6, losses 1.5e-6, gradient norms 1.7e-6 relative,
boundary embedding 0. What the models write is in test_gebc_generation.py, what they read in test_gebc_data.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gebc_models as g
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from vlm.models.eva import Tower
from vlm.models.llmva import Llmva, boundary_embedding
from vlm.models.name_tables import table
from vlm.models.video_llama import VideoLlama
from vlm.models.video_llama_names import LLMVA, TOWER, VIDEO_LLAMA, to_ours
from vlm.nn.qformer import read_memory
from vlm.recipe import OptimConfig, Recipe, TrainData
from vlm.run.optim import parameter_groups
from vlm.run.train import schedule_of
from vlm.types import IGNORE
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
        assert_close(seen[0], values["outputs"]["visual_encoder_42"], **g.TOKENS)
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
