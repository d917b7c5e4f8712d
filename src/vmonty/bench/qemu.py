"""QEMU's TCG as a peer: the payload image as a Multiboot kernel; its CPU time between two marks on the debug port."""

from __future__ import annotations

import os
import select
import subprocess
import time

from vmonty.bench.payload import NAMES, Image, PayloadError

COMMAND = (
    "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-M", "pc", "-m", "64", "-nodefaults", "-display", "none",
    "-debugcon", "stdio", "-no-reboot",
)  # fmt: skip


def _cpu_seconds(pid: int) -> float:
    """What a process has run, all threads together. The clock's number: clock_getcpuclockid(3), as Linux makes it."""
    return time.clock_gettime(~pid << 3 | 2)


def run_tcg(image: Image, name: str, repeats: int, timeout: float = 300) -> tuple[float, int]:
    """CPU seconds and checksum of a payload under QEMU's TCG. Raises PayloadError."""
    arguments = [*COMMAND, "-kernel", str(image.path), "-append", f"{NAMES.index(name)} {repeats}"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, bufsize=0) as child:
        try:
            _expect(child, b"S", timeout, f"{name} did not start under QEMU")
            begin = _cpu_seconds(child.pid)
            _expect(child, b"E", timeout, f"{name} did not end under QEMU within {timeout:g} s")
            seconds = _cpu_seconds(child.pid) - begin
            assert child.stdout is not None
            checksum = b""
            while len(checksum) < 16 and (part := child.stdout.read(16 - len(checksum))):
                checksum += part
            return seconds, int(checksum, 16)
        finally:
            child.kill()


def _expect(child: subprocess.Popen[bytes], mark: bytes, timeout: float, otherwise: str) -> None:
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], timeout)
    if not ready or os.read(child.stdout.fileno(), 1) != mark:
        raise PayloadError(otherwise)
