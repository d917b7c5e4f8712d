"""Random sequences of ioctls with random arguments: no crash, no hang, no errno that the documentation doesn't have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("VMONTY_STRESS_S", "0"))
SEEDS = range(3 + int(SECONDS))
STEPS = 1500
WATCHDOG_S = 120


@pytest.mark.parametrize("seed", SEEDS)
def test_random_ioctls(seed: int) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-m", "tests.kvm_soft.ioctl_fuzz", str(seed), str(STEPS)],
            cwd=ROOT, capture_output=True, text=True, timeout=WATCHDOG_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as hung:
        said = (hung.stdout or b"").decode().splitlines()[-3:]
        pytest.fail(f"seed {seed} hangs after {said}", pytrace=False)
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-600:]} {done.stderr[-3000:]}"
    assert done.stdout.endswith("done\n")
