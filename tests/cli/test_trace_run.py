"""`vmonty run` with --trace and --trace-only, from start to end, with a kernel of a few instructions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmm import kernels

from .conftest import LIMIT_S, environment


@pytest.mark.parametrize("name", ["exits.jsonl", "exits.json"])
def test_the_exits_of_a_run(tmp_path: Path, name: str) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(kernels.kernel(kernels.HELLO))
    trace = tmp_path / name
    done = subprocess.run(
        [
            sys.executable, "-m", "vmonty", "run", "--accel", "soft", "--memory", "8M", "--kernel", str(image),
            "--trace", str(trace), "--trace-only", "IO_INSTRUCTION",
        ],
        input=b"", capture_output=True, timeout=LIMIT_S, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"hello from CPL 0" in done.stdout
    text = trace.read_text()
    if trace.suffix == ".json":
        exits = [event["args"]["exit"] for event in json.loads(text) if event["name"] == "guest"]
    else:
        exits = [json.loads(line)["exit"] for line in text.splitlines()]
    assert set(exits) == {"IO_INSTRUCTION"}
    assert len(exits) >= len("hello from CPL 0")
