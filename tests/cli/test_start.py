"""A start waits for nothing that it does not use."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmonty.bench.boot import first_instructions
from vmonty.bench.process import Process

LIMIT_S = 60
# What a machine with neither disk nor network, screen nor control socket does without.
UNUSED = (
    "dataclasses", "json", "pydantic", "rich", "vmonty.guests.apt", "vmonty.guests.busybox", "vmonty.vm.machine",
    "vmonty.vm.settings", "vmonty.vmm.block.file", "vmonty.vmm.control", "vmonty.vmm.display", "vmonty.vmm.net.user",
    "vmonty.vmm.virtio",
)  # fmt: skip


@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_what_a_plain_start_imports(tmp_path: Path, machine: str) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(first_instructions())
    command = [sys.executable, "-X", "importtime", "-m", "vmonty", "run", "--accel", "soft", "--net", "none"]
    with Process([*command, "--machine", machine, "--kernel", str(kernel), "--append", ""]) as process:
        process.wait_for(b"!", LIMIT_S)
        imported = set(re.findall(r"^import time:.*\| +(\S+)$", process.errors(), re.MULTILINE))
    assert "vmonty.vmm.machine" in imported
    assert sorted(imported & set(UNUSED)) == []


def test_an_interruption_before_it_has_begun_shows_no_traceback() -> None:
    """Python tells what it imports; when the first module of click has come, most of the rest is still to come."""
    line = [sys.executable, "-X", "importtime", "-m", "vmonty", "doctor"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        text = b""
        while b"click" not in text:
            text += os.read(process.stderr.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        text += process.stderr.read()
    assert process.returncode in (-signal.SIGINT, 130)
    assert b"Traceback" not in text
