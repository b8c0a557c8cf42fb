"""Typed configuration: dataclasses, strict `key.path=value` overrides, plain-dict export, and `--help-all`.

Every error names the path that is wrong, the value, and the nearest name that would be right. Config dataclasses are
keyword-only with slots; each field is documented by the string under it; contradictions are refused in `__post_init__`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlm.errors import UserError

ConfigT = TypeVar("ConfigT")


def override(config: ConfigT, assignments: Sequence[str]) -> ConfigT:
    """A copy of `config` with `key.path=value` assignments applied in order.

    Args:
        config: a dataclass instance; nested dataclasses and dicts are reached by dots.
        assignments: e.g. `["optim.lr=3e-4", "model.llama.layer=15", "steps=100"]`.
    Raises:
        UserError: not of the form path=value; unknown path (with the nearest name); value of the wrong type.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path:
            raise UserError(f"override {assignment!r} is not of the form key.path=value, for example optim.lr=3e-4")
        *groups, name = path.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
            if not isinstance(node, dict):
                raise UserError(f"{assignment}: {group!r} is given a value and fields of its own in one command")
        if isinstance(node.get(name), dict):
            raise UserError(f"{assignment}: {name!r} is given a value and fields of its own in one command")
        node[name] = text
    return _apply(config, type(config), tree, "")


def _apply(node: Any, kind: Any, changes: dict[str, Any], where: str) -> Any:
    """`node`, annotated as `kind`, with all changes made at once, so that fields that must fit each other are checked
    together."""
    values = {name: _changed(node, kind, name, change, where) for name, change in changes.items()}
    if isinstance(node, dict):
        return {**node, **values}
    try:
        return dataclasses.replace(node, **values)
    except UserError:
        raise
    except ValueError as error:
        given = {f"{where}{name}": text for name, text in changes.items() if isinstance(text, str)}
        if not given or any(path in str(error) for path in given):
            raise UserError(str(error)) from error
        raise UserError(f"{' '.join(f'{path}={text}' for path, text in given.items())}: {error}") from error


def _changed(node: Any, kind: Any, name: str, change: Any, where: str) -> Any:
    """The new value of one field: parsed text, or a group with its own changes applied."""
    path, owner = f"{where}{name}", where.rstrip(".") or "the recipe"
    if isinstance(node, dict):
        if name not in node:
            raise UserError(f"{path}: {owner} has no entry {name!r}{_nearest(name, list(node))}")
        inner_kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else type(node[name])
        if isinstance(change, dict):
            return _apply(node[name], inner_kind, change, f"{path}.")
        return parse(change, inner_kind, path)
    if not dataclasses.is_dataclass(node):
        raise UserError(f"{path}: {owner} is {node!r}, which has no field {name!r}")
    names = [f.name for f in dataclasses.fields(node)]
    if name not in names:
        raise UserError(f"{path}: {owner} has no field {name!r}{_nearest(name, names)}")
    current, hint = getattr(node, name), _hints(type(node))[name]
    if isinstance(change, dict):
        if current is None:
            raise UserError(
                f"{path}.{next(iter(change))}: {path} is off (None) in this recipe, so it has no fields to set"
            )
        return _apply(current, hint, change, f"{path}.")
    off = change.lower() in ("none", "null") and type(None) in typing.get_args(hint)
    if not off and (dataclasses.is_dataclass(current) or isinstance(current, dict)):
        inner = current if isinstance(current, dict) else [f.name for f in dataclasses.fields(current)]
        examples = ", ".join(f"{path}.{name}" for name in list(inner)[:4])
        mend = f"set one of its fields, for example {examples}" if examples else "it is empty in this recipe"
        raise UserError(f"{path}={change}: {path} is a group of settings; {mend}")
    return parse(change, hint, path)


def parse(text: str, kind: Any, path: str) -> Any:
    """`text` as a value of the annotated type `kind` (bool, int, float, str, Path, Literal, tuple, Optional, union).

    Raises:
        UserError: naming `path`, the text and what was expected.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("none", "null"):
            return None
        failures = []
        for option in arguments:
            if option is type(None) or dataclasses.is_dataclass(option):
                continue
            try:
                return parse(text, option, path)
            except UserError as error:
                failures.append(error)
        raise failures[0] if failures else UserError(f"{path}={text}: only none can be given here")
    if origin is typing.Literal:
        for option in arguments:
            if str(option) == text:
                return option
        raise UserError(f"{path}={text}: expected one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        bare = text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text  # what patterns end with stays
        items = [item for item in bare.split(",") if item.strip()]
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(items):
            raise UserError(f"{path}={text}: expected {len(kinds)} values separated by commas, got {len(items)}")
        return tuple(parse(item.strip(), item_kind, path) for item, item_kind in zip(items, kinds))
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"{path}={text}: expected true or false")
    if kind in (int, float):
        try:
            number = kind(text.replace("_", ""))
        except ValueError:
            raise UserError(f"{path}={text}: expected {'a whole number' if kind is int else 'a number'}") from None
        if not math.isfinite(number):
            raise UserError(f"{path}={text}: expected a finite number")
        return number
    if kind is str:
        return text
    if kind is Path:
        return Path(text)
    raise UserError(f"{path}={text}: a value of type {kind} cannot be given on the command line")


def to_dict(config: Any) -> Any:
    """Plain JSON-able containers: dataclasses as dicts in field order, paths as strings, tuples as lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise TypeError(f"{config!r} ({type(config)}) cannot stand in a config")


def from_dict(cls: Any, settings: Mapping[str, Any]) -> Any:
    """A config dataclass from what `to_dict` made of one, groups of settings included. TypeError, ValueError: of
    another version, or refused by the class."""
    hints = _hints(cls)
    values = dict(settings)
    for name, value in values.items():
        options = [o for o in (hints.get(name), *typing.get_args(hints.get(name))) if dataclasses.is_dataclass(o)]
        if isinstance(value, Mapping) and options:
            values[name] = from_dict(options[0], value)
    return cls(**values)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Readable differences of two `to_dict` results: `optim.lr: 0.001 -> 0.0003`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def describe(config: Any, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Every leaf field as (path, type, value, documentation): what `--help-all` prints."""
    documents = _field_documents(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        path = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            yield from describe(value, f"{path}.")
        else:
            kind = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))
            yield path, kind, value, documents.get(f.name, "")


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _field_documents(cls: type) -> dict[str, str]:
    """The string literal that stands under each annotated field of a dataclass (and of its bases)."""
    documents: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError):
            continue
        assert isinstance(body, ast.ClassDef)
        for field_node, text_node in zip(body.body, body.body[1:]):
            if (
                isinstance(field_node, ast.AnnAssign)
                and isinstance(field_node.target, ast.Name)
                and isinstance(text_node, ast.Expr)
                and isinstance(text_node.value, ast.Constant)
                and isinstance(text_node.value.value, str)
            ):
                documents[field_node.target.id] = " ".join(text_node.value.value.split())
    return documents


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(sorted(names)) or 'none'}"
