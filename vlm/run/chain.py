"""What the three jobs of slurm/chain.sh are told: a recipe, another that goes on from what it learns, and the test of
that. `python -m vlm.run.chain ARGUMENTS` prints the arguments of each, a line each, and an empty line after each job.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from vlm.errors import UserError
from vlm.recipe import Recipe, check_inputs, check_name, load

FIRST, SECOND = "video_llama.pretrain", "video_llama.finetune"


class Chain(NamedTuple):
    """Arguments of the three jobs, and what is to be noted about them."""

    pretrain: list[str]
    finetune: list[str]
    evaluate: list[str]
    note: str


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """[RECIPE_A [key=value …]] [RECIPE_B [key=value …]] in two: each a recipe and its settings.

    Raises:
        UserError: more than two recipes, or one that is not the default and none that goes on from it.
    """
    given: list[list[str]] = []
    for word in arguments:
        if "=" not in word:
            given.append([word])
        elif given:
            given[-1].append(word)
        else:
            given.append([FIRST, word])
    given = given or [[FIRST]]
    if len(given) > 2:
        names = ", ".join(recipe for recipe, *_ in given)
        raise UserError(f"{names}: a chain has two recipes; settings are written key=value")
    if len(given) == 1:
        if given[0][0] != FIRST:
            raise UserError(f"which recipe goes on from what {given[0][0]} learns? Name it after this one's settings")
        given.append([SECOND])
    return given[0], given[1]


def plan(arguments: Sequence[str]) -> Chain:
    """The jobs of a chain.

    Args:
        arguments: see `split`.
    Raises:
        UserError: a recipe or setting is wrong, or the second cannot go on from the first, or has no test.
    """
    first, second = split(arguments)
    one, two = _load(first), _load(second)
    if one.run_dir == two.run_dir:
        raise UserError(f"both recipes train in {one.run_dir}: give one of them another run_dir=DIR")
    if two.eval is None:
        raise UserError(f"{second[0]} has no test (eval is none): name a recipe that has one")
    if not hasattr(two.model, "init_from"):
        raise UserError(f"{second[0]} cannot begin with another run: its model has no init_from")
    note, begins = "", two.model.init_from
    if begins != one.run_dir and not any(setting.startswith("model.init_from=") for setting in second[1:]):
        if begins is None or begins == load(first[0]).run_dir:
            second = [*second, f"model.init_from={one.run_dir}"]
        else:
            note = (
                f"note: {second[0]} begins with {begins}, as the recipe says, not with {one.run_dir}: "
                "model.init_from=DIR after it says otherwise"
            )
    settings = [setting for setting in second[1:] if not setting.startswith("run_dir=")]
    test = [second[0], f"--checkpoint={two.run_dir}", *settings, f"run_dir={two.run_dir}_test"]
    return Chain(first, second, test, note)


def _load(words: Sequence[str]) -> Recipe:
    check_name(words[0])
    recipe = load(words[0], words[1:])
    check_inputs(recipe)
    return recipe


def main(arguments: list[str] | None = None) -> int:
    try:
        chain = plan(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chain.note:
        print(chain.note, file=sys.stderr)
    for job in (chain.pretrain, chain.finetune, chain.evaluate):
        print("\n".join(job), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
