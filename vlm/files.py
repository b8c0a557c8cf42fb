"""Files that are there whole or not at all, and folders that one process alone writes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vlm.types import UserError

LOCK = ".lock"


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file that appears under its name complete (fsync, then rename, mode 0644) or not at all."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file or nothing. OSError: it could not be written; what was there before still is."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """`replace_file` for text that a user waits for: what the disk refuses is a UserError that names the file."""
    try:
        replace_file(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        UserError: no such file, not JSON (with the line), or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({beyond(error)})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, expected one JSON object")
    return value


def beyond(error: Exception) -> str:
    """What is wrong with JSON that is written as it should be, and yet beyond what can be read."""
    return "lists or objects nested too deep" if isinstance(error, RecursionError) else "a number with too many digits"


def sync(path: Path) -> None:
    """Make what was written to a file, or renamed in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def sole_writer(folder: Path, mend: str) -> Iterator[None]:
    """`folder`, made where there is none, for this process alone. The lock goes with the process, however it ends.

    Args:
        mend: what a user can do if another process has it: end of the message.
    Raises:
        UserError: another process holds the folder, or it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); {mend}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read(200).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{folder}: {holder} is writing there, and two would destroy each other's files: wait for it, end it, "
                f"or {mend}"
            ) from error
        except OSError as error:
            print(f"{folder}: not locked ({error.strerror}): see to it that one process alone writes there", flush=True)
        with contextlib.suppress(OSError):  # a name for the message above; a full disk may refuse it
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
