"""QEMU's TCG as a peer: the payload image as a Multiboot kernel, its CPU time between two marks; command lines."""

from __future__ import annotations

from pathlib import Path

from vmonty.bench.payload import NAMES, Image
from vmonty.bench.process import Process

COMMAND = (
    "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-no-reboot",
)  # fmt: skip


def run_tcg(image: Image, name: str, repeats: int, timeout: float = 300) -> tuple[float, int]:
    """CPU seconds and checksum of a payload under QEMU's TCG. Raises PayloadError."""
    arguments = [*COMMAND, "-M", "pc", "-m", "64", "-debugcon", "stdio"]
    with Process([*arguments, "-kernel", str(image.path), "-append", f"{NAMES.index(name)} {repeats}"]) as child:
        child.wait_for(b"S", timeout)
        begin = child.cpu_seconds()
        child.wait_for(b"E", timeout)
        seconds = child.cpu_seconds() - begin
        return seconds, int(child.read(16, timeout), 16)


def direct_boot(
    machine: str, memory: int, kernel: Path, initrd: Path | None = None, command_line: str = ""
) -> list[str]:
    """The command that boots *kernel* under TCG with *memory* bytes and its console on the standard streams."""
    arguments = [*COMMAND, "-M", machine, "-m", f"{memory >> 20}", "-serial", "stdio", "-kernel", str(kernel)]
    if initrd is not None:
        arguments += ["-initrd", str(initrd)]
    return [*arguments, "-append", command_line] if command_line else arguments
