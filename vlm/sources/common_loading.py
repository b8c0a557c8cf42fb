"""A source by the name that a user gives."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import vlm.sources
from vlm.types import UserError


def available_sources() -> list[str]:
    return sorted(
        module.name for module in pkgutil.iter_modules(vlm.sources.__path__) if not module.name.startswith("common")
    )


def load_source(name: str) -> ModuleType:
    """The module of a source. Raises UserError for an unknown one."""
    if name not in available_sources():
        raise UserError(f"unknown source {name!r}: there are {', '.join(available_sources())}")
    return importlib.import_module(f"vlm.sources.{name}")
