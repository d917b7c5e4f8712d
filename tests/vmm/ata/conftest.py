"""What tests of ATA's controllers share."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.image import open_image

SECTORS = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image with something in each of its SECTORS."""
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(SECTORS * 512))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[BlockDevice]:
    """The image, open."""
    with open_image(image, format="raw") as opened:
        yield opened
