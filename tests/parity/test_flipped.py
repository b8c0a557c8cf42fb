"""Flipped-VQA (arXiv 2310.15747): the recorded steps and option scores, reproduced."""

from __future__ import annotations

import pytest
from text_system import TextSystemParity

FILES = [
    "flipped_vqa.pt",
    "flipped_all.pt",
    "flipped_all_alllayers.pt",
    "flipped_star.pt",
    "flipped_tvqa.pt",
    "flipped_tvqa_overflow.pt",
]


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestFlipped(TextSystemParity):
    pass
