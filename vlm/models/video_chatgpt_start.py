"""A published file of Video-ChatGPT or its variant as the trained tensors of a model, without a conversion before."""

from __future__ import annotations

from pathlib import Path

import torch

from vlm.models import video_chatgpt_files
from vlm.models.system import System
from vlm.types import UserError
from vlm.weights import diff_keys


def put_published(model: System, words: int, file: Path) -> str:
    """Set what trains, from a projector file or a whole model.bin.

    Args:
        words: of the language model, before the three of videos.
    Returns:
        what was read, for a person.
    Raises:
        UserError: a file of another system; other sizes; another language model than this one's, by the rows and blocks
            that the file has of it.
    """
    found = video_chatgpt_files.read(file, None)
    own = dict(model.named_parameters())
    want = {name: p for name, p in own.items() if p.requires_grad}
    beside = {}
    rows = found.tensors.get(video_chatgpt_files.ROWS)
    if rows is not None and len(rows) != words + 1:  # <vid_patch> is the last of them
        raise UserError(
            f"{file}: its embedding has {len(rows) + 2} rows, but that of the language model with the three words of "
            f"videos has {words + 3}, so it is not known which rows the marks are; model.llama.vocab_size is {words}"
        )
    for name, tensor in found.tensors.items():
        if name == video_chatgpt_files.ROWS:
            beside["llm.model.embed_tokens.weight"] = tensor[:words]
        elif name in own and name not in want:
            beside[name] = tensor[:words] if name == "llm.lm_head.weight" else tensor
    for name, tensor in beside.items():
        mine = own[name].detach()[: len(tensor)]
        if mine.shape != tensor.shape or not torch.equal(mine, tensor.to(mine.dtype).to(mine.device)):
            raise UserError(
                f"{file}: {name.removeprefix('llm.')} in the file is not that of model.llama.path: "
                "it was trained for another language model, and on this one it would write "
                "noise"
            )
    held = {name: t for name, t in found.tensors.items() if name in want or not (name in own or name in found.unused)}
    diff_keys(held, want).require(f"{file} as the trained part of this recipe's model")
    video_chatgpt_files.check_sound({name: held[name] for name in want}, str(file))
    with torch.no_grad():
        for name, target in want.items():
            target.copy_(held[name])
    return f"{file}, {len(want)} tensors" + (
        "" if beside else "; it says nothing of the language model that it was trained for"
    )
