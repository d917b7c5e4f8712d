"""``vmonty bench boot``: a distribution's kernel to its first process, on soft and under QEMU's TCG, in turns.

Both get the same kernel, initrd, command line and memory, and a serial console on pipes; time counts from the start of
the process to the line that the initrd's script prints. vmonty's kernel cache is warm,
as it is from the second boot on.
"""

from __future__ import annotations

import statistics
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from vmonty.bench.payload import PayloadError
from vmonty.bench.process import Process
from vmonty.bench.qemu import direct_boot
from vmonty.bench.report import Report, Row, qemu_version
from vmonty.guests import busybox
from vmonty.guests.progress import Progress, silent
from vmonty.vmm.boot import kernelcache, linux

MACHINES = ("pc", "q35", "microvm")
MEMORY = 512 << 20
UP, COMMAND_LINE = b"vmonty: userspace is up", "console=ttyS0"
QUICK = ("pc", "microvm")  # what a minute is enough for
LIMIT_S, QUICK_LIMIT_S = 120.0, 25.0
# The most that it should take of TCG's time.
SHARE = {"pc": "≤ 0.7 × TCG", "microvm": "≤ 0.5 × TCG"}

_MARK = b"!"
_LOAD = 0x10_0000

Command = Callable[[str, int, Path, Path | None, str], list[str]]


def vmonty_boot(
    machine: str, memory: int, kernel: Path, initrd: Path | None = None, command_line: str = ""
) -> list[str]:
    """The command that boots *kernel* on vmonty's processor, as ``qemu.direct_boot`` does on QEMU's."""
    arguments = [sys.executable, "-m", "vmonty", "run", "--accel", "soft", "--no-reboot", "--net", "none"]
    arguments += ["--machine", machine, "--memory", f"{memory >> 20}M", "--kernel", str(kernel)]
    if initrd is not None:
        arguments += ["--initrd", str(initrd)]
    return [*arguments, "--append", command_line]


def qemu_boot(machine: str, memory: int, kernel: Path, initrd: Path | None = None, command_line: str = "") -> list[str]:
    """``direct_boot``, with a timer on microvm by which Linux can calibrate.

    Without it QEMU 7.2's microvm now and then hangs in Linux 6.1 ("Unable to calibrate against PIT"); without ACPI
    the guest has less to do, which is in QEMU's favour.
    """
    board = "microvm,pit=on,pic=on,rtc=on,acpi=off" if machine == "microvm" else machine
    return direct_boot(board, memory, kernel, initrd, command_line)


def first_instructions() -> bytes:
    """A Multiboot kernel that says one byte on COM1 and halts."""
    flags = 1 << 16  # the header tells the addresses
    program = b"\x66\xba\xf8\x03\xb0" + _MARK + b"\xee\xfa\xf4\xeb\xfd"  # mov dx, 0x3f8; mov al; out; cli; hlt; jmp
    end = _LOAD + 32 + len(program)
    header = (0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFF_FFFF, _LOAD, _LOAD, end, end, _LOAD + 32)
    return struct.pack("<8I", *header) + program


def measure(machines: Sequence[str] = (), quick: bool = False, say: Progress = silent) -> Report:
    """Boot on *machines* (default: all, *quick* two): medians of three rounds, *quick* of one.

    A boot that QEMU does not finish is told, and left out. Raises PayloadError, GuestError.
    """
    machines = machines or (QUICK if quick else MACHINES)
    guest = busybox.build(progress=say)
    image = guest.kernel.read_bytes()
    at, length = linux.parse(image).payload
    kernelcache.unpack(image[at : at + length])
    commands: dict[str, Command] = {"vmonty": vmonty_boot}
    if qemu_version():
        commands["qemu_tcg"] = qemu_boot
    rounds = 1 if quick else 3
    taken: dict[tuple[str, str, str], list[float]] = {}
    steps, step = rounds * len(machines), 0
    for _ in range(rounds):
        for machine in machines:
            say("boots", step, steps)
            step += 1
            for who, command in commands.items():
                try:
                    figures = _boot(command, machine, guest, QUICK_LIMIT_S if quick and who != "vmonty" else LIMIT_S)
                except PayloadError as error:
                    if who == "vmonty":
                        raise
                    say(f"left out: {error}", 0, 0)
                    continue
                for what, value in figures.items():
                    taken.setdefault((machine, what, who), []).append(value)
    report = Report("Boot: process start to the guest's first process")
    for machine in machines:
        for what, unit, target in (
            ("CPU time", "s", SHARE.get(machine, "")),
            ("wall time", "s", SHARE.get(machine, "")),
            ("resident beyond RAM", "MB", "≤ 80 MB"),
        ):
            known = {who: statistics.median(got) for who in commands if (got := taken.get((machine, what, who)))}
            row = Row(f"{machine}, {what}", unit, "less", known["vmonty"], None, known.get("qemu_tcg"), target)
            report.rows.append(row)
    report.rows.append(_first_instruction(commands, rounds))
    return report


def _boot(command: Command, machine: str, guest: busybox.Guest, limit: float) -> dict[str, float]:
    with Process(command(machine, MEMORY, guest.kernel, guest.initrd, COMMAND_LINE)) as process:
        process.wait_for(UP, limit)
        return {
            "wall time": process.wall_seconds(), "CPU time": process.cpu_seconds(),
            "resident beyond RAM": process.resident_beyond(MEMORY) / 1e6,
        }  # fmt: skip


def _first_instruction(commands: dict[str, Command], rounds: int) -> Row:
    """Wall time until a kernel's first instructions have run; QEMU's firmware runs before them, we have none."""
    taken: dict[str, list[float]] = {who: [] for who in commands}
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder, "kernel")
        kernel.write_bytes(first_instructions())
        for _ in range(2 * rounds + 1):
            for who, command in commands.items():
                with Process(command("pc", MEMORY, kernel, None, "")) as process:
                    process.wait_for(_MARK, LIMIT_S)
                    taken[who].append(process.wall_seconds())
    medians = {who: statistics.median(values) for who, values in taken.items()}
    name = "process start to the kernel's first instruction"
    return Row(name, "s", "less", medians["vmonty"], None, medians.get("qemu_tcg"), "≤ 250 ms")
