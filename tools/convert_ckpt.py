"""Convert checkpoints between published formats and ours; strict, bit-exact, and safe to run on files from strangers.

    python tools/convert_ckpt.py vit_b_pretrain.pth ckpt/vit_b --from videomae --to vlm
    python tools/convert_ckpt.py ckpt/vit_b hf/vit_b --from vlm --to hf
    python tools/convert_ckpt.py runs/ssv2_s_llama out.pth --from vlm --to vit_llama --base llama/7B
    python tools/convert_ckpt.py best.pth ckpt/cap --from vamos --to vlm --recipe vamos.nextqa_cap --base llama3/8B
    python tools/convert_ckpt.py llama/7B hf/7B --from meta_llama --to hf

Every conversion goes through our names. Missing or unexpected tensors are an error that shows the nearest names; what
is left behind is printed. What was written is read back and compared before it gets its name. docs/convert.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from vlm.models import gated_files, llama_files, video_chatgpt_files, video_llama_files
from vlm.models.describe import describe
from vlm.models.formats import Model, read_hf, read_pth, write_hf, write_pth
from vlm.models.llama_facts import is_llama_folder
from vlm.models.published import (
    BASE,
    FAMILIES,
    GATED,
    HAS_FROZEN,
    KIND_TITLES,
    LLAMA,
    PROJECTION,
    SEEING,
    TIED,
    TOWER,
    VIDEO_CHATGPT,
    kind_of,
    to_ours,
)
from vlm.models.released import GENERATIONS, input_settings
from vlm.models.settling import Compare, Request, settle
from vlm.models.system import System
from vlm.models.video_llama_files import is_blip2_folder
from vlm.recipe import load
from vlm.run import checkpoint
from vlm.tensor_files import seal
from vlm.types import UserError
from vlm.weights import atomic_file, diff_keys, file_hash, read_state_dict, state_hash, write_safetensors

WEIGHT_FILES = ("model.safetensors", "frozen.safetensors")
UNUSED_FILE = "unused.safetensors"  # what a model of ours has no use for, but a published file holds

# ------------------------------------------------------------------------------------------ our checkpoints


def read_vlm(path: Path, key: str | None) -> Model:
    folder = checkpoint.resolve(path)
    manifest = checkpoint.verify(folder)
    if manifest.get("kind") == LLAMA:
        return replace(llama_files.read_hf(folder), source=manifest["source"], dropped=[])
    tensors = {
        name: t
        for f in (*WEIGHT_FILES, UNUSED_FILE)
        if f in manifest["files"]
        for name, t in read_state_dict(folder / f).items()
    }
    described = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    stated = {name: (entry["shape"], entry["dtype"]) for name, entry in manifest.get("tensors", {}).items()}
    odd = [name for name in described.keys() | stated.keys() if described.get(name) != stated.get(name)]
    if odd and stated:
        name = min(odd)
        raise UserError(
            f"{folder}: manifest.json says {name} is {stated.get(name)}, the weight files have {described.get(name)}; "
            "manifest and weights are not of one checkpoint."
        )
    kind = kind_of(tensors)
    own = read_state_dict(folder / WEIGHT_FILES[0]) if WEIGHT_FILES[0] in manifest["files"] else {}
    learnt = {name: tensors.pop(name) for name in own if re.fullmatch(BASE[kind], name)}
    tensors = to_ours(tensors, "ours", kind)
    dropped = [name for name in sorted(manifest["files"]) if name not in (*WEIGHT_FILES, UNUSED_FILE)]
    return Model(
        kind=kind,
        tensors=tensors,
        source=manifest.get("source", {}),
        dropped=dropped,
        frozen_hash=manifest.get("frozen_hash"),
        step=manifest.get("step", 0),
        settings=(manifest.get("recipe") or {}).get("model"),
        run=manifest.get("recipe") or {},
        learnt=learnt,
        unused=video_llama_files.aside(tensors),  # of Video-ChatGPT alike
    )


def write_vlm(path: Path, model: Model, recipe: System | None) -> None:
    if model.kind == LLAMA:
        llama_files.write_hf(path, model, constants=False)
        parts: list[Mapping[str, Tensor]] = [{}, {}, {}]
    else:
        path.mkdir()
        own = {name: t for name, t in model.trainable().items() if name not in model.unused} | model.learnt
        parts = [own, model.frozen(), {name: model.tensors[name] for name in sorted(model.unused)}]
    for name, part in zip((*WEIGHT_FILES, UNUSED_FILE), parts):
        if part:
            write_safetensors(path / name, part, {"format": "pt"})
    frozen = parts[1]
    tied = model.kind in TIED or (model.kind in (*HAS_FROZEN, *GATED) and not frozen)
    files = {f.name: {"bytes": f.stat().st_size, "sha256": file_hash(f)} for f in sorted(path.iterdir())}
    recipe_part = {"recipe": {"model": model.settings}} if model.settings else {}
    rows = {name.removeprefix("inputs."): stated.value for name, stated in input_settings(model).items()}
    inputs_part = {"inputs": rows} if rows and model.kind in GATED else {}
    manifest = {
        "format": checkpoint.FORMAT,
        "step": model.step,
        "kind": model.kind,
        "frozen_hash": state_hash(frozen) if model.frozen_hash is None or not tied else model.frozen_hash,
        "files": files,
        "tensors": {
            n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in model.whole().items()
        },
        "source": model.source,
        **recipe_part,
        **inputs_part,
    }
    with atomic_file(path / "manifest.json") as file:
        file.write((json.dumps(seal(manifest), indent=1) + "\n").encode())


# ------------------------------------------------------------------------------------------ the tool


@dataclass(frozen=True, slots=True)
class Format:
    """One row: how a format is read and written. A later family adds its row and its tables in models/published.py."""

    about: str
    read: Callable[[Path, str | None], Model]
    write: Callable[[Path, Model, System | None], None]
    is_folder: bool
    holds_frozen: bool  # its files carry the frozen tensors


def read_folder(path: Path, key: str | None) -> Model:
    if is_blip2_folder(path):
        return video_llama_files.read_blip2(path)
    return llama_files.read_hf(path) if is_llama_folder(path) else read_hf(path, key)


def write_folder(path: Path, model: Model, recipe: System | None) -> None:
    if model.kind == LLAMA:
        llama_files.write_hf(path, model)
    elif model.kind in SEEING:
        video_llama_files.write_blip2(path, model)
    else:
        write_hf(path, model, recipe)


def write_meta(path: Path, model: Model, recipe: System | None, shards: int | None = None) -> None:
    llama_files.write_meta(path, model, shards)


def write_gated(family: str, path: Path, model: Model, recipe: System | None) -> None:
    gated_files.write(family, path, model)


def write_seeing(family: str, path: Path, model: Model, recipe: System | None) -> None:
    video_llama_files.write(family, path, model)


def write_chatgpt(path: Path, model: Model, recipe: System | None) -> None:
    video_chatgpt_files.write(path, model)


FORMATS = {
    "vlm": Format("a checkpoint folder of ours, or a run folder", read_vlm, write_vlm, True, False),
    "hf": Format("a Hugging Face folder (config.json, model.safetensors)", read_folder, write_folder, True, True),
    "meta_llama": Format(
        "Meta's LLaMA (consolidated.*.pth, params.json)", llama_files.read_meta, write_meta, True, True
    ),
}
for _name, _about in (("videomae", "VideoMAE's .pth, pretrained or fine-tuned"), ("vit_llama", "ViT-LLaMA's .pth")):
    FORMATS[_name] = Format(_about, partial(read_pth, _name), partial(write_pth, _name), False, True)
for _name, _about in (("vamos", "Vamos"), ("flipped", "Flipped-VQA (LLaMA-VQA)"), ("vico", "ViCo")):
    FORMATS[_name] = Format(
        f"{_about}: .pth of trained tensors",
        partial(gated_files.read, _name),
        partial(write_gated, _name),
        False,
        False,
    )
for _name, _about in (
    ("video_llama", "Video-LLaMA's .pth (vision branch), MiniGPT-4's projection"),
    ("llmva", "LLMVA-GEBC's .pth"),
    ("lavis", "LAVIS' .pth: EVA ViT-g, BLIP-2's Q-Former"),
):
    FORMATS[_name] = Format(_about, partial(video_llama_files.read, _name), partial(write_seeing, _name), False, False)
FORMATS["video_chatgpt"] = Format(
    "Video-ChatGPT's, LLaVA's .bin: projector, marks; its Breakfast variant's model.bin",
    video_chatgpt_files.read,
    write_chatgpt,
    False,
    False,
)


def main(arguments: list[str] | None = None) -> int:
    try:
        convert(parse(arguments))
    except UserError as error:
        print(f"convert_ckpt: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    formats = "\n".join(f"  {name:10} {row.about}" for name, row in FORMATS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    parser.add_argument("--from", dest="from_format", choices=FORMATS, required=True)
    parser.add_argument("--to", dest="to_format", choices=FORMATS, required=True)
    parser.add_argument("--recipe", help="check names and shapes against this recipe's model; tells heads and sizes")
    parser.add_argument("--base", type=Path, help="folder of the frozen language model (LLaMA; OPT for llmva)")
    parser.add_argument("--also", type=Path, help="a second .pth of the tower, of the same format (lavis)")
    parser.add_argument("--keep-frozen", action="store_true", help="also keep language models beside a trained part")
    parser.add_argument("--trained-on", choices=GENERATIONS, help="its LLaMA, where args do not tell or mislead")
    parser.add_argument("--shards", type=int, help="files of a meta_llama DST (default: as SRC has, else 1)")
    parser.add_argument("--layer", type=int, help="first layer of --base, where the checkpoint cannot tell it")
    parser.add_argument("--key", help="nested dictionary of a .pth to take, for example model_ema")
    parser.add_argument("--force", action="store_true", help="replace DST")
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and not options.recipe:
        parser.error(f"{options.overrides[0]}: overrides belong to a recipe; name it with --recipe")
    if options.layer is not None and options.base is None:
        parser.error("--layer counts layers of --base; give both")
    if options.shards is not None and (options.to_format != "meta_llama" or options.shards < 1):
        parser.error("--shards is the number of files, at least 1, of a DST in Meta's format (--to meta_llama)")
    if options.also and options.from_format != "lavis":
        parser.error("--also joins EVA's file and a Q-Former's (--from lavis)")
    if options.key and FORMATS[options.from_format].is_folder:
        parser.error("--key names a dictionary inside a .pth file; this source is a folder")
    return options


def convert(options: argparse.Namespace) -> None:
    """Read, fill in or strip frozen layers, check, write aside, read back, move into place, report."""
    source, target = FORMATS[options.from_format], FORMATS[options.to_format]
    refuse_target(options, target)
    model = source.read(options.source, options.key)
    print(f"read    {options.from_format}: {options.source}")
    if options.also:
        video_llama_files.join(model, source.read(options.also, None), f"{options.source} and {options.also}")
        print(f"read    {options.from_format}: {options.also}")
    refuse_kind(options, model)
    request = Request(
        source=options.source,
        from_format=options.from_format,
        to_format=options.to_format,
        holds_frozen=target.holds_frozen,
        recipe_name=options.recipe,
        recipe=load(options.recipe, options.overrides) if options.recipe else None,
        base=options.base,
        trained_on=options.trained_on,
        layer=options.layer,
        keep_frozen=options.keep_frozen,
    )
    recipe, verify = settle(model, request)
    if options.shards:
        target = replace(target, write=partial(write_meta, shards=options.shards))
    compared = put(options, target, model, recipe, verify)
    print(f"kind    {KIND_TITLES[model.kind]}")
    print(f"sizes   {describe(model)}")
    for note in model.notes:
        print(f"note    {note}")
    lost = [*model.dropped, *left_behind(model, options.to_format)]
    print(f"dropped {', '.join(lost) if lost else 'nothing'}")
    print(f"wrote   {options.to_format}: {options.target} (read back and compared: equal to the bit)")
    if compared:
        print(f"{'outputs' if model.kind in (*SEEING, VIDEO_CHATGPT) else 'logits '} {compared}")
    print(f"hash    {state_hash(model.whole())}")


def refuse_kind(options: argparse.Namespace, model: Model) -> None:
    """UserError: the target's format has no form for this kind of model."""
    if options.to_format in FAMILIES and (model.kind, options.to_format) != (LLAMA, "hf"):
        FAMILIES[options.to_format].table(model.kind, to_ours=False)
    if options.to_format == "meta_llama" and model.kind != LLAMA:
        raise UserError(f"Meta's folder has no form for a {KIND_TITLES[model.kind]}. It holds: {KIND_TITLES[LLAMA]}.")
    if options.trained_on and model.kind not in GATED:
        raise UserError(f"--trained-on states the LLaMA under a checkpoint; this is a {KIND_TITLES[model.kind]}.")
    for name, kinds in _MEANT_FOR.items():
        given = getattr(options, name)
        if given not in (None, False) and model.kind not in kinds:
            raise UserError(
                f"--{name.replace('_', '-')} says nothing of a {KIND_TITLES[model.kind]} ({options.source}); "
                "leave it out."
            )


_MEANT_FOR = {
    "recipe": set(KIND_TITLES) - {PROJECTION},
    "base": set(KIND_TITLES) - {PROJECTION, TOWER},
    "layer": set(HAS_FROZEN),
    "keep_frozen": {*TIED, TOWER},
}
"""Options that only some kinds of model have a use for."""


def refuse_target(options: argparse.Namespace, target: Format) -> None:
    path: Path = options.target
    if path.exists() and options.source.exists() and path.samefile(options.source):
        raise UserError(f"{path}: source and target are one; give another DST.")
    if not target.is_folder and path.suffix not in (".pth", ".pt", ".bin"):
        raise UserError(f"{path}: {options.to_format} is a single file; its name must end in .pth, .pt or .bin.")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; make it first.")
    if not path.exists() and not path.is_symlink():
        return
    if not options.force:
        raise UserError(f"{path}: exists. Mend: another DST, or --force to replace it.")
    ours = path.is_file() or (path.is_dir() and any((path / n).is_file() for n in ("manifest.json", "config.json")))
    if path.is_symlink() or not ours or (path.is_dir() and any(p.is_dir() for p in path.iterdir())):
        raise UserError(f"{path}: is no plain checkpoint file or folder, so --force does not remove it; do it by hand.")


def put(
    options: argparse.Namespace,
    target: Format,
    model: Model,
    recipe: System | None,
    verify: Compare | None,
) -> str | None:
    """Write beside the target, read back, compare (`verify`: logits too), and only then take the target's name."""
    path: Path = options.target
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        written = aside / path.name
        target.write(written, model, recipe)
        again = target.read(written, model.source.get("container") if keyed(options, model) else None)
        diff_keys(again.whole(), model.whole()).require(f"{path} as written")
        if state_hash(again.whole()) != state_hash(model.whole()):
            raise RuntimeError(
                f"{path}: what was read back differs from what was written; the disk or memory is at fault"
            )
        said = verify(written, again) if verify is not None else None
        stand_in(written, path, aside / "replaced")
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    finally:
        shutil.rmtree(aside)
    return said


def stand_in(written: Path, path: Path, replaced: Path) -> None:
    """`written` takes the name `path`; folders cannot be swapped in one step, so the old one returns if that fails."""
    if not path.exists() or (path.is_file() and written.is_file()):
        written.replace(path)
        return
    path.rename(replaced)
    try:
        written.rename(path)
    except OSError:
        replaced.rename(path)
        raise


def keyed(options: argparse.Namespace, model: Model) -> bool:
    """Whether the file was written under the source's own container, which may not be one that is looked for."""
    return options.to_format == model.source.get("format") and not FORMATS[options.to_format].is_folder


def left_behind(model: Model, to_format: str) -> list[str]:
    """What the source had beside tensors, read, and the target has no place for."""
    if to_format in ("vlm", model.source.get("format")):
        return []
    lost = [name for name in model.source.get("rest", {}) if name != "args" or to_format not in gated_files.FAMILIES]
    lost += ["config.json"] if "config" in model.source else []
    lost += ["params.json"] if "params" in model.source else []
    return [*lost, *model.source.get("constants", {})]


if __name__ == "__main__":
    sys.exit(main())
