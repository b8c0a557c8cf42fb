"""VideoMAE against the originals' numbers: the fine-tuning ViT, and masked pretraining."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from classifier import LOGITS, LOSS, NORMS, ClassifierParity
from numpy.random import RandomState
from torch import Tensor

from vlm.data.masks import tube_mask
from vlm.models.video_mae import VideoMAE, VideoMAEConfig
from vlm.nn.vision import sinusoid_table
from vlm.types import Batch


class TestClassifier(ClassifierParity):
    file = "videomae_vit_tiny.pt"

    def test_position_table(self, golden_values: Any) -> None:
        want = golden_values["pos_embed"]
        assert torch.equal(sinusoid_table(*want.shape[1:], torch.device("cpu")), want)


class TestPretraining:
    @pytest.fixture(scope="class")
    def values(self, load_golden: Callable[[str], Any]) -> Any:
        return load_golden("videomae_pretrain_tiny.pt")

    @pytest.fixture
    def model(self, values: Any) -> VideoMAE:
        c = values["config"]
        model = VideoMAEConfig(
            dim=c["encoder_embed_dim"],
            depth=c["encoder_depth"],
            heads=c["encoder_num_heads"],
            decoder_dim=c["decoder_embed_dim"],
            decoder_depth=c["decoder_depth"],
            decoder_heads=c["decoder_num_heads"],
            mlp_ratio=c["mlp_ratio"],
            image_size=c["img_size"],
            patch_size=c["patch_size"],
            tubelet_size=c["tubelet_size"],
            num_frames=c["num_frames"],
            qkv_bias=c["qkv_bias"],
            norm_eps=c["norm_eps"],
        ).build()
        assert model.config.cube_values == c["decoder_num_classes"]
        model.load_state_dict(values["state_dict"], strict=True)
        return model

    @pytest.fixture
    def batch(self, values: Any) -> Batch:
        keys = tuple(str(i) for i in range(len(values["mask"])))
        return Batch(keys=keys, video=values["inputs"], mask=values["mask"])

    def test_mask_is_the_originals(self, values: Any) -> None:
        c, generator = values["config"], RandomState(values["mask_seed"])
        rows = c["img_size"] // c["patch_size"]
        for want in values["mask"]:
            mask = tube_mask(c["num_frames"] // c["tubelet_size"], rows, rows, c["mask_ratio"], generator)
            assert mask.tolist() == want.tolist()

    def test_position_tables(self, values: Any) -> None:
        for name in ("encoder_pos_embed", "decoder_pos_embed"):
            table = sinusoid_table(*values[name].shape[1:], torch.device("cpu"))
            assert torch.equal(table, values[name]), name

    def test_epsilons(self, values: Any, model: VideoMAE) -> None:
        norms = [module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert len(norms) == 2 * (len(model.encoder.blocks) + len(model.decoder.blocks)) + 2
        assert set(norms) == {values["config"]["norm_eps"]}

    def test_output_and_activations(self, values: Any, model: VideoMAE, batch: Batch) -> None:
        # seen: 1.4e-6
        seen: dict[str, Tensor] = {}
        for name in values["activations"]:
            model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: output})
            )
        with torch.no_grad():
            output = model.eval().rebuild(batch.video, batch.mask)
        torch.testing.assert_close(output, values["output"], **LOGITS)
        for name, want in values["activations"].items():
            torch.testing.assert_close(seen[name], want, **LOGITS)

    def test_targets(self, values: Any, model: VideoMAE, batch: Batch) -> None:
        # seen: normalised 2.4e-7, raw 0
        torch.testing.assert_close(model.target(batch.video, batch.mask), values["labels"], **LOGITS)
        model.config.normalize_target = False
        raw = model.target(batch.video, batch.mask)
        first = values["labels_raw_first"]
        torch.testing.assert_close(raw[:, : first.shape[1]], first, **LOSS)

    def test_losses(self, values: Any, model: VideoMAE, batch: Batch) -> None:
        # seen: 2.8e-8
        for normalize, name in ((True, "loss"), (False, "loss_raw_target")):
            model.config.normalize_target = normalize
            term = model(batch)["pixels"]
            assert term.count == values["output"].numel() == model.counts(batch)["pixels"]
            torch.testing.assert_close(float(term.total.detach()) / term.count, values[name], **LOSS)

    def test_gradient_norms(self, values: Any, model: VideoMAE, batch: Batch) -> None:
        # seen: 2.6e-7 relative
        term = model.train()(batch)["pixels"]
        (term.total / term.count).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == values["grad_norms"].keys()
        for name, norm in values["grad_norms"].items():
            torch.testing.assert_close(float(gradients[name].norm()), norm, **NORMS, msg=lambda t, n=name: f"{n}: {t}")
        total = torch.nn.utils.get_total_norm(list(gradients.values()))
        torch.testing.assert_close(float(total), values["grad_norm_total"], **NORMS)
