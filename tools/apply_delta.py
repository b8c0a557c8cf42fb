"""Make a whole language model of LLaMA and a published delta (Vicuna v0 and v1.1; Ziya; BiLLa).

    python tools/apply_delta.py --base llama/7B --delta vicuna-7b-delta-v0 --target vicuna-7b

BASE is a LLaMA of Meta's or Hugging Face's layout, DELTA the downloaded folder. Tensors are added one at a time and
written as safetensors files, with the delta's config.json and tokenizer. TARGET appears when it is whole; the same
command goes on where a killed one was. docs/convert.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm.files import LOCK, sole_writer, sync, write_json
from vlm.models.llama_delta import KINDS, Merge, open_llama
from vlm.models.llama_facts import expected_shapes, llama_config, read_json
from vlm.models.llama_files import HF_SHARD_BYTES, shared_out
from vlm.types import UserError
from vlm.weights import diff_keys, open_tensors, stream_safetensors

TOKENIZERS = ("tokenizer.model", "tokenizer.json")
ALSO = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")
STATE = "merging.json"

Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        merge(parse(arguments))
    except UserError as error:
        print(f"apply_delta: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", "--base-model-path", type=Path, required=True, metavar="DIR", help="LLaMA, Meta's or Hugging Face's")
    add("--target", "--target-model-path", type=Path, required=True, metavar="DIR", help="is made; must not exist")
    add("--delta", "--delta-path", type=Path, required=True, metavar="DIR", help="Hugging Face folder of the delta")
    add("--kind", choices=KINDS, default="vicuna", help="what of the delta is a difference (default: all of it)")
    add("--shard-bytes", type=int, default=HF_SHARD_BYTES, help="largest weight file (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.shard_bytes < 1:
        parser.error("--shard-bytes must be at least 1")
    return options


def merge(options: argparse.Namespace) -> None:
    """Compare, write file after file beside the target, check, take the target's name, report."""
    target: Path = options.target
    for path in (options.base, options.delta):
        if path.exists() and target.exists() and path.samefile(target):
            raise UserError(f"{target}: is the target and one of the sources; give another --target.")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists. Mend: another --target, or remove it.")
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target.absolute().parent}: no such folder; make it first.")
    if not (options.delta / "config.json").is_file():
        raise UserError(f"{options.delta}: no config.json; a delta is a Hugging Face folder, downloaded whole.")
    tokenizer = [name for name in ALSO if (options.delta / name).is_file()]
    pair = Merge(open_llama(options.base), open_llama(options.delta), options.kind)
    if not any(name in TOKENIZERS for name in tokenizer):
        raise UserError(f"{options.delta}: has none of {', '.join(TOKENIZERS)}; download the delta's tokenizer too.")
    described = pair.described()
    for name, side in (("base", pair.base), ("delta", pair.delta)):
        sizes = f"width {side.config.dim}, {side.config.layers} layers, {side.config.heads} heads, {side.words} words"
        print(f"{name:7} {side.folder}: LLaMA of {sizes}; {_name(side.dtype)}")
    for line in notes(pair):
        print(f"note    {line}")
    work = target.absolute().parent / f".{target.name}.merging"
    with sole_writer(work, "give another --target"):
        written = write_weights(pair, described, work, options)
        for name in ("config.json", *tokenizer):
            shutil.copyfile(options.delta / name, work / name)
        check(work, pair)
        for name in (STATE, LOCK):
            (work / name).unlink()
        for path in work.iterdir():
            path.chmod(0o644)
            sync(path)
        sync(work)
        work.rename(target)
        sync(target.absolute().parent)
    print(f"wrote   {target}: {len(written)} weight files, config.json, {', '.join(tokenizer)}")
    for line in prompts(pair, target):
        print(f"prompt  {line}")


def write_weights(pair: Merge, described: Described, work: Path, options: argparse.Namespace) -> list[str]:
    """Every weight file that is not there yet, and the index; names of the files."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in described.items()}
    parts = shared_out(sizes, options.shard_bytes)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = ["model.safetensors"]
    state = {"base": _files(options.base), "delta": _files(options.delta), "kind": pair.kind, "parts": parts}
    have = go_on(work, state)
    require_room(work, sum(sum(sizes[t] for t in part) for name, part in zip(names, parts) if name not in have))
    for name, part in zip(names, parts):
        if name in have:
            print(f"kept    {name}: written by an earlier start")
            continue
        try:
            stream_safetensors(work / name, {t: described[t] for t in part}, pair.tensor, {"format": "pt"})
        except OSError as error:
            raise UserError(
                f"{work / name}: cannot be written ({error.strerror or error}). The files before it are kept: make "
                "room, and give the same command again."
            ) from error
        print(f"merged  {name}: {len(part)} tensors, {sum(sizes[t] for t in part) / 1e9:.2f} GB", flush=True)
    if len(parts) > 1:
        weight_map = {tensor: name for name, part in zip(names, parts) for tensor in part}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(work / "model.safetensors.index.json", index)
    return names


def go_on(work: Path, state: dict[str, Any]) -> set[str]:
    """Weight files of an earlier start with the same base and delta; what others left there is removed."""
    path = work / STATE
    same = path.is_file() and read_json(path) == json.loads(json.dumps(state))
    for file in work.iterdir():
        if file.name != LOCK and not (same and (file == path or file.suffix == ".safetensors")):
            file.unlink()
    if not same:
        write_json(path, state)
    # a weight file gets its name when it is whole (vlm.files.atomic_file)
    return {file.name for file in work.glob("model*.safetensors")}


def require_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if needed > free:
        raise UserError(
            f"{work.parent}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free. Mend: make room, or give "
            "a --target on another disk."
        )


def check(work: Path, pair: Merge) -> None:
    """What was written opens as the LLaMA that was meant."""
    shapes = {name: tuple(load().shape) for name, load in open_tensors(work).items()}
    diff_keys(shapes, expected_shapes(pair.delta.config)).require(f"{work} as written")
    llama_config(work)


def notes(pair: Merge) -> list[str]:
    """What was decided from the two folders."""
    more = pair.delta.words - pair.base.words
    lines = []
    if more and pair.kind == "ziya":
        lines.append(f"the delta's vocabulary of {pair.delta.words} words is its own: embeddings and output are taken")
    elif more:
        lines.append(f"the delta has {more} more word(s) than the base, added at the end: their rows are the delta's")
    dtype = _name(pair.delta.dtype)
    other = pair.base.dtype != pair.delta.dtype
    lines.append(f"written as {dtype}, as published" + (f"; the base's {_name(pair.base.dtype)} rounded" * other))
    return lines


def prompts(pair: Merge, target: Path) -> list[str]:
    """How the merged model is spoken to, and what recipes say for it. Which Vicuna it is, the vocabulary tells."""
    given = f"model.llama.path={target} inputs.tokenizer={target}"
    if pair.kind == "ziya":
        return [f"recipes video_llama.*_ziya, {given}; Video-LLaMA trained on it with ###Human: … ###Assistant: …"]
    if pair.kind == "billa":
        return [f"recipes video_llama.*_billa, {given}; Video-LLaMA trained on it with ###Human: … ###Assistant: …"]
    if pair.delta.words == pair.base.words:
        return [
            f"{pair.delta.words} words, no [PAD]: Vicuna v1.1. It expects USER: … ASSISTANT: … and ends with </s>.",
            "Video-LLaMA, MiniGPT-4 and the recipes video_llama.* were made with v0 (###Human: … ###Assistant: …): on "
            "v1.1 released weights answer badly, and the recipes refuse its vocabulary. Mend: the delta v0.",
        ]
    return [
        f"{pair.delta.words} words with [PAD]: Vicuna v0. It expects ###Human: … ###Assistant: … and ends with ###, as "
        "Video-LLaMA's and MiniGPT-4's released weights do (inputs.template=vicuna_v0, the default).",
        f"recipes video_llama.pretrain, video_llama.finetune and *_vicuna13b, {given}",
    ]


def _files(folder: Path) -> list[list[Any]]:
    """Name, size and time of what a source's tensors come from: another source must not be taken for the same."""
    suffixes = (".safetensors", ".bin", ".pth", ".json")
    files = sorted(p for p in folder.iterdir() if p.suffix in suffixes)
    return [[str(folder.resolve())], *([p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
