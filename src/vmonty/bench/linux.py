"""Linux guests to measure in: the busybox guest and a program of ours in it, on vmonty and under QEMU's TCG at once.

All run the same kernel, initrd and command line. A measurement is a command on the guest's serial console; its time and
CPU time count between the marks that the program prints.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmonty.bench import payload
from vmonty.bench.compiler import PayloadError, compiled
from vmonty.bench.process import Process
from vmonty.bench.qemu import direct_boot
from vmonty.bench.report import Row, qemu_version
from vmonty.guests import busybox, cpio
from vmonty.guests.progress import Progress

MEMORY = 256 << 20
COMMAND_LINE = "console=ttyS0 quiet cryptomgr.notests=1"
PROMPT = b"/root # "
BOOT_LIMIT_S, MEASURE_LIMIT_S = 300.0, 300.0
SOURCE = payload.SOURCES / "linux" / "transfers.c"
GCC = ("gcc", "-O2", "-static", "-Wall")


@dataclass(frozen=True)
class Sample:
    """What one measurement took, in seconds: of the clock, and of the monitor's process with all its threads."""

    wall: float
    cpu: float


class Guest:
    """A running guest at its prompt."""

    def __init__(self, who: str, process: Process) -> None:
        self.who = who
        self._process = process
        process.wait_for(PROMPT, BOOT_LIMIT_S)

    def command(self, text: str, ready: Callable[[], None] | None = None) -> Sample:
        """Run *text*, which is the program with arguments; *ready* is called once it says so. Raises PayloadError."""
        process = self._process
        process.write(text.encode() + b"\n")
        if ready is not None:
            process.wait_for(b"\n[ready]", MEASURE_LIMIT_S)
            ready()
        process.wait_for(b"\n[begin]", MEASURE_LIMIT_S)
        wall, cpu = process.wall_seconds(), process.cpu_seconds()
        said = process.wait_for(b"\n[end]", MEASURE_LIMIT_S)
        taken = Sample(process.wall_seconds() - wall, process.cpu_seconds() - cpu)
        if b"[failed]" in said:
            raise PayloadError(f"{self.who}: {text} failed: {said.decode(errors='replace').strip()}")
        process.wait_for(PROMPT, MEASURE_LIMIT_S)
        return taken


def _initrd(folder: Path, base: Path) -> Path:
    """The busybox guest's, with the program behind it."""
    added = io.BytesIO()
    with cpio.Writer(added) as archive:
        archive.file("bin/transfers", compiled("transfers-*", GCC, [SOURCE]).read_bytes(), mode=0o755)
    path = folder / "initrd"
    original = base.read_bytes()
    path.write_bytes(original + bytes(-len(original) % cpio.SEGMENT_ALIGN) + added.getvalue())
    return path


@contextmanager
def guests(folder: Path, ours: Sequence[str], qemus: Sequence[str], say: Progress) -> Iterator[list[Guest]]:
    """Guests at their prompts: on vmonty with the options *ours*, and where there is a QEMU under TCG with *qemus*.

    Raises PayloadError, GuestError.
    """
    made = busybox.build(progress=say)
    initrd = _initrd(folder, made.initrd)
    command = [
        sys.executable, "-m", "vmonty", "run", "--accel", "soft", "--no-reboot", "--memory", f"{MEMORY >> 20}M",
        "--kernel", str(made.kernel), "--initrd", str(initrd), "--append", COMMAND_LINE, *ours,
    ]  # fmt: skip
    commands = {"vmonty": command}
    if qemu_version():
        commands["qemu_tcg"] = [*direct_boot("pc", MEMORY, made.kernel, initrd, COMMAND_LINE), *qemus]
    with contextlib.ExitStack() as running:
        found = []
        for number, (who, words) in enumerate(commands.items()):
            say("booting", number, len(commands))
            found.append(Guest(who, running.enter_context(Process(words))))
        yield found


def rows(name: str, unit: str, amount: float, taken: dict[str, list[Sample]], target: str) -> list[Row]:
    """Two rows of a measurement that moved *amount* of *unit*: a second's worth by the clock, and by CPU time."""
    made = []
    for suffix, seconds in ((f"{unit}/s", lambda sample: sample.wall), (f"{unit}/CPU s", lambda sample: sample.cpu)):
        known = {who: amount / statistics.median(map(seconds, samples)) for who, samples in taken.items()}
        made.append(Row(f"{name}, {suffix}", "", "more", known["vmonty"], None, known.get("qemu_tcg"), target))
        target = ""
    return made
