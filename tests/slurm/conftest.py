"""A Slurm of three nodes on this machine, for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.slurm_cluster import NO_SLURM, Cluster, missing, running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Started once; the tests are skipped where Slurm is not installed (.ci/run installs it)."""
    if missing():
        pytest.skip(f"{NO_SLURM}: no {', '.join(missing())}")
    with running(nodes=3) as slurm:
        yield slurm
