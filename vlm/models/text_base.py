"""The demo's language model: a tiny LLaMA that learns to read, describe and answer from words alone.

Its rows are the prompts that a video system will give it, about stories instead of videos (vlm/models/story_rows.py,
vlm/sources/common_stories.py): each place of the video holds the words that tell a frame, as the sum of their
embeddings over the root of their number, since one video token too must say several things at once. No picture, no
feature and no annotation of a video is used. What comes out is an ordinary Hugging Face folder.

    pretrain(TextBaseConfig(), Path("data/demo/llama"))

What makes it learn in minutes on a processor: its lower blocks first learn to tell, so that what is told is there
when the upper ones come and learn to choose; matrices are trained by Muon (torch.optim.Muon,
https://kellerjordan.github.io/posts/muon/); queries and keys start large, so that from the first step on a head looks
at some places more than at others.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from vlm.data.tokenizers import Tokenizer
from vlm.models import story_dialogues, story_rows, story_segments
from vlm.models.llama_base import LlamaBaseConfig
from vlm.models.story_rows import KINDS, Rows, join
from vlm.types import IGNORE, UserError

SETTINGS = "pretraining.json"  # in the folder: what it was made with and how well it reads
SPEAK = {"bare": 0.3, "asked": 0.3, "dialogue": 0.4}
CUT = {"segments": 0.75, "at": 0.05, "order": 0.15, "counts": 0.05}
TELL = {"questions": {"caption": 0.7, "told": 0.3}, "dialogues": SPEAK, "segments": CUT}
"""Share of each form in a batch while it learns to tell …"""
CHOOSE = {
    "questions": {"caption": 0.08, "told": 0.08, "judged": 0.28, "motion": 0.32, "colour": 0.1, "shape": 0.14},
    "dialogues": SPEAK,
    "segments": CUT,
}
"""… and while it learns to choose. Those that only tell have nothing to choose from: the rates fall there, no more."""
DECAY = 0.4  # of the steps on choosing: in the last ones the rates fall to 0
TOLD = 0.03  # mean loss of the last steps at which telling is learnt
TOGETHER = (
    ("caption", "told"),
    ("judged", *KINDS),
    *((form,) for form in SPEAK),
    ("segments",),
    ("at", "order", "counts"),
)  # forms of about the same length: one pass each
FORMAT = 1  # raise it when the same settings would make another model


@dataclass(kw_only=True, slots=True)
class TextBaseConfig:
    """A LLaMA and its training on stories."""

    speech: Literal["questions", "dialogues", "segments"] = "questions"
    """Which prompts it reads. questions: those of systems that choose between options (vlm/data/views.py); dialogues:
    captions and dialogues, as Video-LLaMA's (vlm/data/templates.py); segments: what happens when, as Video-ChatGPT's
    (vlm/data/chats.py)."""
    dim: int = 64
    """Width (D)."""
    layers: int = 6
    """Blocks."""
    tell_layers: int = 3
    """How many of them, from below, learn to tell before the others are there."""
    heads: int = 4
    """Attention heads of a block."""
    hidden: int = 160
    """Width of the feed-forward part."""
    rope_theta: float = 100.0
    """Base of the rotary embedding. Rows are short, so a small one."""
    stories: int = 10000
    """Stories to learn from."""
    held_out: int = 400
    """Further stories, to say how well it reads."""
    tell_steps: int = 800
    """Optimizer steps on telling alone, at most: they end when it is learnt."""
    choose_steps: int = 600
    """Optimizer steps on choosing too."""
    batch_size: int = 64
    """Rows a step."""
    lr: float = 1e-2
    """Peak learning rate of embeddings, norms and the output layer (AdamW)."""
    matrix_lr: float = 2e-2
    """Peak learning rate of the blocks' matrices (Muon)."""
    warmup_steps: int = 30
    """Linear warmup; then the rates stay, and fall in a cosine to a twentieth while it learns to choose."""
    seed: int = 0
    """Decides stories, initial weights and order."""

    def __post_init__(self) -> None:
        if self.speech not in TELL:
            raise UserError(f"speech is {self.speech!r}; it must be {' or '.join(TELL)}")
        for name in ("stories", "held_out", "tell_steps", "choose_steps", "batch_size", "warmup_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def llama(self, path: Path | None) -> LlamaBaseConfig:
        """The model as a recipe names it; without a path, the model before the first step."""
        return LlamaBaseConfig(
            path=path,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            hidden=self.hidden,
            vocab_size=_SPEECHES[self.speech].vocab_size,
            rope_theta=self.rope_theta,
            random_seed=self.seed,
        )


def dialogue_base() -> TextBaseConfig:
    """The language model of Video-LLaMA's demo: it only tells, so all its blocks learn at once."""
    return TextBaseConfig(speech="dialogues", layers=4, tell_layers=4, tell_steps=500, choose_steps=150)


def segment_base() -> TextBaseConfig:
    """The language model of Video-ChatGPT's demo. Where an action ends is often not certain, so its loss stays above
    `TOLD` and all steps are made."""
    return TextBaseConfig(speech="segments", layers=4, tell_layers=4, stories=8000, tell_steps=100, choose_steps=600)


@dataclass(frozen=True, slots=True)
class _Speech:
    """Rows of one way to speak."""

    vocab_size: int
    tokenizer: Callable[[Path], Tokenizer]
    encode: Callable[[Tokenizer, int, int], dict[str, Rows]]  # of so many stories from a seed
    by_token: bool = False  # what is right is counted by tokens, not by rows: no row is certain as a whole


_SPEECHES = {
    "questions": _Speech(story_rows.VOCAB_SIZE, story_rows.make_tokenizer, story_rows.encode_stories),
    "dialogues": _Speech(
        story_dialogues.VOCAB_SIZE, story_dialogues.make_dialogue_tokenizer, story_dialogues.encode_dialogues
    ),
    "segments": _Speech(
        story_segments.VOCAB_SIZE, story_segments.make_segment_tokenizer, story_segments.encode_segments, by_token=True
    ),
}

Report = Callable[[int, int, str], None]  # steps done, of how many, how it stands


def _silent(done: int, total: int, how: str) -> None:
    pass


def pretrain(config: TextBaseConfig, folder: Path, report: Report = _silent) -> dict[str, float]:
    """Make `folder` (config.json, model.safetensors, tokenizer.model), whole or not at all; the same by the same seed.

    A finished folder of the same settings is kept. Returns the accuracy on stories that were held out, by form.

    Raises:
        UserError: the folder is of other settings, or of something else.
    """
    settings = {"format": FORMAT, **asdict(config)}
    if folder.exists():
        return _finished(folder, settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        speech = _SPEECHES[config.speech]
        tokenizer = speech.tokenizer(unfinished / "tokenizer.model")
        model = initial_model(config)
        train(model, speech.encode(tokenizer, config.stories, 2 * config.seed), config, report)
        held_out = speech.encode(tokenizer, config.held_out, 2 * config.seed + 1)
        accuracy = {form: round(measure(model, rows, by_token=speech.by_token), 4) for form, rows in held_out.items()}
        model.save_pretrained(unfinished)
        (unfinished / SETTINGS).write_text(json.dumps({"settings": settings, "accuracy": accuracy}, indent=1))
        for file in unfinished.iterdir():
            file.chmod(0o644)
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return accuracy


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    try:
        made = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is there, but not a model that this program made ({error}): choose another"
        ) from error
    if made["settings"] != settings:
        names = [name for name in settings if made["settings"].get(name) != settings[name]]
        told = ", ".join(f"{name} {made['settings'].get(name)} there, {settings[name]} now" for name in names)
        raise UserError(f"{folder} was made with other settings ({told}): remove it, or choose another folder")
    return made["accuracy"]


def initial_model(config: TextBaseConfig) -> LlamaForCausalLM:
    """The model before the first step, every weight to be trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its weights are random: that is wanted here
        model = config.llama(None).build()
    model.requires_grad_(True)
    model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        assert isinstance(words, Tensor)
        words.normal_(generator=torch.Generator().manual_seed(config.seed))
        model.lm_head.weight.copy_(words * (0.5 * config.dim**-0.5))
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.mul_(2)
            layer.self_attn.k_proj.weight.mul_(2)
            if number >= config.tell_layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    return model


def predict(
    model: LlamaForCausalLM, rows: Rows, layers: int | None = None, noise: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """((Z, words) logits at what is to be predicted, (Z,) targets), row by row; by the lowest `layers` if given.

    `noise`: blur what tells the frames, each row by its own degree, so that the model also makes something of words
    that are only half there: what a projector gives while it learns.
    """
    embed = model.get_input_embeddings()
    x = embed(rows.ids)
    frames = embed(rows.words).sum(2) / math.sqrt(rows.words.shape[2])
    if noise is not None:
        degree = torch.rand(len(frames), 1, 1, generator=noise)
        frames = frames + degree * torch.randn(frames.shape, generator=noise)
    x = torch.cat([x[:, : rows.first], frames, x[:, rows.first + frames.shape[1] :]], dim=1)
    whole = model.model.layers
    model.model.layers = whole[:layers]
    try:
        hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state[:, :-1]
    finally:
        model.model.layers = whole
    targets = rows.labels[:, 1:]
    learnt = targets != IGNORE
    return model.lm_head(hidden[learnt]), targets[learnt]


@torch.no_grad()
def measure(model: LlamaForCausalLM, rows: Rows, *, by_token: bool = False) -> float:
    """The share of rows whose every token to be predicted is the likeliest one, given those before it; or of tokens."""
    logits, targets = predict(model, rows)
    if by_token:
        return float((logits.argmax(1) == targets).float().mean())
    owner = (rows.labels[:, 1:] != IGNORE).nonzero()[:, 0]
    wrong = torch.zeros(len(rows.ids)).index_add(0, owner, (logits.argmax(1) != targets).float())
    return float((wrong == 0).float().mean())


def train(model: LlamaForCausalLM, tables: dict[str, Rows], config: TextBaseConfig, report: Report) -> None:
    """Next-token training on shuffled rows of every form."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers: tuple[tuple[torch.optim.Optimizer, float], ...] = (
        (torch.optim.Muon(matrices, lr=config.matrix_lr, momentum=0.95, weight_decay=0.0), config.matrix_lr),
        (torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0), config.lr),
    )
    draw = _Order(tables, config.seed)
    blur = torch.Generator().manual_seed(config.seed)

    def step(shares: dict[str, float], factor: float, layers: int | None = None) -> float:
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * factor
        total = 0.0
        for group in TOGETHER:
            parts = [draw(form, max(1, round(shares[form] * config.batch_size))) for form in group if form in shares]
            if parts:
                rows = join(parts)
                share = len(rows.ids) / config.batch_size
                loss = functional.cross_entropy(*predict(model, rows, layers, blur)) * share
                loss.backward()
                total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return total

    most = config.tell_steps + config.choose_steps
    mean, done = 1.0, 0
    while done < config.tell_steps and mean > TOLD:
        warm = min(1.0, (done + 1) / config.warmup_steps)
        mean += 0.05 * (step(TELL[config.speech], warm, config.tell_layers) - mean)
        done += 1
        report(done, most, f"telling, loss {mean:.3f}")
    most = done + config.choose_steps
    for number in range(config.choose_steps):
        left = (config.choose_steps - number) / config.choose_steps
        mean += 0.05 * (step(CHOOSE[config.speech], min(1.0, left / DECAY)) - mean)
        report(done + number + 1, most, f"choosing, loss {mean:.3f}")


class _Order:
    """Rows of each form in random order, again and again."""

    def __init__(self, tables: dict[str, Rows], seed: int) -> None:
        self.tables = tables
        self.generator = torch.Generator().manual_seed(seed)
        self.left = {form: torch.empty(0, dtype=torch.int64) for form in tables}

    def __call__(self, form: str, count: int) -> Rows:
        rows = self.tables[form]
        while len(self.left[form]) < count:
            more = torch.randperm(len(rows.ids), generator=self.generator)
            self.left[form] = torch.cat([self.left[form], more])
        at, self.left[form] = self.left[form][:count], self.left[form][count:]
        return Rows(rows.ids[at], rows.labels[at], rows.words[at], rows.first)
