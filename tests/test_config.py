"""Strict overrides: every mistake names the path, the value and the nearest right name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from vlm.config import describe, differences, override, parse, to_dict
from vlm.types import UserError


@dataclass(kw_only=True, slots=True)
class Inner:
    depth: int = 2
    """How many layers."""
    rates: tuple[float, ...] = (0.1, 0.2)
    kind: Literal["mean", "cls"] = "mean"

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth is {self.depth}; it must be at least 1")


@dataclass(kw_only=True, slots=True)
class Outer:
    lr: float = 1e-3
    """Peak
    learning rate."""
    inner: Inner = field(default_factory=Inner)
    off: Inner | None = None
    steps: int | None = None
    flag: bool = False
    path: Path = Path("a")
    views: dict[str, float] = field(default_factory=lambda: {"label": 1.0})
    window: tuple[int, int] = (1, 2)
    kinds: dict[str, tuple[str, ...]] = field(default_factory=dict)


def test_overrides_reach_every_kind_of_field():
    changed = override(
        Outer(),
        ["lr=3e-4", "inner.depth=5", "steps=1_000", "flag=true", "path=b/c", "views.label=0.5", "window=3,4",
         "inner.rates=0.5", "inner.kind=cls"],
    )  # fmt: skip
    assert changed == Outer(
        lr=3e-4, inner=Inner(depth=5, rates=(0.5,), kind="cls"), steps=1000, flag=True, path=Path("b/c"),
        views={"label": 0.5}, window=(3, 4),
    )  # fmt: skip
    assert override(changed, ["steps=none"]).steps is None
    assert Outer().inner.depth == 2


@pytest.mark.parametrize(
    ("text", "names"),
    [("a,b", ("a", "b")), ("(a,b)", ("a", "b")), ("[a]", ("a",)), ("()", ()), ("", ()), ("a,b.[01]", ("a", "b.[01]"))],
)
def test_brackets_around_a_list_go_and_those_of_a_pattern_stay(text, names):
    assert parse(text, tuple[str, ...], "x") == names


@pytest.mark.parametrize(
    ("assignment", "parts"),
    [
        ("lr", ["'lr'", "key.path=value"]),
        ("lrr=1", ["lrr", "'lr'"]),
        ("inner.deph=1", ["inner.deph", "'depth'"]),
        ("inner.depth=two", ["inner.depth=two", "whole number"]),
        ("inner.depth=0", ["inner.depth=0", "at least 1"]),
        ("inner=3", ["inner.depth"]),
        ("off.depth=1", ["off", "None"]),
        ("flag=yes", ["true or false"]),
        ("views.caption=1", ["views.caption", "label"]),
        ("window=1,2,3", ["2 values"]),
        ("inner.kind=max", ["mean, cls"]),
        ("lr.x=1", ["lr.x"]),
        ("lr=nan", ["lr=nan", "finite"]),
        ("inner.rates=0.1,inf", ["inner.rates=inf", "finite"]),
        ("inner=none", ["inner=none", "group", "inner.depth"]),
        ("views=1", ["views=1", "group", "views.label"]),
        ("views=none", ["group", "views.label"]),
        ("kinds=1", ["group", "empty"]),
        ("kinds.x=1", ["kinds.x", "it has none"]),
    ],
)
def test_mistakes_are_refused_with_the_mend(assignment, parts):
    with pytest.raises(UserError) as caught:
        override(Outer(), [assignment])
    for part in parts:
        assert part in str(caught.value)


def test_to_dict_and_differences():
    old, new = to_dict(Outer()), to_dict(override(Outer(), ["inner.depth=3", "steps=4"]))
    assert old["inner"] == {"depth": 2, "rates": [0.1, 0.2], "kind": "mean"}
    assert differences(old, new) == ["inner.depth: 2 -> 3", "steps: None -> 4"]
    assert differences(old, old) == []


def test_describe_finds_the_text_under_a_field():
    rows = {path: (value, text) for path, _, value, text in describe(Outer())}
    assert rows["lr"] == (1e-3, "Peak learning rate.")
    assert rows["inner.depth"] == (2, "How many layers.")
    assert rows["off"] == (None, "")


@dataclass(kw_only=True, slots=True)
class Pair:
    width: int = 6
    heads: int = 3

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")


def test_fields_that_must_fit_each_other_are_checked_together():
    assert (
        override(Pair(), ["width=4", "heads=2"]) == override(Pair(), ["heads=2", "width=4"]) == Pair(width=4, heads=2)
    )
    with pytest.raises(UserError, match=r"^width=4 is not a multiple of heads=3"):  # not twice: it names the field
        override(Pair(), ["width=4"])


def test_entries_of_a_dict_are_parsed_by_its_annotation():
    config = Outer(kinds={"C": ("CH",)}, views={"label": 1})
    assert override(config, ["kinds.C=CH,CW"]).kinds == {"C": ("CH", "CW")}
    assert override(config, ["views.label=0.5"]).views == {"label": 0.5}
    assert override(config, ["off=none"]).off is None


def test_the_last_of_two_values_counts_and_a_group_is_no_value():
    assert override(Outer(), ["lr=1", "lr=2"]).lr == 2
    for wrong in (["inner=none", "inner.depth=2"], ["inner.depth=2", "inner=none"]):
        with pytest.raises(UserError, match="fields of its own"):
            override(Outer(), wrong)
