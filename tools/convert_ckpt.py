"""Convert checkpoints between published formats and ours; strict, bit-exact, and safe to run on files from strangers.

    python tools/convert_ckpt.py vit_b_pretrain.pth ckpt/vit_b --from videomae --to vlm
    python tools/convert_ckpt.py ckpt/vit_b hf/vit_b --from vlm --to hf
    python tools/convert_ckpt.py runs/ssv2_s_llama out.pth --from vlm --to vit_llama --base llama/7B

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
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlm.models.formats import Model, model_config, read_hf, read_pth, write_hf, write_pth
from vlm.models.frozen_base import compare_with_base, fill_from_base
from vlm.models.published import FROZEN, HAS_FROZEN, KIND_TITLES, kind_of, to_ours
from vlm.models.system import System
from vlm.models.vit_sizes import expected_shapes, sizes_of, unusual_depth
from vlm.recipe import load
from vlm.run import checkpoint
from vlm.types import UserError
from vlm.weights import atomic_file, diff_keys, file_hash, read_state_dict, state_hash, write_safetensors

WEIGHT_FILES = ("model.safetensors", "frozen.safetensors")

# ------------------------------------------------------------------------------------------ our checkpoints


def read_vlm(path: Path, key: str | None) -> Model:
    folder = checkpoint.resolve(path)
    manifest = checkpoint.verify(folder)
    tensors = {
        name: t for f in WEIGHT_FILES if f in manifest["files"] for name, t in read_state_dict(folder / f).items()
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
    tensors = to_ours(tensors, "ours", kind)
    dropped = [name for name in sorted(manifest["files"]) if name not in WEIGHT_FILES]
    return Model(
        kind=kind,
        tensors=tensors,
        source=manifest.get("source", {}),
        dropped=dropped,
        frozen_hash=manifest.get("frozen_hash"),
        step=manifest.get("step", 0),
        settings=(manifest.get("recipe") or {}).get("model"),
    )


def write_vlm(path: Path, model: Model, recipe: System | None) -> None:
    path.mkdir()
    frozen = model.frozen()
    write_safetensors(path / "model.safetensors", model.trainable(), {"format": "pt"})
    if frozen:
        write_safetensors(path / "frozen.safetensors", frozen, {"format": "pt"})
    files = {f.name: {"bytes": f.stat().st_size, "sha256": file_hash(f)} for f in sorted(path.iterdir())}
    recipe_part = {"recipe": {"model": model.settings}} if model.settings else {}
    manifest = {
        "format": checkpoint.FORMAT,
        "step": model.step,
        "kind": model.kind,
        "frozen_hash": model.frozen_hash if model.kind in HAS_FROZEN and not frozen else state_hash(frozen),
        "files": files,
        "tensors": {
            n: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in model.tensors.items()
        },
        "source": model.source,
        **recipe_part,
    }
    with atomic_file(path / "manifest.json") as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode())


# ------------------------------------------------------------------------------------------ the tool


@dataclass(frozen=True, slots=True)
class Format:
    """One row: how a format is read and written. A later family adds its row and its tables in models/published.py."""

    about: str
    read: Callable[[Path, str | None], Model]
    write: Callable[[Path, Model, System | None], None]
    is_folder: bool
    holds_frozen: bool  # its files carry the frozen tensors


FORMATS = {
    "vlm": Format("a checkpoint folder of ours, or a run folder", read_vlm, write_vlm, True, False),
    "hf": Format("a Hugging Face folder (config.json, model.safetensors)", read_hf, write_hf, True, True),
}
for _name, _about in (("videomae", "VideoMAE's .pth, pretrained or fine-tuned"), ("vit_llama", "ViT-LLaMA's .pth")):
    FORMATS[_name] = Format(_about, partial(read_pth, _name), partial(write_pth, _name), False, True)


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
    parser.add_argument("--base", type=Path, help="LLaMA folder (Meta or Hugging Face) with the frozen layers")
    parser.add_argument("--layer", type=int, help="first layer of --base, where the checkpoint cannot tell it")
    parser.add_argument("--key", help="nested dictionary of a .pth to take, for example model_ema")
    parser.add_argument("--force", action="store_true", help="replace DST")
    options = parser.parse_intermixed_args(arguments)
    if options.overrides and not options.recipe:
        parser.error(f"{options.overrides[0]}: overrides belong to a recipe; name it with --recipe")
    if options.layer is not None and options.base is None:
        parser.error("--layer counts layers of --base; give both")
    if options.key and FORMATS[options.from_format].is_folder:
        parser.error("--key names a dictionary inside a .pth file; this source is a folder")
    return options


def convert(options: argparse.Namespace) -> None:
    """Read, fill in or strip frozen layers, check, write aside, read back, move into place, report."""
    source, target = FORMATS[options.from_format], FORMATS[options.to_format]
    refuse_target(options, target)
    model = source.read(options.source, options.key)
    print(f"read    {options.from_format}: {options.source}")
    recipe = recipe_model(options, model)
    settle_frozen(model, options, target, recipe)
    check(model, recipe, options)
    put(options, target, model, recipe)
    print(f"kind    {KIND_TITLES[model.kind]}")
    print(f"sizes   {describe(model)}")
    for note in model.notes:
        print(f"note    {note}")
    lost = [*model.dropped, *left_behind(model, options.to_format)]
    print(f"dropped {', '.join(lost) if lost else 'nothing'}")
    print(f"wrote   {options.to_format}: {options.target} (read back and compared: equal to the bit)")
    print(f"hash    {state_hash(model.tensors)}")


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


def recipe_config(options: argparse.Namespace, model: Model) -> Any:
    """Settings of the model: of the recipe that was named, else those that a training checkpoint holds; or None."""
    if options.recipe is not None:
        config = load(options.recipe, options.overrides).model
        return replace(config, init_from=None) if getattr(config, "init_from", None) else config
    return model_config(model.kind, model.settings) if model.settings else None


def recipe_model(options: argparse.Namespace, model: Model) -> System | None:
    """The model of the recipe without memory for its tensors: names, shapes and settings only."""
    config = recipe_config(options, model)
    with torch.device("meta"):
        return None if config is None else config.build()


def settle_frozen(model: Model, options: argparse.Namespace, target: Format, recipe: System | None) -> None:
    """Make the frozen layers what the target needs: in its files, or (our checkpoints with --base) known by hash."""
    if model.kind not in HAS_FROZEN:
        if options.base is not None:
            raise UserError(f"--base {options.base}: a {KIND_TITLES[model.kind]} has no frozen layers; leave it out.")
        return
    if options.base is None:
        if not model.frozen() and target.holds_frozen:
            fill_from_recipe(model, options)
        return
    if model.frozen():
        layer = compare_with_base(model, options.base, options.layer)
    else:
        llama = getattr(getattr(recipe, "config", None), "llama", None)
        likely, count = (llama.layer, llama.num_layers) if llama is not None else (None, 1)
        layer = fill_from_base(model, options.base, options.layer, likely, count)
    if layer is None:
        model.notes.append(f"no layer of {options.base} equals the source's frozen ones: the target keeps them")
        return
    model.frozen_hash = state_hash(model.frozen())
    model.notes.append(f"the frozen layers are {options.base}'s, from layer {layer} on")
    if not target.holds_frozen:
        model.tensors = model.trainable()


def fill_from_recipe(model: Model, options: argparse.Namespace) -> None:
    """Add the frozen layers from where the recipe takes them, if they are what the checkpoint was trained with."""
    advice = "Mend: --base with the LLaMA folder (Meta or Hugging Face) that training used."
    config = recipe_config(options, model)
    if config is None or model.frozen_hash is None:
        raise UserError(
            f"{options.source}: has the trained tensors alone; {options.to_format} also holds the frozen LLaMA layers. "
            f"{advice} Or --recipe, where training took them from the recipe."
        )
    built = config.build()
    if built.frozen_hash() != model.frozen_hash:
        raise UserError(
            f"{options.source}: its frozen_hash is {model.frozen_hash}, the recipe loads frozen layers of hash "
            f"{built.frozen_hash()}: not those it was trained with. {advice}"
        )
    model.tensors |= {name: p.detach() for name, p in built.named_parameters() if not built.trainable(name)}
    model.notes.append(f"the frozen layers are those that the recipe loads ({config.llama.path or 'random'})")


def check(model: Model, recipe: System | None, options: argparse.Namespace) -> None:
    """Names and shapes against the sizes that the tensors tell of and, if there is one, against the recipe's model."""
    sizes = sizes_of(model.tensors, model.kind)
    diff_keys(model.tensors, expected_shapes(sizes, model.kind)).require(
        f"{options.source} ({KIND_TITLES[model.kind]})"
    )
    if (odd := unusual_depth(sizes)) is not None:
        model.notes.append(odd)
    if recipe is None:
        return
    named = options.recipe or "its own settings"
    want = recipe.state_dict()
    if kind_of(want) != model.kind:
        raise UserError(
            f"{options.source} is a {KIND_TITLES[model.kind]}; recipe {named} builds a {KIND_TITLES[kind_of(want)]}."
        )
    if not model.frozen():
        want = {name: t for name, t in want.items() if not re.fullmatch(FROZEN[model.kind], name)}
    diff_keys(model.tensors, want).require(f"{options.source} and recipe {named}")


def put(options: argparse.Namespace, target: Format, model: Model, recipe: System | None) -> None:
    """Write beside the target, read back, compare, and only then take the target's name."""
    path: Path = options.target
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        written = aside / path.name
        target.write(written, model, recipe)
        again = target.read(written, model.source.get("container") if keyed(options, model) else None)
        diff_keys(again.tensors, model.tensors).require(f"{path} as written")
        if state_hash(again.tensors) != state_hash(model.tensors):
            raise RuntimeError(
                f"{path}: what was read back differs from what was written; the disk or memory is at fault"
            )
        stand_in(written, path, aside / "replaced")
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    finally:
        shutil.rmtree(aside)


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
    return [*model.source.get("rest", {}), *(["config.json"] if "config" in model.source else [])]


def describe(model: Model) -> str:
    sizes = sizes_of(model.tensors, model.kind)
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in model.tensors.values())
    parts = [f"width {sizes.width}", f"depth {sizes.depth}", f"cubes {sizes.tubelet}x{sizes.patch}x{sizes.patch}"]
    parts += [f"{sizes.num_classes} classes"] if sizes.num_classes else []
    parts += [f"decoder width {sizes.decoder_width}, depth {sizes.decoder_depth}"] if sizes.decoder_width else []
    if sizes.llama_width:
        held = f"{sizes.llama_layers} layer(s)" if sizes.llama_layers else "layers not included"
        parts.append(f"LLaMA width {sizes.llama_width}, {held}")
    parameters = sum(t.numel() for t in model.tensors.values())
    count = f"{len(model.tensors)} tensors, {parameters:,} parameters"
    return f"{', '.join(parts)}; {count}, {', '.join(dtypes)}"


if __name__ == "__main__":
    sys.exit(main())
