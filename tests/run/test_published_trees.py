"""Every published recipe on a published tree in miniature: tree -> shards -> rows -> a step -> a test.

The tree and the tokenizer are recorded ones; the LLaMA is small and random, in Meta's form.
"""

import json
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch

from vlm.config import override
from vlm.data.loader import TrainLoader, eval_loader
from vlm.data.shards import ShardSet, write_shards
from vlm.data.stream import Samples, Source, Stream
from vlm.recipe import check_inputs, load
from vlm.types import UserError
from vlm.weights import META_LAYER_TABLE, halves_to_pairs

SOURCES = {"nextqa": "nextqa", "intentqa": "intentqa", "ptest": "perception_test", "star": "star"}
SIZES = {"dim": 32, "layers": 2, "heads": 4, "hidden": 48, "vocab_size": 800}
RUNS = [
    "vamos.nextqa_cap",
    "vamos.nextqa_vis",
    "vamos.nextqa_vis_cap",
    "vamos.intentqa_cap",
    "vamos.intentqa_vis",
    "vamos.intentqa_vis_cap",
    "vamos.ptest_vis",
    "vamos.ptest_cap",
    "vamos.ptest_vis_cap",
    "llama_vqa.nextqa",
    "llama_vqa.star",
    "vico.nextqa",
    "vico.star",
    "vico.intentqa",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory, golden) -> Path:
    """pretrained/llama/7B/{consolidated.00.pth,params.json} and the tokenizer beside it."""
    from vlm.models.llama_base import LlamaBaseConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = LlamaBaseConfig(**SIZES).build().state_dict()
    meta = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for block in range(SIZES["layers"]):
        for theirs, ours in META_LAYER_TABLE:
            tensor = state[f"model.layers.{block}.{ours}"]
            if ours in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                tensor = halves_to_pairs(tensor, SIZES["heads"])
            meta[f"layers.{block}.{theirs}".replace("\\", "")] = tensor
    folder = tmp_path_factory.mktemp("pretrained") / "llama"
    (folder / "7B").mkdir(parents=True)
    torch.save(meta, folder / "7B" / "consolidated.00.pth")
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "vocab_size": -1, "multiple_of": 16}
    (folder / "7B" / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes((golden("tiny_llama_tokenizer") / "tokenizer.model").read_bytes())
    return folder


@pytest.fixture(scope="module")
def trees(tmp_path_factory, golden):
    """Shards of every miniature tree, by name of the set and split."""
    made = {}
    for name, source in SOURCES.items():
        root = golden("tiny_data") / name
        for split in ("train", "test" if name == "intentqa" else "val"):
            out = tmp_path_factory.mktemp(f"{name}_{split}") / "shards"
            items = import_module(f"vlm.sources.{source}").read(root, split, ())
            write_shards(items, out, arguments={"source": source, "split": split})
            made[name, "train" if split == "train" else "test"] = ShardSet(out)
    return made


@pytest.mark.parametrize("name", RUNS)
def test_from_the_published_tree_to_a_score(name, llama, trees):
    dataset = name.split(".")[1].split("_")[0]
    sizes = [f"model.llama.{key}={value}" for key, value in SIZES.items()]
    changes = [*sizes, f"model.llama.path={llama / '7B'}", f"inputs.tokenizer={llama / 'tokenizer.model'}"]
    changes += ["model.llama.kv_heads=none", "model.llama.norm_eps=1e-6", "model.llama.rope_theta=10000"]
    recipe = override(load(name), changes)
    check_inputs(recipe)
    torch.manual_seed(0)
    model = recipe.model.build()
    shards = trees[dataset, "train"]
    count = len(Samples(shards, recipe.inputs))
    assert count == int(shards.num_questions.sum()) >= 2
    loader = TrainLoader(
        Stream([Source(shards)], 0, recipe.inputs),
        recipe.inputs,
        views=list(recipe.views),
        global_batch_size=2,
        world_size=1,
        rank=0,
        micro_batch_size=2,
        start_step=0,
        stop_step=-(-count // 2) + 1,  # into the second epoch, in which alternating recipes show frames
        workers=0,
    )
    seen_video = []
    for step in loader:
        batch = step[0].batch
        terms = model(batch)
        assert set(terms) == set(recipe.views)
        assert {view: term.count for view, term in terms.items()} == model.counts(batch)
        assert all(torch.isfinite(term.total) and term.count for term in terms.values())
        assert terms["answer"].count >= 3 * len(batch.keys)
        seen_video.append(bool(batch.views["answer"].slots.numel()))
    if recipe.inputs.alternate:
        assert not seen_video[0]
        assert seen_video[-1]
    else:
        assert set(seen_video) == {recipe.inputs.use_video}
    for item in eval_loader(trees[dataset, "test"], recipe.inputs, (), 0, range(1), 0):
        assert not item.reason
        with torch.no_grad():
            scores = model.predict(recipe.inputs.test_batch(item.views[""]))
        assert scores.shape == (len(item.asks), len(item.asks[0].options))
        assert torch.isfinite(scores).all()


def test_the_recipe_of_another_llama_is_refused(llama):
    tokenizer = f"inputs.tokenizer={llama / 'tokenizer.model'}"
    recipe = load("vamos.nextqa_vis", [f"model.llama.path={llama / '7B'}", tokenizer])
    with pytest.raises(UserError, match=r"has 800 words, but the vocabulary of model\.llama .* has 128256"):
        check_inputs(recipe)
    recipe = load("vamos.nextqa_vis", [f"model.llama.path={llama / '7B'}", tokenizer, "model.llama.vocab_size=800"])
    with pytest.raises(UserError, match="another LLaMA than the recipe's"):
        recipe.model.build()
