"""A file of Video-ChatGPT or of its Breakfast variant meets the model that it must be: sizes, language model, outputs.

The file does not say which language model it was trained for. Where a person names its folder, the rows that the file
has of its embedding, and the blocks that a whole file has, are compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vlm.config import from_dict, to_dict
from vlm.models.formats import Model
from vlm.models.llama_base import LlamaBaseConfig, read_llama
from vlm.models.llama_facts import llama_config
from vlm.models.llama_files import Tensors
from vlm.models.published import KIND_TITLES, VIDEO_CHATGPT
from vlm.models.video_chatgpt import Part, VideoChatGpt, VideoChatGptConfig
from vlm.models.video_chatgpt_files import ASIDE, EMBEDDING, MARKS, PATCH, ROWS, aside
from vlm.models.video_llama_fit import UNKNOWN, Wish, same_outputs
from vlm.types import Batch, UserError
from vlm.weights import Loader, diff_keys, open_tensors, state_hash

Compare = Callable[[Path, Model], str]
TRAINED: tuple[Part, ...] = ("first_layer", "last_layer", "norm", "lm_head")
"""Parts of the language model that the published variant trained."""
_WORDS = ("llm.model.embed_tokens.weight", "llm.lm_head.weight")


def settle(model: Model, wish: Wish) -> Compare:
    """Set what is frozen apart, compare names and shapes, note the language model.

    Returns:
        what compares the tokens of a fixed random video by the model and by the published formulas.
    Raises:
        UserError: another model than the recipe's, or another language model.
    """
    config = config_of(model, wish)
    path = config.llama.path
    if path is not None and not path.exists():
        if wish.base is not None or wish.to_format == "vlm":
            raise UserError(f"{wish.subject}: its language model {path} is not there. Mend: --base with its folder.")
        path = None
    system = _empty(config)
    _set_frozen_apart(model, system, wish)
    own = {name: t for name, t in model.tensors.items() if not name.startswith(ASIDE)}
    want = {name: tuple(p.shape) for name, p in system.named_parameters() if p.requires_grad}
    diff_keys(own, want).require(f"{wish.subject} ({KIND_TITLES[model.kind]})")
    loaders = {} if path is None else _base(config.llama, path)
    if loaders:
        _compare_frozen(model, loaders, config.llama.vocab_size, wish)
    _note_hash(model, config, system, loaders, wish)
    if wish.to_format == "vlm":
        model.settings = to_dict(replace(config, init_from=None, projection_from=None))
        if loaders:
            _leave_rows(model)
    else:
        _put_frozen_back(model)
        fill_embedding(model, loaders, config, wish)
    model.unused = aside(model.tensors)
    return lambda written, again: compare(config, model, again)


def config_of(model: Model, wish: Wish) -> VideoChatGptConfig:
    """Settings of the model: of the recipe, of the checkpoint itself, else by its tensors and the folder named."""
    if wish.recipe is not None:
        if not isinstance(wish.recipe, VideoChatGptConfig):
            raise UserError(
                f"{wish.subject}: the file is a {KIND_TITLES[VIDEO_CHATGPT]}; the recipe is another system's."
            )
        config = wish.recipe
        if config.marks and MARKS not in model.tensors:
            raise UserError(
                f"{wish.subject}: the file has a projector, but no rows of <vid_start> and <vid_end>, which the recipe "
                f"trains. To begin training with this projector no conversion is needed: model.projection_from=FILE"
            )
    elif model.settings:
        try:
            config = from_dict(VideoChatGptConfig, {**model.settings, "init_from": None, "projection_from": None})
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(
                f"{wish.subject}: its own settings cannot be read ({error}). Mend: name its recipe (--recipe)."
            ) from error
    else:
        config = _derived(model, None if wish.base is None else llama_config(wish.base))
    if wish.base is not None:
        config = replace(config, llama=replace(config.llama, path=wish.base))
    return replace(config, init_from=None, projection_from=None)


def _derived(model: Model, llama: LlamaBaseConfig | None) -> VideoChatGptConfig:
    """What tensors say; the number of places where there are neither encodings nor fusion is the published one."""
    shapes = {name: tuple(t.shape) for name, t in model.tensors.items()}
    width, frame_dim = shapes["mm_projector.weight"]
    states = len([name for name in shapes if re.fullmatch(r"reducers\.\d+\.weight", name)])
    encoded = len([name for name in shapes if name.startswith("pes.")])
    places = shapes["reducers.0.weight"][1] if states else shapes["pes.0.positional_encodings"][0] if encoded else 356
    blocks = {int(m[1]) for name in shapes if (m := re.match(rf"(?:llm|{ASIDE[:-1]})\.model\.layers\.(\d+)\.", name))}
    rows, marks = shapes.get(ROWS), MARKS in shapes
    if llama is None:
        known = {4096: (32, 32, 11008), 5120: (40, 40, 13824)}
        layers, heads, hidden = known.get(width, (max(blocks, default=-1) + 1 or 1, 1, 1))
        gate = next((s for name, s in shapes.items() if name.endswith("mlp.gate_proj.weight")), None)
        llama = LlamaBaseConfig(
            dim=width,
            layers=1 + max(blocks) if blocks else layers,
            heads=heads if width % (2 * heads) == 0 else 1,
            hidden=gate[0] if gate else hidden,
            vocab_size=rows[0] - 1 if rows else 32000,
        )
    return VideoChatGptConfig(
        llama=llama,
        frame_tokens=max(states, 1),
        frame_dim=frame_dim,
        num_video_tokens=places,
        marks=marks,
        positional_encodings=bool(encoded),
        fusion=bool(states),
        train_also=TRAINED if "llm.lm_head.weight" in shapes else (),
    )


def _empty(config: VideoChatGptConfig) -> VideoChatGpt:
    """The model without memory for any tensor, for names, shapes and what of it trains."""
    with torch.device("meta"):
        return VideoChatGpt(replace(config, llama=replace(config.llama, path=None, quantise=None)))


def _set_frozen_apart(model: Model, system: VideoChatGpt, wish: Wish) -> None:
    """What a whole file has of frozen parts is kept as `published.…`, or left behind."""
    known = {name for name, _ in system.named_parameters()}
    frozen = [name for name in model.tensors if name in known and not system.trainable(name)]
    model.tensors = {
        (ASIDE + name.removeprefix("llm.") if name in frozen else name): t for name, t in model.tensors.items()
    }
    if not wish.keep_frozen and wish.to_format == "vlm":
        gone = [name for name in model.tensors if re.match(rf"{ASIDE}(model\.(layers|norm)|lm_head)\b", name)]
        model.tensors = {name: t for name, t in model.tensors.items() if name not in gone}
        if gone:
            model.dropped.append(
                f"what is frozen of the language model ({len(gone)} tensors; --keep-frozen keeps them)"
            )


def _put_frozen_back(model: Model) -> None:
    """The inverse of `_set_frozen_apart`: a file that is written names all parts alike."""
    part = re.compile(rf"{re.escape(ASIDE)}((?:model\.(?:layers|norm)|lm_head)\..+)")
    model.tensors = {part.sub(r"llm.\1", name): t for name, t in model.tensors.items()}


def _base(llama: LlamaBaseConfig, path: Path) -> dict[str, Loader]:
    """Tensors of the language model's folder, as `llm.` + transformers' names."""
    stored = read_llama(open_tensors(path), llama.heads, llama.num_kv_heads, str(path))
    return {f"llm.{name}": load for name, load in stored.items()}


def _compare_frozen(model: Model, loaders: Mapping[str, Loader], words: int, wish: Wish) -> None:
    """UserError where a file's rows or blocks are not the language model's that is named."""
    where = wish.base or "the recipe's language model"
    for name in model.tensors:
        if not name.startswith(ASIDE) or name == PATCH:
            continue
        theirs = model.tensors[name]
        ours = loaders[f"llm.{name.removeprefix(ASIDE)}"]()
        if name == ROWS:
            if len(theirs) != words + 1:  # <vid_patch> is the last of them
                raise UserError(
                    f"{wish.subject}: its embedding has {len(theirs) + 2} rows, but that of {where} with three words "
                    f"of videos has {words + 3}, so it is not known which rows the marks are"
                )
            theirs = theirs[:words]
        if theirs.shape != ours.shape or not torch.equal(theirs, ours.to(theirs.dtype)):
            raise UserError(
                f"{wish.subject}: {name.removeprefix(ASIDE)} in the file is not that of {where}, so it was trained for "
                "another language model, and on this one it would write noise. Mend: --base with the one it was "
                "trained for."
            )


def _note_hash(
    model: Model, config: VideoChatGptConfig, system: VideoChatGpt, loaders: Mapping[str, Loader], wish: Wish
) -> None:
    """Learn, or compare, the hash of what is frozen (`VideoChatGpt.frozen_hash`), which a checkpoint is tied to."""
    if not loaders:
        if config.llama.path is None and (wish.recipe is not None or model.settings):
            found = VideoChatGpt(config).frozen_hash()  # random weights, for tests
        else:
            if model.frozen_hash is None:
                model.frozen_hash = UNKNOWN
                if wish.to_format == "vlm":
                    model.notes.append(
                        "the language model that it belongs to is not known, so no recipe begins with it. Mend: --base "
                        "with its folder, or --recipe whose path is there"
                    )
            return
    else:
        dtype = getattr(torch, config.llama.dtype)
        frozen = {name: load for name, load in loaders.items() if not system.trainable(name)}
        found = state_hash(Tensors({name: partial(_rounded, load, dtype) for name, load in frozen.items()}))
    if model.frozen_hash not in (None, UNKNOWN, found):
        raise UserError(
            f"{wish.subject}: was trained on frozen weights of hash {model.frozen_hash}; those given have {found}: "
            "others, and what it writes would be noise. Mend: the folder that it was trained with."
        )
    model.frozen_hash = found


def _rounded(load: Loader, dtype: torch.dtype) -> Tensor:
    return load().to(dtype)


def _leave_rows(model: Model) -> None:
    """Of an embedding that is the language model's, only the row of <vid_patch> is kept."""
    if ROWS not in model.tensors:
        return
    rows = model.tensors[ROWS]
    model.tensors = {name: t for name, t in model.tensors.items() if name != ROWS} | {PATCH: rows[-1:]}
    model.notes.append(f"the other {len(rows) - 1} rows of its embedding are the language model's, and are not kept")


def fill_embedding(model: Model, loaders: Mapping[str, Loader], config: VideoChatGptConfig, wish: Wish) -> None:
    """Put the language model's rows before the marks, as a published file has them. UserError: they are not known."""
    if MARKS not in model.tensors or ROWS in model.tensors:
        return
    if not loaders:
        raise UserError(
            f"{wish.subject}: a published file holds the whole embedding, of which there are only the rows of the "
            "marks here. Mend: --base with the folder of the language model."
        )
    marks = model.tensors[MARKS]
    rows = loaders[f"llm.{EMBEDDING}"]()
    patch = model.tensors.get(PATCH)
    if patch is None:  # never read: the mean, as in ours
        patch = rows.mean(0, keepdim=True, dtype=torch.float32)
        model.notes.append("the row of <vid_patch>, which is never read, is the mean of the others")
    tensors = {name: t for name, t in model.tensors.items() if name != PATCH}
    model.tensors = tensors | {ROWS: torch.cat([rows.to(marks.dtype), patch.to(marks.dtype)])}


@torch.no_grad()
def compare(config: VideoChatGptConfig, model: Model, again: Model) -> str:
    """Video tokens, and with fusion what blocks add, of a fixed random video: published formulas on `again`, our model
    on `model`'s tensors."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(config.num_video_tokens, config.frame_tokens, config.frame_dim, generator=generator)
    system = _empty(config)
    own = {n: t.float() for n, t in model.tensors.items() if not n.startswith((ASIDE, "llm."))}
    system.load_state_dict(own, strict=False, assign=True)
    batch = Batch(keys=("fixed",), frame_tokens=states, frame_counts=(config.num_video_tokens,), views={})
    tokens = system.encode_video(batch)
    assert tokens is not None
    theirs = {n: t.float() for n, t in again.tensors.items()}

    def encoded(number: int) -> Tensor:
        name = f"pes.{number}.positional_encodings"
        return states[:, number] + theirs[name] if name in theirs else states[:, number]

    expected = encoded(config.frame_tokens - 1) @ theirs["mm_projector.weight"].T + theirs["mm_projector.bias"]
    said = same_outputs(expected[None], tokens, f"a random video, {config.num_video_tokens} tokens")
    if not config.fusion:
        return said
    added = []
    for number in range(config.frame_tokens):
        pooled = encoded(number).T @ theirs[f"reducers.{number}.weight"][0] + theirs[f"reducers.{number}.bias"]
        vector = theirs[f"projecters.{number}.weight"] @ pooled + theirs[f"projecters.{number}.bias"]
        added.append(config.fusion_scale * vector)
    vectors = system.fused(batch)
    assert vectors is not None
    return f"{said}; {same_outputs(torch.stack(added), vectors[:, 0], 'what blocks add')}"
