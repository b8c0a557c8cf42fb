"""Whole or not at all; one writer a folder; what the disk refuses is told with the file's name."""

import os
import re
import subprocess
import sys

import pytest

from vlm.files import LOCK, atomic_file, sole_writer, write_json, write_text
from vlm.types import UserError

HOLD = """
import sys, time
from pathlib import Path
from vlm.files import sole_writer
with sole_writer(Path(sys.argv[1]), ""):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"x\.json: cannot be written \(No space left on device\)"):
        write_json(path, {"a": 2})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No space left"), atomic_file(path) as file:
        file.write(b"new")


def test_what_is_no_unicode_is_written_all_the_same(tmp_path):
    write_text(tmp_path / "x", "a\ud800b")
    assert (tmp_path / "x").read_text() == "a?b"


@pytest.mark.parametrize("below", ["run", "sub/run"])
def test_a_folder_below_a_file_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    named = r"file/.*run: cannot be written \(Not a directory\); give another run_dir"
    with pytest.raises(UserError, match=named), sole_writer(tmp_path / "file" / below, "give another run_dir"):
        pass
    with pytest.raises(UserError, match=r"file: cannot be written \(File exists\)"), sole_writer(tmp_path / "file", ""):
        pass


def test_a_second_process_is_refused_until_the_first_is_gone_or_killed(tmp_path):
    folder = tmp_path / "a" / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, sole_writer(folder, "give another run_dir=DIR"):
            pass
        assert re.search(rf"run: process {other.pid} on .* or give another run_dir=DIR$", str(caught.value))
    finally:
        other.kill()
        other.wait()
    with sole_writer(folder, ""):
        assert (folder / LOCK).read_text().startswith(f"process {os.getpid()} on ")
