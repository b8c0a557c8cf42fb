"""How a language model writes: the settings of `vlm.models.generation`, in a file of their own that needs no torch, so
that recipes load at once."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal


@dataclass(kw_only=True, slots=True)
class GenerationConfig:
    """Greedy, beam search (`num_beams`) or sampling (`sample`). Ends are the end token and whatever else the inputs
    say ends a text; a text is what stands before its first end."""

    max_new_tokens: int = 32
    """Tokens of a text, its end included, at most."""
    min_new_tokens: int = 0
    """Tokens before which no text ends."""
    num_beams: int = 1
    """Beams of beam search; 1: greedy, or sampling."""
    sample: bool = False
    """Draw each token by its probability. What is drawn depends on the recipe's seed and the text's key alone, not on
    what else is in the batch."""
    temperature: float = 1.0
    """Divisor of the logits that are sampled from: below 1 surer, above 1 wilder."""
    top_k: int | None = None
    """Sample among so many likeliest tokens, before `top_p`; none: among all. Video-ChatGPT's variant for Breakfast is
    published with temperature 0.2 and 25."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that have this probability together (nucleus sampling); 1: among all."""
    repetition_penalty: float = 1.0
    """What makes tokens that were written before less likely (arXiv 1909.05858, section 4.1); 1: off. What the prompt
    says does not count as written."""
    length_penalty: float = 1.0
    """Beam search compares sums of log-probabilities divided by length to this power."""
    rules: Literal["hf", "4.28"] = "hf"
    """Rules of beam search. hf: those of the installed transformers. 4.28: those of transformers 4.28, which the
    published GEBC captions were made with: a token more is counted for each text, none for its end, and a text may
    stop later the further back it stands in the batch."""
    prompt_pad: Literal["left", "right"] = "left"
    """Where prompts that are shorter than others of their batch are filled up. right, only with rules=4.28: as the
    published code of GEBC, which let texts go on from padding, so that they depend on their neighbours."""

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("num_beams", 1)):
            _require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        for name in ("temperature", "repetition_penalty"):
            _require(0 < getattr(self, name) < inf, name, getattr(self, name), "a finite number above 0")
        _require(self.top_k is None or self.top_k > 0, "top_k", self.top_k, "above 0, or none")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(-inf < self.length_penalty < inf, "length_penalty", self.length_penalty, "a finite number")
        short = f"at most generation.max_new_tokens={self.max_new_tokens}"
        _require(self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", self.min_new_tokens, short)
        if not self.sample:
            for name in ("temperature", "top_p"):
                _require(getattr(self, name) == 1, name, getattr(self, name), "1 unless generation.sample is true")
            _require(self.top_k is None, "top_k", self.top_k, "none unless generation.sample is true")
        greedy = "1 with one beam, where nothing is compared: set generation.num_beams too"
        _require(self.num_beams > 1 or self.length_penalty == 1, "length_penalty", self.length_penalty, greedy)
        _require(
            not self.sample or self.num_beams == 1, "num_beams", self.num_beams, "1 where generation.sample is true"
        )
        old = self.rules == "4.28"
        _require(not (old and self.sample), "rules", self.rules, "hf where generation.sample is true")
        _require(
            old or self.prompt_pad == "left", "prompt_pad", self.prompt_pad, "left unless generation.rules is 4.28"
        )


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    """ValueError with name, value and what is allowed."""
    if not holds:
        raise ValueError(f"generation.{name} is {value}; it must be {allowed}")
