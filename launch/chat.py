"""Talk with a model about a video: on a page in the browser, or in the terminal (--video FILE).

    python launch/chat.py --recipe video_llama.demo --checkpoint runs/demo/video_llama \
        --encoder data/demo/features/train.encoder.safetensors
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any


def open_encoder(recipe: Any, device: Any, encoder: Path | None, rate: float | None) -> Any:
    """What makes the features of a video that a recipe's inputs read; None: they read pixels, or nothing was given.

    Args:
        rate: frames a second, of features at a rate.
    """
    from vlm.models.encoders import open_for
    from vlm.models.eva import TowerConfig
    from vlm.run.encode_one import encode_record
    from vlm.types import UserError

    if recipe.inputs.members == ("video",):
        if encoder is not None:
            raise UserError("this recipe reads pixels (inputs.source=pixels), so --encoder says nothing: leave it out")
        return None
    if encoder is None and not isinstance(getattr(recipe.model, "tower", None), TowerConfig):
        return None
    at_rate: dict[str, Any] = {} if encoder is None or rate is None else {"fps": rate, "frames": None}
    chosen = open_for(recipe.model, recipe.inputs, encoder, **at_rate)
    chosen.encoder.requires_grad_(False).eval()
    # in this process: whoever calls it has seen the whole file decode in another one
    return partial(encode_record, chosen=chosen, device=device, apart=False)


if __name__ == "__main__":  # the process that looks at uploads imports this file again: it must do nothing for it
    from vlm.run.command import chat_main, finish

    finish(chat_main(open_encoder))
