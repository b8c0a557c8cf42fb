"""Pickles of one numpy array each (`.pkl`), as features of videos are published.

A pickle may ask for any class and so run any code; here it gets what numpy arrays are made of, and nothing else.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from vlm.types import UserError

_ARRAYS = {
    (module, name): found
    for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
    for name, found in (
        ("_reconstruct", np.empty(0).__reduce__()[0]),
        ("_frombuffer", np.empty(0).__reduce_ex__(5)[0]),
    )
} | {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): None}


def array_bytes(file: Path) -> bytes:
    """The array of a pickle as the content of an `.npy` file.

    Raises:
        OSError: it cannot be read.
        UserError: it holds something else than one array of numbers.
    """
    array = _unpickled(file, file.read_bytes())
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not array.size:
        what = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{file}: holds no array of numbers but {what}")
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def _unpickled(file: Path, data: bytes) -> Any:
    try:
        return _Arrays(io.BytesIO(data), encoding="latin1").load()
    except _RefusedError as error:
        raise UserError(
            f"{file}: its pickle asks for {error}. Building such objects can run code from the file, so only numpy "
            "arrays are read; save the features with numpy.save"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{file}: no pickle of an array, or a damaged one ({type(error).__name__})") from error


class _RefusedError(Exception):
    """What a pickle asked for."""


class _Arrays(pickle.Unpickler):
    """Builds numpy arrays alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise _RefusedError(f"{module}.{name}")
        return _encode if (module, name) == ("_codecs", "encode") else _ARRAYS[module, name]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """What protocols before 3 make bytes with."""
    return text.encode("latin1" if encoding.replace("-", "") in ("latin1", "iso88591") else "ascii")
