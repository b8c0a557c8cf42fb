"""The set-up of `make`: which Python is taken, what an interrupted install leaves, what a second call does.

The interpreters here are scripts that answer as a Python would; the real install is what .ci/run begins with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Says its version when asked, makes a .venv/bin/python like itself, and notes what it was asked to install.
PYTHON = """#!/bin/sh
case "$*" in
*version_info*) exit {unsupported} ;;
-V) echo "Python {version}" ;;
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
*"pip install"*) echo install >>calls; {install} ;;
*"pip check"*) echo check >>calls ;;
*) echo "asked: $*" >&2; exit 9 ;;
esac
"""


def python(path: Path, version: str, install: str = "true") -> Path:
    path.parent.mkdir(exist_ok=True)
    supported = version.split(".")[:2] in (["3", "11"], ["3", "12"], ["3", "13"])
    path.write_text(PYTHON.format(version=version, unsupported=0 if supported else 1, install=install))
    path.chmod(0o755)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "requirements").mkdir()
    for name in ("Makefile", "setup.py", "requirements/env.sh", "requirements/pins.txt"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


def make_env(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    tools = project / "tools_on_path"  # no Python but those that the test makes
    if not tools.exists():
        tools.mkdir()
        for name in (
            "bash",
            "sh",
            "cat",
            "cmp",
            "head",
            "grep",
            "mkdir",
            "rm",
            "touch",
            "cp",
            "dirname",
            "make",
            "flock",
        ):
            found = shutil.which(name)
            assert found or name == "flock", name
            if found:
                (tools / name).symlink_to(found)
    variables = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    variables |= {"PATH": f"{project / 'bin'}:{tools}", **environment}
    return subprocess.run(["make", "env"], cwd=project, env=variables, capture_output=True, text=True, check=False)


def calls(project: Path) -> int:
    path = project / "calls"
    return path.read_text().count("install") if path.exists() else 0


def test_made_once_and_again_when_pins_change(project: Path) -> None:
    python(project / "bin" / "python3.11", "3.11.7")
    assert make_env(project).returncode == 0
    assert calls(project) == 1
    asked = (project / "calls").read_text()
    again = make_env(project)
    assert (again.returncode, again.stdout, calls(project)) == (0, "", 1)
    assert (project / "calls").read_text() == asked
    with (project / "requirements" / "pins.txt").open("a") as pins:
        pins.write("another==1\n")
    assert make_env(project).returncode == 0
    assert calls(project) == 2


@pytest.mark.parametrize("version", ["3.11.0", "3.12.9", "3.13.2"])
def test_supported_pythons(project: Path, version: str) -> None:
    python(project / "bin" / "python3", version)
    assert make_env(project).returncode == 0


def test_a_shim_without_an_interpreter_is_passed_over(project: Path) -> None:
    shim = python(project / "bin" / "python3.11", "3.11.0")
    shim.write_text("#!/bin/sh\necho 'no such version' >&2\nexit 127\n")
    python(project / "bin" / "python3.13", "3.13.0")
    made = make_env(project)
    assert made.returncode == 0
    assert "3.13.0" in made.stdout


@pytest.mark.parametrize("version", ["2.7.18", "3.10.13", "3.14.0"])
def test_unsupported_pythons(project: Path, version: str) -> None:
    python(project / "bin" / "python3", version)
    refused = make_env(project)
    assert refused.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 is on the PATH" in refused.stderr
    named = make_env(project, PYTHON=str(project / "bin" / "python3"))
    assert named.returncode != 0
    assert f"is Python {version}" in named.stderr
    assert not (project / ".venv").exists()


def test_no_python_at_all(project: Path) -> None:
    assert "no Python 3.11, 3.12 or 3.13 is on the PATH" in make_env(project).stderr


@pytest.mark.parametrize("failure", ["exit 1", "kill -9 $$"])
def test_an_interrupted_install_is_started_afresh(project: Path, failure: str) -> None:
    python(project / "bin" / "python3.11", "3.11.7", install=failure)
    assert make_env(project).returncode != 0
    (project / ".venv" / "half").touch()
    python(project / "bin" / "python3.11", "3.11.7")
    repaired = make_env(project)
    assert repaired.returncode == 0
    assert "cut short" in repaired.stdout
    assert not (project / ".venv" / "half").exists()


def test_a_folder_that_moved_is_made_again(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    python(project / "bin" / "python3.11", "3.11.7")
    assert make_env(project).returncode == 0
    moved = tmp_path_factory.mktemp("moved") / "project"
    shutil.copytree(project, moved, symlinks=True)
    made = make_env(moved)
    assert made.returncode == 0
    assert "another folder" in made.stdout
    assert calls(moved) == 2


def test_an_environment_made_by_hand_is_kept(project: Path) -> None:
    by_hand = python(project / "bin" / "python3.11", "3.11.7")
    (project / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(by_hand, project / ".venv" / "bin" / "python")
    (project / ".venv" / "mine").touch()
    assert make_env(project).returncode == 0
    assert (project / ".venv" / "mine").exists()
    assert calls(project) == 1


def test_unknown_system_names_those_there_are() -> None:
    command = [str(REPOSITORY / "tools" / "demo.sh"), "vamoose"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "no demo of the system 'vamoose'" in refused.stderr
    assert "vit_llama" in refused.stderr.split("Available now:")[1]


def test_pins_are_exact_and_name_no_host() -> None:
    lines = (REPOSITORY / "requirements" / "pins.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 and "+" not in line and "/" not in line for line in pins)
    names = {line.split("==")[0].lower().replace("_", "-") for line in pins}
    assert {"torch", "deepspeed", "transformers", "webdataset", "decord", "einops", "wandb", "mpi4py", "av"} <= names
    assert not names & {"torchvision", "timm", "tensorboard", "flash-attn"}
