"""Stories as captions and dialogues: the rows that Video-LLaMA's demo gives its language model, in words alone.

As vlm/models/story_rows.py, in the templates of vlm/data/templates.py. Forms:

- `bare`: video -> caption, without a word before it: the first stage
- `asked`: video and a line that asks for a caption -> caption: the second
- `dialogue`: video, question -> answer, question -> answer …
"""

from __future__ import annotations

from pathlib import Path

import torch

from vlm.data.prompts import PromptEncoder
from vlm.data.templates import PLACE, VICUNA_END, Media, caption_lead, dialogue
from vlm.data.tokenizers import SentencePieceTokenizer, Tokenizer
from vlm.models.story_rows import Rows, encode_rows, train_tokenizer, word_ids
from vlm.sources.common_stories import NUM_TOLD, stories
from vlm.types import Prompt, Text

ASK = f"{PLACE} Describe this video."
"""The line that asks for a caption."""
FIXED = (f"{VICUNA_END}Human: <Video>", "</Video>", "Describe this video.", "Human:", "Assistant:", VICUNA_END)
"""What the template writes."""
FORMS = ("bare", "asked", "dialogue")
VOCAB_SIZE = 648  # words of the tokenizer, which follows from the expressions alone


def encode_dialogues(tokenizer: Tokenizer, number: int, seed: int) -> dict[str, Rows]:
    """The rows of each form about `number` stories."""
    told = list(stories(number, seed))
    encoder = PromptEncoder(tokenizer=tokenizer, num_video_tokens=NUM_TOLD)
    ids = word_ids(tokenizer, [story.frames for story in told])
    words = torch.tensor([[[ids[word] for word in frame] for frame in story.frames] for story in told])
    prompts: dict[str, list[Prompt]] = {form: [] for form in FORMS}
    for story in told:
        caption = story.annotation["caption"]
        prompts["bare"].append((*caption_lead(None, "vicuna_v0", "", Media()), *_caption(caption, "\n")))
        prompts["asked"].append((*caption_lead(ASK, "vicuna_v0", "", Media()), *_caption(caption, VICUNA_END)))
        prompts["dialogue"].append(dialogue(story.annotation["conversations"], "vicuna_v0", "", Media()).prompt)
    return {form: encode_rows(encoder, several, words, end=False) for form, several in prompts.items()}


def _caption(words: str, end: str) -> Prompt:
    return (Text(words + end, learn=True, apart=True),)


def make_dialogue_tokenizer(file: Path) -> SentencePieceTokenizer:
    """A sentencepiece model that knows each expression of templates and stories as one piece, and any text by bytes."""
    tokenizer = train_tokenizer(file, FIXED)
    assert tokenizer.vocab_size == VOCAB_SIZE, f"{tokenizer.vocab_size} words: set VOCAB_SIZE"
    return tokenizer
