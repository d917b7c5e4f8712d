"""The CI size of the differential tests, in child processes: generated code may take its process down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.cpu.cases import exists, why_not

from vmonty.cpu import isa, models

# Enough that each row of the table is made in each mode: differential.run complains of one that never was.
CASES = 8000


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("bits", [64, 32, 16])
def test_against_the_host_processor(bits: int, seed: int) -> None:
    """Random sequences of every row of the table leave the same registers, flags, memory and faults."""
    arguments = ["--cases", str(CASES), "--seed", str(seed), "--bits", str(bits)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.cpu.differential", *arguments],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("bits", [64, 32, 16])
def test_faults_against_the_host_processor(bits: int) -> None:
    """With all flags kept, those that a fault leaves are the processor's too."""
    arguments = ["--cases", str(CASES), "--seed", "3", "--bits", str(bits), "--exact"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.cpu.differential", *arguments],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_left_out_is_the_systems() -> None:
    """Every other row is executed on both processors in the modes it exists in."""
    flags = models.host_flags() | {"sha_ni"}
    left_out = {row for row in isa.ROWS if why_not(row, flags)}
    assert {row.cls for row in left_out} <= {"sys", "sysend", "fpu", "cli", "ud", "copy"}
    copied = {row.name for row in left_out if row.cls in ("copy", "ud", "fpu")}
    assert copied == {"RDRAND", "RDSEED", "RSM", "UD0", "XSAVEOPT", "XSAVES", "XRSTORS"}
    assert all(exists(row, 64) or exists(row, 32) for row in isa.ROWS)
