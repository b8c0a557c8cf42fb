"""Features that were computed before must be those of the recipe's own frozen parts."""

from __future__ import annotations

from collections.abc import Iterable

from vlm.data.mix import parse_mix
from vlm.models.system import System
from vlm.recipe import Recipe
from vlm.run.streams import open_shards
from vlm.types import UserError


def check_stored(recipe: Recipe, model: System, sets: Iterable[str]) -> None:
    """UserError where shard sets hold tensors, among those that the recipe's inputs read, that this model's frozen
    parts did not make. Sets that do not say what made them (published arrays) are let pass.

    Args:
        model: as built, before an engine changes its precision.
        sets: as in `data.shards`.
    """
    members = getattr(recipe.inputs, "members", None)
    for path in (path for mix in sets for path, _ in parse_mix(mix)):
        made = open_shards(recipe.data, path).manifest["arguments"].get("tensors", {})
        for name, said in made.items():
            if members is None or f"{name}.safetensors" not in members:
                continue
            why = model.misfit(said)
            if why:
                tower = getattr(getattr(recipe.model, "tower", None), "path", None)
                raise UserError(
                    f"{path}: its features {name} are not what model.tower (path={tower}) makes: {why}. Training on "
                    "them would be on the features of another tower. Mend: the tower that made them, model.tower=none "
                    "(it is not compared then, and not loaded), or features made anew (tools/extract_features.py)"
                )


def check_recipe(recipe: Recipe, model: System) -> None:
    """`check_stored` of what a recipe trains and tests on."""
    tested = [recipe.eval.shards] if recipe.eval is not None and recipe.eval.in_training else []
    check_stored(recipe, model, [recipe.data.shards, *tested])
