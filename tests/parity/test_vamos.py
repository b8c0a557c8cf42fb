"""Vamos (arXiv 2311.13627): the recorded steps and option scores, reproduced."""

from __future__ import annotations

import pytest
from text_system import TextSystemParity

FILES = [
    "vamos_text.pt",
    "vamos_vis.pt",
    "vamos_vis_cap.pt",
    "vamos_vis_alllayers.pt",
    "vamos_vis_mlp.pt",
    "vamos_ptest.pt",
    "vamos_intentqa.pt",
]


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestVamos(TextSystemParity):
    pass
