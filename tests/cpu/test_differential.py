"""The CI size of the differential tests, in a child process: generated code may take its process down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("seed", [1, 2])
def test_against_the_host_processor(seed: int) -> None:
    """Random sequences of every row of the table leave the same registers, flags, memory and faults."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cpu.differential", "--cases", "12000", "--seed", str(seed)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
