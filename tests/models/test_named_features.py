"""Encoders of one tensor: it has the name that was asked for, and is what it was without a name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlm.models import glimpse
from vlm.models.encoders import open_glimpse


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = torch.randint(0, 256, (80, 64, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("encoder") / "a.encoder.safetensors"
    glimpse.save(glimpse.fit(frames), path)
    return path


def test_a_name_is_that_of_the_tensor(file: Path) -> None:
    plain, named = open_glimpse(file, frames=4), open_glimpse(file, name="glimpse", frames=4)
    assert (plain.names, named.names) == (("features",), ("glimpse",))
    assert list(named.tensors) == ["glimpse"]
    assert named.tensors["glimpse"] == plain.tensors["features"]
    frames = torch.randint(0, 256, (4, 64, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    made = named.encoder(frames)
    assert list(made) == ["glimpse"]
    joined = named.encoder.join(made)
    assert list(joined) == ["glimpse"]
    assert joined["glimpse"].shape == (4, glimpse.GlimpseEncoder.width)
    torch.testing.assert_close(joined["glimpse"], plain.encoder.join(plain.encoder(frames)), rtol=0, atol=0)
