"""``vmonty bench boot``: a distribution's kernel to its first process, or to its login, on soft and under QEMU's TCG;
and what starts by firmware, which firmware.py measures.

Both get the same kernel, initrd, command line, memory and disk in turns, and a serial console on pipes; time counts
from the start of the process to the line that the initrd's script prints, or the login prompt. vmonty's kernel cache is
warm, as it is from the second boot on. What a guest writes to its disk ends with it.
"""

from __future__ import annotations

import statistics
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vmonty.base.errors import GuestError
from vmonty.bench import firmware
from vmonty.bench.compiler import PayloadError
from vmonty.bench.process import Process
from vmonty.bench.qemu import direct_boot
from vmonty.bench.report import Report, Row, qemu_version
from vmonty.guests import busybox, rootdisk
from vmonty.guests.progress import Progress, silent
from vmonty.vmm.boot import kernelcache, linux

MACHINES = ("pc", "q35", "microvm")
DEBIAN = "debian"  # the guest of `vmonty run debian`, on a pc
LINUX = (*MACHINES, DEBIAN)
NAMES = (*LINUX, *firmware.SUBJECTS)
MEMORY = 512 << 20
UP, COMMAND_LINE = b"vmonty: userspace is up", "console=ttyS0"
LOGIN = b" login: "
QUICK = ("pc", "microvm", "seabios")  # what a minute is enough for
LIMIT_S, QUICK_LIMIT_S, LOGIN_LIMIT_S = 120.0, 25.0, 900.0
# The most that it should take of TCG's time.
SHARE = {"pc": "≤ 0.7 × TCG", "microvm": "≤ 0.5 × TCG", DEBIAN: "≤ 0.8 × TCG"}

_MARK = b"!"
_LOAD = 0x10_0000

Command = Callable[[str, int, Path, Path | None, str], list[str]]


class Boot(NamedTuple):
    """What is booted: until *last* is said, within *limit* seconds; *disk* is a qcow2 image."""

    name: str
    machine: str
    kernel: Path
    initrd: Path
    command_line: str
    last: bytes
    limit: float
    disk: Path | None = None

    def command(self, who: str) -> list[str]:
        """The command line of *who*: vmonty or qemu_tcg."""
        make = vmonty_boot if who == "vmonty" else qemu_boot
        words = make(self.machine, MEMORY, self.kernel, self.initrd, self.command_line)
        if self.disk is None:
            return words
        if who == "vmonty":
            return [*words, "--disk", f"{self.disk},format=qcow2,snapshot"]
        drive = f"file={self.disk},if=none,id=disk,format=qcow2,snapshot=on"
        return [*words, "-drive", drive, "-device", "virtio-blk-pci,drive=disk"]


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


def measure(names: Sequence[str] = (), quick: bool = False, say: Progress = silent) -> Report:
    """Boot what *names* has of NAMES (default: all, *quick* QUICK): medians of three rounds, *quick* of one.

    A boot that QEMU does not finish is told, and left out; so is what this host lacks, unless it is asked for. Raises
    PayloadError, GuestError, UsageError.
    """
    chosen = names or (QUICK if quick else NAMES)
    report = Report("Boot: from the start of the process, where no other is said")
    if linux_boots := [name for name in chosen if name in LINUX]:
        report.rows += _linux_rows(_boots(linux_boots, bool(names), say), quick, say)
    rounds = 1 if quick else 3
    report.rows += firmware.rows([name for name in chosen if name not in LINUX], bool(names), rounds, say)
    return report


def _linux_rows(boots: Sequence[Boot], quick: bool, say: Progress) -> list[Row]:
    for kernel in {boot.kernel for boot in boots}:
        image = kernel.read_bytes()
        at, length = linux.parse(image).payload
        kernelcache.unpack(image[at : at + length])
    commands: dict[str, Command] = {"vmonty": vmonty_boot}
    if qemu_version():
        commands["qemu_tcg"] = qemu_boot
    rounds = 1 if quick else 3
    taken: dict[tuple[str, str, str], list[float]] = {}
    steps, step = rounds * len(boots), 0
    for _ in range(rounds):
        for boot in boots:
            say("boots", step, steps)
            step += 1
            for who in commands:
                try:
                    figures = _boot(boot, who, QUICK_LIMIT_S if quick and who != "vmonty" else boot.limit)
                except PayloadError as error:
                    if who == "vmonty":
                        raise
                    say(f"left out: {error}", 0, 0)
                    continue
                for what, value in figures.items():
                    taken.setdefault((boot.name, what, who), []).append(value)
    rows = []
    for boot in boots:
        title = "Debian disk to login" if boot.name == DEBIAN else boot.name
        for what, unit, target in (
            ("CPU time", "s", SHARE.get(boot.name, "")),
            ("wall time", "s", SHARE.get(boot.name, "")),
            ("resident beyond RAM", "MB", "≤ 80 MB"),
        ):
            known = {who: statistics.median(got) for who in commands if (got := taken.get((boot.name, what, who)))}
            row = Row(f"{title}, {what}", unit, "less", known["vmonty"], None, known.get("qemu_tcg"), target)
            rows.append(row)
    return [*rows, _first_instruction(commands, rounds)]


def _boots(names: Sequence[str], asked: bool, say: Progress) -> list[Boot]:
    """Raises GuestError for a guest that is *asked* for and not there."""
    found = []
    for name in names:
        if name != DEBIAN:
            guest = busybox.build(progress=say)
            found.append(Boot(name, name, guest.kernel, guest.initrd, COMMAND_LINE, UP, LIMIT_S))
            continue
        disk = rootdisk.cached()
        if disk is not None:
            found.append(
                Boot(name, "pc", disk.kernel, disk.initrd, rootdisk.COMMAND_LINE, LOGIN, LOGIN_LIMIT_S, disk.disk)
            )
        elif asked:
            raise GuestError("the Debian guest is not built: run `vmonty guest build debian`")
        else:
            say("left out: the Debian guest, which `vmonty guest build debian` makes", 0, 0)
    return found


def _boot(boot: Boot, who: str, limit: float) -> dict[str, float]:
    with Process(boot.command(who)) as process:
        process.wait_for(boot.last, limit)
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
