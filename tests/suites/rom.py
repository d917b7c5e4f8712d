"""Run a BIOS ROM image that reports its progress to a POST port, on the bare processor.

    python -m tests.suites.rom test386.bin --post-port 0x190 --success 0xFF

The image lies below 1 MiB and below 4 GiB, and begins at the reset vector. The run is over when the processor halts
for good or shuts down, or after --seconds; it has passed when the last POST code is --success. ASCII output of the
serial ports' data registers, and of --out-port, goes to standard output.
"""

from __future__ import annotations

import argparse
import mmap
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from vmonty.base.errors import UsageError
from vmonty.cpu import inspection, models
from vmonty.cpu.core import Cpu

RAM = 16 << 20
SERIAL, LINE_STATUS, TRANSMITTER_EMPTY = (0x3F8, 0x2F8), 5, 0x60


@dataclass
class Outcome:
    """How a run ended: the POST codes in order, the text, and why and where the processor stopped."""

    codes: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = ""
    where: str = ""


def board(image: bytes, model: str) -> Cpu:
    """A processor after reset, RAM, and the ROM in its two places. Raises UsageError for an image of a wrong size."""
    if not 0 < len(image) <= 256 << 10 or len(image) % 4096:
        raise UsageError(f"a ROM image has a multiple of 4096 bytes, up to 256 KiB; this one has {len(image)}")
    cpu = Cpu()
    models.install(cpu, models.parse(model))
    ram, rom = mmap.mmap(-1, RAM), mmap.mmap(-1, len(image))
    rom[:] = image
    low = (1 << 20) - len(image)
    cpu.add_region(0, memoryview(ram)[:low])
    cpu.add_region(low, rom, readonly=True)
    cpu.add_region(1 << 20, memoryview(ram)[1 << 20 :])
    cpu.add_region((1 << 32) - len(image), rom, readonly=True)
    return cpu


def run(
    image: bytes, post_port: int, out_port: int | None = None, seconds: float = 60, model: str = "qemu64"
) -> Outcome:
    """Run *image* to its end or for *seconds*."""
    cpu, outcome, text = board(image, model), Outcome(), bytearray()
    watchdog = threading.Timer(seconds, cpu.kick)
    watchdog.start()
    try:
        while (reason := cpu.run()) in ("pio", "mmio"):
            e = cpu.exit
            port = e["address"]
            if reason == "mmio":
                cpu.answer((1 << 64) - 1)
            elif not e["write"]:
                ready = port - LINE_STATUS in SERIAL
                cpu.answer(TRANSMITTER_EMPTY if ready else 0xFFFFFFFF)
            elif port == post_port:
                outcome.codes.append(e["data"] & 0xFF)
            elif port in SERIAL or port == out_port:
                text.append(e["data"] & 0xFF)
    finally:
        watchdog.cancel()
    state = inspection.debug_state(cpu)
    outcome.reason, outcome.text = reason, text.decode("latin-1")
    outcome.where = f"cs:ip {state['cs'].selector:#x}:{state['rip']:#x} (base {state['cs'].base:#x})"
    return outcome


def main() -> int:
    """The command line: 0 when the image reported success."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--post-port", type=lambda text: int(text, 0), default=0x80)
    parser.add_argument("--out-port", type=lambda text: int(text, 0))
    parser.add_argument("--success", type=lambda text: int(text, 0), default=0xFF)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cpu", default="qemu64", help="a CPU model")
    options = parser.parse_args()
    outcome = run(options.image.read_bytes(), options.post_port, options.out_port, options.seconds, options.cpu)
    sys.stdout.write(outcome.text)
    last = f"{outcome.codes[-1]:#04x}" if outcome.codes else "none"
    print(f"{len(outcome.codes)} POST codes, last {last}; {outcome.reason} at {outcome.where}", file=sys.stderr)
    return outcome.codes[-1:] != [options.success]


if __name__ == "__main__":
    sys.exit(main())
