"""ViCo: the recorded steps and option scores, reproduced."""

from __future__ import annotations

import pytest
from text_system import TextSystemParity

FILES = [
    "vico.pt",
    "vico_alllayers.pt",
    "vico_star.pt",
    "vico_intentqa.pt",
]


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestViCo(TextSystemParity):
    pass
