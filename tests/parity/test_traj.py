"""Whole training runs of Vamos, Flipped-VQA and ViCo: every loss, gradient norm and validation of the recorded epochs.

The runs go from the published files' layout to trained parameters: questions, captions and features of tiny_data, our
views and encoder with the recordings' toy tokenizer, our rows, model and AdamW groups. The loop below is the original's
rule of accumulation (a mean of micro-batch means; what is left over at an epoch's end is dropped); order, learning
rates and drawn captions come from the recording.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import text_rows as t
import torch
from torch import Tensor
from torch.testing import assert_close

from vlm.data.packing import Row, pack, pack_trees, row_of, share_prefixes
from vlm.data.prompts import PromptEncoder
from vlm.data.views import VIEWS, Item, without_lead
from vlm.models.vamos import Vamos
from vlm.recipe import load
from vlm.run.optim import parameter_groups, warmup_cosine
from vlm.types import Batch
from vlm.weights import read_state_dict

STEP_OF = {"vamos": "vamos_vis_cap.pt", "flipped": "flipped_all.pt", "vico": "vico_star.pt"}
"""A recorded step of each system: it states the toy tokenizer."""
KINDS = {"C": ("CH", "CW"), "T": ("TN", "TC", "TP"), "D": ("DL", "DC", "DO")}
# seen over all epochs: losses 1e-6, gradient norms 2e-6 relative, final parameters 7e-6


class ToyTokenizer:
    """The tokenizer of the recordings, from the rule that they state."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self.pieces = re.compile(meta["toy_regex"])
        self.special = meta["toy_special"]
        self.first, self.count = map(
            int, re.fullmatch(r"id = (\d+) \+ crc32\(piece\) % (\d+)", meta["toy_rule"]).groups()
        )
        self.bos, self.eos, self.newline = meta["bos"], meta["eos"], meta["toy_special"]["\n"]
        self.vocab_size = meta["vocab"]

    def encode(self, text: str) -> list[int]:
        return [self.special.get(p, self.first + crc32(p.encode()) % self.count) for p in self.pieces.findall(text)]

    def tokens_before(self, text: str, place: int) -> int:
        """A token belongs to the text in which its last letter stands."""
        return sum(match.end() <= place for match in self.pieces.finditer(text))


@dataclass
class Questions:
    """One split of tiny_data/nextqa."""

    rows: list[dict[str, str]]
    features: dict[str, Tensor]
    captions: dict[str, str]

    def item(self, number: int, context: str = "", caption: str = "") -> Item:
        row = self.rows[number]
        options = tuple(row[f"a{i}"] for i in range(5))
        return Item(
            question=row["question"], options=options, answer=int(row["answer"]), context=context, caption=caption
        )

    def video(self, number: int, num_frames: int) -> Tensor:
        """(N, D): evenly drawn frames, zeros behind a short video, zeros where there is none."""
        stored = self.features.get(self.rows[number]["video"])
        if stored is None:
            return torch.zeros(num_frames, next(iter(self.features.values())).shape[1])
        stored = stored.float()
        if len(stored) > num_frames:
            return stored[[j * len(stored) // num_frames for j in range(num_frames)]]
        return torch.nn.functional.pad(stored, (0, 0, 0, num_frames - len(stored)))


class Run:
    """A recorded run and our model at its start."""

    def __init__(self, system: str, load_golden: Callable[[str], Any], golden: Callable[[str], Path]) -> None:
        self.values = load_golden(f"traj_{system}.pt")
        step = load_golden(STEP_OF[system])
        self.args = self.values["args"]
        self.tokenizer = ToyTokenizer(step["meta"])
        for text, ids in step["tokenizer_calls"]:
            assert self.tokenizer.encode(text) == ids[1:] or self.tokenizer.encode(text) == ids
        base = self._base(system, step, golden)
        self.model: Vamos = t.build(self.values, base, self.values["adapter_initial"])
        folder = golden("tiny_data") / self.args["dataset"]
        features = read_state_dict(folder / "clipvitl14.pth")
        captions = json.loads((folder / f"llava_v15_{self.args['cap_model']}_n6.json").read_text())
        self.train, self.val = (
            Questions(list(csv.DictReader((folder / f"{split}.csv").open(newline=""))), features, captions)
            for split in ("train", "val")
        )

    def _base(self, system: str, step: Any, golden: Callable[[str], Path]) -> dict[str, Tensor]:
        """The frozen weights that the recording names; the step's, which are the same, where only a part is here."""
        pattern = self.values["meta"]["base"]
        found = sorted(golden(f"traj_{system}.pt").parent.glob(pattern))
        assert found or not os.environ.get("VLM_GOLDENS"), f"no {pattern}"
        return dict(torch.load(found[0], weights_only=True)) if found else step["base_state"]

    def encode(self, objective: str, item: Item, choice: int, sample: int, video: bool) -> Row:
        longest = self.args["max_cap_len" if objective == "cap" else "max_seq_len"]
        count = self.args["max_feats"]
        encoder = PromptEncoder(tokenizer=self.tokenizer, num_video_tokens=count, max_length=longest)
        view = VIEWS[t.VIEWS[objective]]
        # ViCo's first three caption tokens are not learnt
        prompt = view(item, choice, skip=3) if objective == "cap" else view(item, choice)  # type: ignore[call-arg]
        tokens = encoder.encode(prompt)
        assert tokens.dropped == 0
        return row_of(tokens, sample, blind=not video)

    def micro_batch(self, micro: dict[str, Any]) -> Batch:
        video = micro["use_vis"] is not False
        items = []
        for number, text in zip(micro["qid"], micro["text_cap"]):
            if self.values["meta"]["system"] == "vamos":
                items.append(self.train.item(number, context=text))
            else:
                drawn = (text or "").removeprefix("Description: ").removesuffix("\n")
                items.append(self.train.item(number, caption=drawn))
        count = self.args["max_feats"]
        views = {}
        for objective in t.objectives_of({"meta": self.values["meta"], "args": self.args}):
            rows = [self.encode(objective, item, item.answer or 0, i, video) for i, item in enumerate(items)]
            views[t.VIEWS[objective]] = pack(rows, count)
        features = torch.stack([self.train.video(number, count) for number in micro["qid"]]) if video else None
        return Batch(keys=tuple(map(str, micro["qid"])), features=features, views=views)

    def predictions(self) -> list[int]:
        """The chosen option of each validation question, all in one pass with shared prefixes."""
        vamos = self.values["meta"]["system"] == "vamos"
        video, count = not vamos or self.args["use_vis"], self.args["max_feats"]
        trees = []
        for number, row in enumerate(self.val.rows):
            context = without_lead(self.val.captions[row["video"]]) if vamos and self.args["use_cap"] else ""
            item = self.val.item(number, context=context)
            trees.append(share_prefixes([[self.encode("vqa", item, o, number, video) for o in range(5)]]))
        features = torch.stack([self.val.video(n, count) for n in range(len(self.val.rows))]) if video else None
        batch = Batch(keys=("val",), features=features, options=pack_trees(trees, count))
        with torch.no_grad():
            return self.model.predict(batch).argmax(dim=1).tolist()

    def report(self) -> dict[str, float]:
        """Accuracy, over all and by kind."""
        chosen = self.predictions()
        right = [int(row["answer"]) == c for row, c in zip(self.val.rows, chosen)]
        shares = {"acc": sum(right) / len(right)}
        for name, kinds in KINDS.items():
            of = [r for r, row in zip(right, self.val.rows) if row["type"] in kinds]
            shares[name] = sum(of) / len(of) if of else 0.0
        return shares


# Before the first update losses are held to what a single step is. Then AdamW divides gradients by their own size, so
# rounding is multiplied: equally valid orders of summation were seen to differ by 9e-5 in the loss of later batches.
LATER_LOSS = {"rtol": 0.0, "atol": 3e-4}
LATER_NORMS = {"rtol": 5e-4, "atol": 1e-7}


@pytest.mark.parametrize("system", list(STEP_OF))
def test_run(system: str, load_golden: Callable[[str], Any], golden: Callable[[str], Path]) -> None:
    run = Run(system, load_golden, golden)
    values, args, model = run.values, run.args, run.model
    weights = {"caption": args["cap"]}
    groups = parameter_groups(model, lr=0.0, weight_decay=args["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    micros, updates = values["micro"], values["updates"]
    epoch_length = len(micros) // len(values["epochs"])
    assert len(micros) == len(updates) == epoch_length * args["epochs"]
    updated = False
    for number, (micro, update) in enumerate(zip(micros, updates)):
        loss, norms = (LATER_LOSS, LATER_NORMS) if updated else (t.LOSS, t.NORMS)
        if number % epoch_length == 0:
            optimizer.zero_grad(set_to_none=True)
        terms = model(run.micro_batch(micro))
        means = {view: weights.get(view, 1.0) * term.total / term.count for view, term in terms.items()}
        for (view, mean), want in zip(means.items(), micro["losses"], strict=True):
            assert_close(
                float(mean.detach()), want, **loss, msg=lambda x, n=f"micro-batch {number}, {view}": f"{n}: {x}"
            )
        (sum(means.values()) / args["accum_iter"]).backward()  # type: ignore[union-attr]
        assert update["stepped"] == ((number % epoch_length + 1) % args["accum_iter"] == 0)
        if update["stepped"]:
            reached = [p.grad for p in model.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(reached))
            assert_close(norm, update["grad_norm"], **norms, msg=lambda x, n=number: f"micro-batch {n}: {x}")
            for group in optimizer.param_groups:
                group["lr"] = update["lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            updated = True
        if (number + 1) % epoch_length == 0:
            wanted = values["epochs"][number // epoch_length]["val"]
            for name, share in run.report().items():
                assert share == pytest.approx(wanted[name], abs=1e-6), f"epoch {number // epoch_length}, {name}"
    after = model.state_dict()
    for name, want in values["adapter_final"].items():
        assert_close(after[name], want, rtol=0.0, atol=1e-3, msg=lambda x, n=name: f"{n}: {x}")
        assert float((after[name] - want).abs().mean()) < 2e-5, name
    moved = {n for n in values["adapter_final"] if not torch.equal(after[n], values["adapter_initial"][n])}
    assert moved == {n for n in values["adapter_final"] if not n.startswith("layers.") or _is_prompted(n, args, model)}


def _is_prompted(name: str, args: dict[str, Any], model: Vamos) -> bool:
    """Whether a gate belongs to a block with prompts."""
    return int(name.split(".")[1]) >= model.config.llama.layers - args["adapter_layer"]


@pytest.mark.parametrize("system", ["vamos", "flipped"])  # ViCo's run there drops micro-batches at the end of an epoch
def test_rates_of_the_recipes(system: str, load_golden: Callable[[str], Any]) -> None:
    values = load_golden(f"traj_{system}.pt")
    args, rates = values["args"], [update["lr"] for update in values["updates"] if update["stepped"]]
    optim = load("vamos.nextqa_vis" if system == "vamos" else "llama_vqa.nextqa").optim
    assert optim.min_lr == args["min_lr"]
    warmup = args["warmup_epochs"] * len(rates) // args["epochs"]
    ours = [
        warmup_cosine(
            step, total_steps=len(rates), warmup_steps=warmup, peak=args["lr"], final=optim.min_lr,
            peak_twice=optim.warmup_peak_twice,
        )
        for step in range(len(rates))
    ]  # fmt: skip
    assert ours == pytest.approx(rates, rel=1e-9, abs=1e-12)
