"""Where tests find real clips and recorded numbers, and the rule on skipping.

Real clips: the folder VLM_REALDATA (default ../shared/realdata beside the repository). Numbers recorded from the
originals: the folder VLM_GOLDENS (default tests/goldens, which holds a part of them).

Under VLM_CI=1 a skip is a failure of the session unless its reason is on `ALLOWED`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlm.data.shards import write_shards
from vlm.sources import shapes

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # tests import tools/ as a package, however pytest was started

NO_REALDATA = "VLM_REALDATA not found"
NO_GOLDEN = "golden file not in tests/goldens"
ALLOWED = (
    "needs GPU",
    "needs CUDA",
    "needs a GPU",
    "needs Java and pycocoevalcap",
    "needs network namespaces",
    NO_REALDATA,
)
"""Beginnings of the reasons for which a test may be skipped under VLM_CI: hardware, data that cannot be shared, a Java
program of others whose recorded answers are compared with in any case, and what a sandbox may refuse even to root.
NO_GOLDEN joins them while VLM_GOLDENS is not set."""


def pytest_configure() -> None:
    """A shell has what it runs in the background ignore Ctrl-C, and so would all programs that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that a test starts are not of a process group that another test joined in this process; a test that
    joins one itself, by a fixture `world`, keeps it."""
    if "world" in request.fixturenames:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real clips and annotation files; the test is skipped where it is absent."""
    folder = Path(os.environ.get("VLM_REALDATA", REPOSITORY.parent / "shared" / "realdata"))
    if not folder.is_dir():
        pytest.skip(f"{NO_REALDATA}: {folder}")
    return folder


@pytest.fixture(scope="session")
def golden():  # type: ignore[no-untyped-def]
    """`golden("vitllama_mixup.json")` is a recorded file; a missing one skips, but only in the default folder."""
    chosen = os.environ.get("VLM_GOLDENS")
    folder = Path(chosen) if chosen else REPOSITORY / "tests" / "goldens"

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            if chosen:
                pytest.fail(f"VLM_GOLDENS={chosen} has no {name}; with VLM_GOLDENS set every file must be there")
            pytest.skip(f"{NO_GOLDEN}: {name}")
        return path

    return find


@pytest.fixture(scope="session")
def shape_shards(tmp_path_factory) -> Path:
    """Folder with shards/train (32 moving-shapes clips) and shards/test (8)."""
    folder = tmp_path_factory.mktemp("shapes")
    shapes.render(folder / "corpus", num_train=32, num_test=8, seed=0, workers=1)
    for split in ("train", "test"):
        items = shapes.read(folder / "corpus", split, ())
        write_shards(items, folder / "shards" / split, arguments={"source": "shapes", "split": split})
    return folder / "shards"


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list]:
    """Two hosts that are really apart (tests.hosts.Host); the test is skipped where there can be none."""
    from tests import hosts

    if reason := hosts.missing():
        pytest.skip(f"{hosts.NO_HOSTS}: {reason}")
    with hosts.running(2, tmp_path_factory.mktemp("hosts")) as both:
        yield both


def is_allowed(reason: str) -> bool:
    """Whether CI accepts that a test was skipped for this reason."""
    reason = reason.removeprefix("Skipped: ")
    allowed = ALLOWED if os.environ.get("VLM_GOLDENS") else (*ALLOWED, NO_GOLDEN)
    return reason.startswith(allowed)


_refused: list[str] = []


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not is_allowed(reason):
            _refused.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("VLM_CI") and _refused and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("VLM_CI") and _refused:
        terminalreporter.section("skipped under VLM_CI for reasons that are not allowed", sep="=", red=True)
        for line in _refused:
            terminalreporter.line(line)
