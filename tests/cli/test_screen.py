"""``vmonty run --vnc`` and ``vmonty screenshot``: what they refuse; their work is seen in tests/vmm/display."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Result

Run = Callable[..., Result]


@pytest.mark.parametrize("value", ["", "nowhere", ":0,websocket=x", ":0,colour=red"])
def test_a_display_that_cannot_be(vmonty: Run, kernel: Path, value: str) -> None:
    assert "--vnc" in vmonty("run", "--kernel", kernel, "--accel", "kvm", "--vnc", value).refusal()


def test_a_screenshot_is_a_file_or_text(vmonty: Run, tmp_path: Path) -> None:
    path = tmp_path / "control"
    for words in ([], [tmp_path / "x.png", "--text"]):
        assert "give a FILE for the picture, or --text" in vmonty("screenshot", path, *words).refusal()
    assert "no machine listens at" in vmonty("screenshot", path, "--text").refusal()
