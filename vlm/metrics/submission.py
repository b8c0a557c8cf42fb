"""The submission of the LOVEU boundary captioning challenge (Kinetics-GEB+): a zip of two pickles.

`submit_val.pkl` and `submit_test.pkl` hold {boundary id: {"Subject", "Status_Before", "Status_After"}}, a text each, ""
where none was written.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlm.files import replace_file
from vlm.metrics.caption import GEBC_KINDS
from vlm.types import UserError, Writing

NAMES = dict(zip(GEBC_KINDS, ("Subject", "Status_Before", "Status_After"), strict=True))
VALIDATION, TEST = "submit_val.pkl", "submit_test.pkl"
MOST_BYTES = 64 << 20
"""Of one part, unpacked: the challenge's splits are a few MB each."""

Submission = dict[str, dict[str, str]]

_DATE = (1980, 1, 1, 0, 0, 0)  # of every file in the zip, so that the same texts give the same bytes


def submission(writings: Sequence[Writing], expected: Iterable[str] | None = None) -> Submission:
    """Boundary id -> its three texts, in the order of `expected`, or in which the ids first come.

    Args:
        expected: the boundary ids of the split; those without texts are there with empty ones. None: those written of.
    Raises:
        UserError: no text; a text of no boundary or of a kind that is none of the three; a boundary with two texts of
            a kind; an id that is not expected.
    """
    if not writings:
        raise UserError("there are no texts to submit")
    wanted = None if expected is None else list(expected)
    found: Submission = {boundary: dict.fromkeys(NAMES.values(), "") for boundary in wanted or ()}
    known = None if wanted is None else set(wanted)
    seen: set[tuple[str, str]] = set()
    for row in writings:
        if row.kind not in NAMES or not row.id:
            raise UserError(
                f"text {row.key!r} (kind {row.kind!r}, id {row.id!r}) is none of {', '.join(NAMES)} of a boundary"
            )
        if known is not None and row.id not in known:
            raise UserError(f"boundary {row.id!r} is not in the split's annotation: these texts are of another split")
        if (row.id, row.kind) in seen:
            raise UserError(f"boundary {row.id!r} has two texts of the kind {row.kind!r}")
        seen.add((row.id, row.kind))
        found.setdefault(row.id, dict.fromkeys(NAMES.values(), ""))[NAMES[row.kind]] = row.text
    return found


def empty(texts: Submission) -> list[str]:
    """`boundary: kind` of the texts that are empty."""
    return [f"{boundary}: {name}" for boundary, own in texts.items() for name, text in own.items() if not text.strip()]


def add(texts: Submission, name: str, file: Path) -> list[str]:
    """Put the texts of a split into the zip `file`, made where there is none: the part `name` is replaced, others stay.

    Args:
        name: `VALIDATION` or `TEST`.
    Returns: the names of all parts that are in it now.
    Raises:
        UserError: the file is there and is no such zip, or it cannot be written.
    """
    assert name in (VALIDATION, TEST), name
    parts = (_parts(file) if file.exists() else {}) | {name: pickle.dumps(texts, protocol=4)}
    try:
        replace_file(file, _zip(parts))
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error})") from error
    return sorted(parts)


def _parts(file: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(file) as opened:
            others = sorted({*opened.namelist()} - {VALIDATION, TEST})
            if others:
                named = ", ".join(others[:5]) + (" …" if len(others) > 5 else "")
                raise UserError(f"{file}: holds {named}, so it is no submission; name another file")
            for about in opened.infolist():  # looked at before anything is unpacked
                if about.file_size > MOST_BYTES:
                    raise UserError(
                        f"{file}: {about.filename} is {about.file_size:,} bytes, but a split's texts are at most "
                        f"{MOST_BYTES:,}, so it is no submission; name another file"
                    )
            return {name: opened.read(name) for name in opened.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: is there, but is no zip that a split could be added to ({error})") from error


def _zip(parts: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in sorted(parts.items()):
            about = zipfile.ZipInfo(name, _DATE)
            about.compress_type = zipfile.ZIP_DEFLATED
            about.external_attr = 0o644 << 16
            file.writestr(about, content)
    return buffer.getvalue()
