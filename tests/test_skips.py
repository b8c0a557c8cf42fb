"""The rule of tests/conftest.py: under VLM_CI a test may be skipped for want of hardware or unshared data, no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


def outcome(folder: Path, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A session of its own over one test file."""
    (folder / "tests").mkdir()
    shutil.copy(CONFTEST, folder / "tests" / "conftest.py")
    (folder / "tests" / "test_it.py").write_text(f"import pytest\n\n{body}\n")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("VLM_", "PYTEST_"))} | environment
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


SKIPPED = "def test_it():\n    pytest.skip({reason!r})\n"
MODULE = "pytest.importorskip('no_such_package')\n\ndef test_it():\n    pass\n"
DATA = "def test_it(realdata):\n    pass\n"
GOLDEN = "def test_it(golden):\n    golden('no_such.json')\n"
MARK = "@pytest.mark.skipif(True, reason={reason!r})\ndef test_it():\n    pass\n"


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        (SKIPPED.format(reason="needs GPU"), True),
        (MARK.format(reason="needs CUDA and flash-attn"), True),
        (DATA, True),
        (GOLDEN, True),
        (SKIPPED.format(reason="no time"), False),
        (MARK.format(reason="mpirun not found"), False),
        (MODULE + "\ndef test_other():\n    pass\n", False),
    ],
)
def test_under_ci(tmp_path: Path, body: str, allowed: bool) -> None:
    done = outcome(tmp_path, body, VLM_CI="1", VLM_REALDATA=str(tmp_path / "nowhere"))
    assert ("skipped under VLM_CI for reasons that are not allowed" in done.stdout) == (not allowed)
    assert (done.returncode == 0) == allowed


def test_elsewhere_a_skip_is_no_failure(tmp_path: Path) -> None:
    assert outcome(tmp_path, SKIPPED.format(reason="no time")).returncode == 0


def test_with_goldens_given_none_may_lack(tmp_path: Path) -> None:
    done = outcome(tmp_path, GOLDEN, VLM_GOLDENS=str(tmp_path))
    assert done.returncode == 1
    assert "has no no_such.json" in done.stdout
