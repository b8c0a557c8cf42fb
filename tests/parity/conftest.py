"""Recorded numbers of the originals, read once: `load_golden("vitllama_tiny.pt")`; `golden` finds the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def load_golden(golden: Callable[[str], Path]) -> Callable[[str], Any]:
    """Content of a recorded file: JSON, or tensors and plain containers."""

    @cache
    def load(name: str) -> Any:
        path = golden(name)
        return json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=True)

    return load
