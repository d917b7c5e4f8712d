"""``vmonty bench boot``, its part by firmware: Debian's, and what it boots from CD, on soft and under QEMU's TCG.

Each subject is a command line for both, with its console on the standard streams, and the text by which it has arrived.
Counted is the process's CPU time from its start to that text. With SeaBIOS that is mostly the start of the process,
which boot.py measures by itself: so SeaBIOS is counted from the guest's start, too.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vmonty.base.errors import VmontyError
from vmonty.bench.compiler import PayloadError
from vmonty.bench.process import Process
from vmonty.bench.qemu import COMMAND
from vmonty.bench.report import Row, qemu_version
from vmonty.guests import busybox
from vmonty.guests.progress import Progress, silent
from vmonty.vm import VM
from vmonty.vmm.firmware import read as read_firmware

MEMTEST = Path("/boot/memtest86+x64.bin")
LIMIT_S = 300.0
TARGET = "≤ 0.7 × TCG"
MENU = """\
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
set timeout=0
menuentry "it" {{
    {line}
}}
"""


class Subject(NamedTuple):
    """What is booted by whom, until *arrived* is said."""

    name: str
    arrived: bytes
    vmonty: list[str]
    qemu: list[str]


def _make_cd(folder: Path, name: str, kernel: Path, line: str) -> Path:
    """A CD with GRUB, which boots *kernel* at once. Raises PayloadError."""
    tree, cd = folder / name, folder / f"{name}.iso"
    (tree / "boot/grub").mkdir(parents=True)
    shutil.copy(kernel, tree / "kernel")
    (tree / "boot/grub/grub.cfg").write_text(MENU.format(line=line))
    try:
        subprocess.run(["grub-mkrescue", "-o", cd, tree], check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        raise PayloadError(
            "grub-mkrescue made no CD: apt-get install grub-common grub-pc-bin xorriso mtools"
        ) from error
    return cd


def _seabios(folder: Path) -> Subject:
    read_firmware("bios")
    return Subject(
        "SeaBIOS to its boot menu", b"Press ESC for boot menu.",
        ["--firmware", "bios", "--boot", "menu=on,wait=60000"],
        ["-M", "pc,graphics=off", "-boot", "menu=on,splash-time=60000"],
    )  # fmt: skip


def _grub(folder: Path) -> Subject:
    guest = busybox.build()
    line = "linux /kernel console=ttyS0 earlyprintk=serial"
    cd = str(_make_cd(folder, "grub", guest.kernel, line))
    return Subject("GRUB from CD to a kernel", b"Linux version", ["--cdrom", cd], ["-M", "pc", "-cdrom", cd])


def _memtest(folder: Path) -> Subject:
    if not MEMTEST.exists():
        raise PayloadError(f"{MEMTEST} is not there: apt-get install memtest86+")
    cd = str(_make_cd(folder, "memtest", MEMTEST, "linux /kernel console=ttyS0,115200"))
    return Subject("memtest86+ from CD to its screen", b"Memory", ["--cdrom", cd], ["-M", "pc", "-cdrom", cd])


def _ovmf(folder: Path) -> Subject:
    store = folder / "variables"
    code, variables = Path("/usr/share/OVMF/OVMF_CODE.fd"), Path("/usr/share/OVMF/OVMF_VARS.fd")
    if not code.exists():
        raise PayloadError(f"{code} is not there: apt-get install ovmf")
    shutil.copy(variables, store)
    return Subject(
        "OVMF to its shell", b"UEFI Interactive Shell",
        ["--firmware", "uefi", "--machine", "q35"],
        ["-M", "q35", "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}",
         "-drive", f"if=pflash,format=raw,unit=1,file={store}"],
    )  # fmt: skip


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "seabios": _seabios, "memtest": _memtest, "ovmf": _ovmf, "grub": _grub,
}  # fmt: skip


def rows(names: Sequence[str], asked: bool, rounds: int, say: Progress = silent) -> list[Row]:
    """Boot the SUBJECTS *names*: medians of *rounds*. What QEMU does not finish is told, and left out.

    So is what this host lacks, unless it was *asked* for. Raises PayloadError and UsageError.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            say("firmware", number, len(names))
            try:
                subject = SUBJECTS[name](Path(folder))
            except VmontyError as error:
                if asked:
                    raise
                say(f"left out: {error}", 0, 0)
                continue
            found.append(_row(subject, rounds, say))
            if name == "seabios":
                found.append(_from_its_start(subject, rounds))
    return found


def _from_its_start(subject: Subject, rounds: int) -> Row:
    """A VM in a program that runs, this one, with all that makes it; and a QEMU that has made its own and lets go."""
    _in_this_program(subject)  # imports what the others find
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_in_this_program(subject))
        if qemu_version():
            theirs.append(_released_by_qemu(subject))
    peer = statistics.median(theirs) if theirs else None
    return Row(f"{subject.name}, from the guest's start", "s", "less", statistics.median(ours), None, peer, TARGET)


def _in_this_program(subject: Subject) -> float:
    begin = time.process_time()
    with VM(accel="soft", memory="256M", firmware="bios", boot="menu=on,wait=60000") as vm:
        vm.start()
        vm.console.expect(subject.arrived.decode(), timeout=LIMIT_S)
        return time.process_time() - begin


def _released_by_qemu(subject: Subject) -> float:
    with Process([*COMMAND, "-S", "-m", "256", "-serial", "mon:stdio", *subject.qemu]) as process:
        process.write(b"\x01c")  # from the serial console to the monitor
        process.wait_for(b"(qemu)", LIMIT_S)
        begin = process.cpu_seconds()
        process.write(b"cont\n")
        process.wait_for(subject.arrived, LIMIT_S)
        return process.cpu_seconds() - begin


def _row(subject: Subject, rounds: int, say: Progress) -> Row:
    ours = [sys.executable, "-m", "vmonty", "run", "--accel", "soft", "--no-reboot", "--net", "none"]
    commands = {"vmonty": [*ours, "--memory", "256M", *subject.vmonty]}
    if qemu_version():
        commands["qemu_tcg"] = [*COMMAND, "-m", "256", "-serial", "stdio", *subject.qemu]
    taken: dict[str, list[float]] = {who: [] for who in commands}
    for _ in range(rounds):
        for who, command in commands.items():
            try:
                with Process(command) as process:
                    process.wait_for(subject.arrived, LIMIT_S)
                    taken[who].append(process.cpu_seconds())
            except PayloadError as error:
                if who == "vmonty":
                    raise
                say(f"left out: {error}", 0, 0)
    known = {who: statistics.median(seconds) for who, seconds in taken.items() if seconds}
    return Row(subject.name, "s", "less", known["vmonty"], None, known.get("qemu_tcg"), TARGET)
