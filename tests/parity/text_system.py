"""What every recorded step of Vamos, Flipped-VQA and ViCo is checked for; the test files name the goldens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import text_rows as t
import torch
from torch import Tensor
from torch.testing import assert_close

from vlm.models.causal import join
from vlm.models.vamos import Vamos
from vlm.run.optim import parameter_groups
from vlm.types import Batch


class TextSystemParity:
    """Inherit, and parametrize the fixture `name` over golden files."""

    @pytest.fixture
    def values(self, name: str, load_golden: Callable[[str], Any]) -> Any:
        return load_golden(name)

    @pytest.fixture
    def model(self, values: Any) -> Vamos:
        return t.build(values, values["base_state"], values["adapter_state"])

    @pytest.fixture
    def batch(self, values: Any) -> Batch:
        return t.batch_of(values, values["train_batch"], t.objectives_of(values), video=t.uses_video(values))

    def test_trained_tensors(self, values: Any, model: Vamos) -> None:
        """Names are the original's; what the original lists as trained and never uses are our buffers."""
        ours = {n for n, p in model.named_parameters() if p.requires_grad}
        buffers = {n for n, _ in model.named_buffers()}
        reached = {n for n, norm in values["grad_norms"].items() if norm is not None}
        assert ours | buffers == set(values["adapter_state"])
        assert reached <= ours
        unreached = {n for n in ours - reached if not n.startswith("visual_proj")}
        assert not unreached

    def test_constants(self, values: Any, model: Vamos) -> None:
        """An epsilon ten times too large moves the losses less than the tolerance, so it is read off the modules."""
        params = values["params_json"]
        norms = {m.variance_epsilon for m in model.modules() if hasattr(m, "variance_epsilon")}
        assert norms == {params["norm_eps"]}
        theta = params.get("rope_theta", 10000.0)
        width = params["dim"] // params["n_heads"]
        have = torch.tensor(model.llm.model.rotary_emb.frequencies)
        assert_close(have, theta ** (-torch.arange(0, width, 2) / width), rtol=1e-6, atol=0)

    def test_losses(self, values: Any, model: Vamos, batch: Batch) -> None:
        terms = model(batch)
        assert model.counts(batch) == {name: term.count for name, term in terms.items()}
        total = 0.0
        assert all(values["losses"][o] == 0 for o in values["losses"] if o not in t.objectives_of(values))
        for objective in t.objectives_of(values):
            want = values["losses"][objective]
            view = t.VIEWS[objective]
            weight = t.weights_of(values)[view]
            have = weight * float(terms[view].total.detach()) / terms[view].count
            assert_close(have, want, **t.LOSS, msg=lambda text, o=objective: f"{o}: {text}")
            total += have
        assert_close(total, values["total_loss"], **t.LOSS)

    def test_projected_features(self, values: Any, model: Vamos) -> None:
        want = values["visual_proj_out"]
        assert_close(model.project(values["train_batch"]["video"].float()), want, **t.LOGITS)

    def test_logits(self, values: Any, model: Vamos, batch: Batch) -> None:
        """At the labelled places of every view, and at the first places of the first row."""
        rows = list(batch.views.values())
        with torch.no_grad():
            hidden = dict(
                zip(batch.views, model.read(list(batch.views), rows, batch).split([sum(r.lengths) for r in rows]))
            )
            for objective, recorded in values["logits"].items():
                view = t.VIEWS[objective]
                part = batch.views[view]
                starts = torch.tensor([0, *part.lengths]).cumsum(0)
                places = starts[recorded["index"][:, 0]] + recorded["index"][:, 1]
                assert torch.equal(places, part.predictors)
                assert torch.equal(recorded["target"], part.targets)
                assert_close(model.logits(hidden[view][places]), recorded["logits"], **t.LOGITS)
                first = recorded.get("first_sample_positions_0_to_39")
                if first is not None:
                    count = min(len(first), part.lengths[0])
                    assert_close(model.logits(hidden[view][:count]), first[:count], **t.LOGITS)

    def test_frame_scores(self, values: Any, model: Vamos, batch: Batch) -> None:
        if "qav" not in values["extra"]:
            return
        seen: list[tuple[Tensor, Tensor]] = []
        whole = model._order_loss

        def keep(outputs: Tensor, frames: Tensor, order: Tensor) -> Tensor:
            seen.append((outputs @ frames.transpose(1, 2) / model.config.tau, order))
            return whole(outputs, frames, order)

        model._order_loss = keep  # type: ignore[method-assign]
        with torch.no_grad():
            model(batch)
        recorded = values["extra"]["qav"]
        assert_close(seen[0][0].flatten(0, 1), recorded["logits_after_tau"], **t.LOGITS)
        assert torch.equal(seen[0][1], recorded["target"])

    def test_gradients(self, values: Any, model: Vamos, batch: Batch) -> None:
        _objective(values, model, batch).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for name, norm in values["grad_norms"].items():
            if norm is None:
                assert name not in grads, name
                continue
            assert_close(float(grads[name].norm()), norm, **t.NORMS, msg=lambda x, n=name: f"{n}: {x}")
            want = values["grads"][name]
            have = grads[name] if want.shape == grads[name].shape else grads[name].flatten()[: want.numel()]
            assert_close(have, want, **t.GRADIENTS, msg=lambda x, n=name: f"{n}: {x}")
        assert grads.keys() == {n for n, norm in values["grad_norms"].items() if norm is not None}
        assert_close(float(torch.nn.utils.get_total_norm(list(grads.values()))), values["total_grad_norm"], **t.NORMS)

    def test_gradients_of_each_objective(self, values: Any, model: Vamos, batch: Batch) -> None:
        weights = t.weights_of(values)
        assert set(values["grad_norms_per_objective"]) >= set(t.objectives_of(values))
        for objective in t.objectives_of(values):
            norms = values["grad_norms_per_objective"][objective]
            view = t.VIEWS[objective]
            model.zero_grad(set_to_none=True)
            term = model(Batch(keys=batch.keys, features=batch.features, views={view: batch.views[view]}))[view]
            (weights[view] * term.total / term.count).backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            for name, norm in norms.items():
                have = float(grads[name].norm()) if name in grads else 0.0
                assert_close(have, norm or 0.0, **t.NORMS, msg=lambda x, n=f"{objective}, {name}": f"{n}: {x}")

    def test_optimizer_step(self, values: Any, model: Vamos, batch: Batch) -> None:
        step = values["adamw_step"]
        groups = parameter_groups(model, lr=step["lr"], weight_decay=step["weight_decay"])
        optimizer = torch.optim.AdamW(groups, betas=tuple(step["betas"]), eps=step["eps"])
        _objective(values, model, batch).backward()
        optimizer.step()
        after = model.state_dict()
        for name, want in step["params_after"].items():
            have = after[name] if want.shape == after[name].shape else after[name].flatten()[: want.numel()]
            assert_close(have, want, **t.GRADIENTS, msg=lambda x, n=name: f"{n}: {x}")
            assert_close(float(after[name].norm()), step["param_norms_after"][name], **t.NORMS)

    @pytest.mark.parametrize("shared", [False, True], ids=["whole rows", "shared prefixes"])
    def test_options(self, values: Any, model: Vamos, shared: bool) -> None:
        recorded = values["eval_batch"]
        batch = t.batch_of(values, recorded, [], video=t.uses_video(values), options=True, shared=shared)
        with torch.no_grad():
            scores = model.predict(batch)
        assert_close(-scores, values["eval_scores"], **t.LOSS)
        assert torch.equal(scores.argmax(dim=1), values["eval_pred"])
        if not shared:
            rows = join([batch.options])
            with torch.no_grad():
                nll = model.token_losses([model.read(["options"], [rows], batch)], [rows])[0]
            assert rows.target_counts == tuple(values["eval_count"].flatten().tolist())
            recorded_nll = values["eval_token_nll"].flatten(0, 1)
            assert_close(nll, recorded_nll[recorded_nll != 0], **t.LOSS)


def _objective(values: Any, model: Vamos, batch: Batch) -> Tensor:
    terms, weights = model(batch), t.weights_of(values)
    return sum((weights[view] * term.total / term.count for view, term in terms.items()), torch.zeros(()))
