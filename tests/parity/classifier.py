"""What both recorded classifiers (VideoMAE fine-tuning, ViT-LLaMA) are checked for; the test files name the golden.

Every size, seed and setting is read from the file. Tolerances are ten times what independent implementations were seen
to differ by; what this one was seen to differ by stands beside each.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.models.vit_llama import LlamaLayerConfig, ViTLlama, ViTLlamaConfig
from vlm.nn.llama_block import hidden_size, select_layers
from vlm.run.optim import parameter_groups
from vlm.types import Batch
from vlm.weights import META_LAYER_TABLE, rename

LOSS = {"rtol": 0.0, "atol": 2e-5}
LOGITS = {"rtol": 0.0, "atol": 1.5e-4}
GRADIENTS = {"rtol": 0.0, "atol": 4e-5}
NORMS = {"rtol": 3e-5, "atol": 1e-7}


def our_name(name: str) -> str:
    """A parameter's name in this project for its name in the original (they differ in the LLaMA layers alone)."""
    if not name.startswith("llama.layers."):
        return name
    _, _, number, part = name.split(".", 3)
    return f"llama.layers.{number}.{rename([part], META_LAYER_TABLE)[part]}"


def config_of(golden: Mapping[str, Any]) -> ViTLlamaConfig:
    """Our settings for a recorded classifier."""
    c = golden["config"]
    llama = None
    if "llama" in c:
        given = c["llama"]
        llama = LlamaLayerConfig(
            layer=given["first_layer"],
            num_layers=given["n_layers"] - given["first_layer"],
            dim=given["dim"],
            heads=given["n_heads"],
            multiple_of=given["multiple_of"],
            norm_eps=given["norm_eps"],
        )
        assert hidden_size(given["dim"], given["multiple_of"]) == c["llama_hidden"]
    return ViTLlamaConfig(
        dim=c["embed_dim"],
        depth=c["depth"],
        heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        tubelet_size=c["tubelet_size"],
        num_frames=c["all_frames"],
        num_classes=c["num_classes"],
        pooling="mean" if c["use_mean_pooling"] else "cls",
        drop_path=c["drop_path_rate"],
        dropout=c["drop_rate"],
        attention_dropout=c["attn_drop_rate"],
        fc_dropout=c["fc_drop_rate"],
        qkv_bias=c["qkv_bias"],
        init_values=c["init_values"],
        init_scale=c["init_scale"],
        norm_eps=c["norm_eps"],
        label_smoothing=golden["smoothing"],
        llama=llama,
    )


def build(golden: Mapping[str, Any]) -> ViTLlama:
    """Our model with the recorded weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the frozen LLaMA layer has RANDOM weights")  # they are replaced below
        model = config_of(golden).build()
    state = golden["state_dict"]
    trained = {name: tensor for name, tensor in state.items() if not name.startswith("llama.")}
    if model.llama is not None:
        frozen = {name.removeprefix("llama."): t for name, t in state.items() if name.startswith("llama.")}
        layers = select_layers(frozen, 0, len(model.llama.layers), "golden")
        model.llama.load(layers, "golden", frozen["norm.weight"])
    outcome = model.load_state_dict(trained, strict=False)
    assert not outcome.unexpected_keys
    assert not [name for name in outcome.missing_keys if not name.startswith("llama.")]
    return model


class ClassifierParity:
    """Inherit, and set `file`."""

    file: str

    @pytest.fixture(scope="class")
    def golden_values(self, load_golden: Callable[[str], Any]) -> Any:
        return load_golden(self.file)

    @pytest.fixture
    def model(self, golden_values: Any) -> ViTLlama:
        return build(golden_values)

    @pytest.fixture
    def batch(self, golden_values: Any) -> Batch:
        keys = tuple(str(i) for i in range(len(golden_values["labels"])))
        return Batch(
            keys=keys,
            video=golden_values["inputs"],
            label=golden_values["labels"],
            target=golden_values["soft_target"],
        )

    def test_names(self, golden_values: Any, model: ViTLlama) -> None:
        ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert ours == {our_name(name): tuple(t.shape) for name, t in golden_values["state_dict"].items()}
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(golden_values["trainable"])

    def test_epsilons(self, golden_values: Any, model: ViTLlama) -> None:
        """An epsilon ten times too large moves the logits less than the tolerance, so it is read off the modules."""
        norms = [module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert len(norms) == 2 * len(model.blocks) + 1
        assert set(norms) == {golden_values["config"]["norm_eps"]}
        if model.llama is not None:
            norms = [module.variance_epsilon for module in model.modules() if hasattr(module, "variance_epsilon")]
            assert len(norms) == 2 * len(model.llama.layers) + 1
            assert set(norms) == {golden_values["config"]["llama"]["norm_eps"]}

    def test_forward_and_activations(self, golden_values: Any, model: ViTLlama, batch: Batch) -> None:
        # seen: logits 3.6e-7, activations 2.9e-6
        seen: dict[str, Tensor] = {}
        for name in golden_values["activations"]:
            hook = _keep(seen, name)
            model.get_submodule(name).register_forward_hook(hook)
        model.eval()
        with torch.no_grad():
            logits = model.predict(batch)
        torch.testing.assert_close(logits, golden_values["logits"], **LOGITS)
        assert seen.keys() == golden_values["activations"].keys()
        for name, want in golden_values["activations"].items():
            torch.testing.assert_close(seen[name], want, **LOGITS, msg=lambda text, name=name: f"{name}: {text}")

    def test_three_losses(self, golden_values: Any, model: ViTLlama, batch: Batch) -> None:
        # seen: 2.4e-7
        clips = len(batch.keys)
        assert model.counts(batch) == {"label": clips}
        hard = Batch(keys=batch.keys, video=batch.video, label=batch.label)
        cases = {"loss_soft": (batch, 0.0), "loss_label_smoothing": (hard, golden_values["smoothing"])}
        for name, (given, smoothing) in {**cases, "loss_ce": (hard, 0.0)}.items():
            model.config.label_smoothing = smoothing
            term = model(given)["label"]
            assert term.count == clips
            torch.testing.assert_close(float(term.total.detach()) / clips, golden_values[name], **LOSS)

    def test_gradients(self, golden_values: Any, model: ViTLlama, batch: Batch) -> None:
        # seen: gradients 1.8e-7, norms 2.8e-7 relative, their total 7.9e-8
        _mean_loss(model.train(), batch).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == golden_values["grad_norms"].keys()
        for name, norm in golden_values["grad_norms"].items():
            torch.testing.assert_close(float(gradients[name].norm()), norm, **NORMS, msg=lambda t, n=name: f"{n}: {t}")
        for name, want in golden_values["grads"].items():
            torch.testing.assert_close(gradients[name], want, **GRADIENTS, msg=lambda t, n=name: f"{n}: {t}")
        total = torch.nn.utils.get_total_norm(list(gradients.values()))
        torch.testing.assert_close(float(total), golden_values["grad_norm_total"], **NORMS)

    def test_frozen(self, golden_values: Any, model: ViTLlama, batch: Batch) -> None:
        _mean_loss(model.train(), batch).backward()
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen.keys() == {our_name(name) for name in golden_values["frozen"]}
        assert all(p.grad is None for p in frozen.values())

    def test_three_optimizer_steps(self, golden_values: Any, model: ViTLlama, batch: Batch) -> None:
        # seen: losses 2.4e-7, logits 4.8e-7, gradient norms 1.1e-7 relative, parameter norms 3.1e-7 relative
        want = golden_values["train3"]
        before = copy.deepcopy(model.state_dict())
        groups = parameter_groups(
            model, lr=want["lr_schedule"][0], weight_decay=want["wd"], layer_decay=want["layer_decay"]
        )
        optimizer = torch.optim.AdamW(groups, betas=tuple(want["betas"]), eps=want["eps"])
        model.train()
        for step, loss_wanted in enumerate(want["losses"]):
            for group in optimizer.param_groups:
                group["lr"] = want["lr_schedule"][step] * group["lr_scale"]
            optimizer.zero_grad()
            loss = _mean_loss(model, batch)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            with torch.no_grad():
                torch.testing.assert_close(model.logits(batch.video), want["logits"][step], **LOGITS)
            torch.testing.assert_close(float(loss.detach()), loss_wanted, **LOSS)
            torch.testing.assert_close(float(norm), want["grad_norms"][step], **NORMS)
            optimizer.step()
        after = model.state_dict()
        for name, norm in want["param_norms_after"].items():
            have = float(after[our_name(name)].norm())
            torch.testing.assert_close(have, norm, **NORMS, msg=lambda t, n=name: f"{n}: {t}")
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert moved == set(golden_values["trainable"])
        assert want["frozen_llama_unchanged"]


def _mean_loss(model: ViTLlama, batch: Batch) -> Tensor:
    term = model(batch)["label"]
    return term.total / term.count


def _keep(seen: dict[str, Tensor], name: str) -> Callable[[Any, Any, Tensor], None]:
    def hook(module: Any, inputs: Any, output: Tensor) -> None:
        seen[name] = output.detach()

    return hook
