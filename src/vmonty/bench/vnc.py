"""``vmonty bench vnc``: a text console of 1024x768 that scrolls thirty times a second, seen by one viewer.

Counted are the updates that the viewer gets, and the CPU time of the whole process meanwhile: the guest's, the screen's
and the server's. The viewer understands CopyRect and ZRLE; it asks again as soon as it has an update.
"""

from __future__ import annotations

import socket
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path

from vmonty.bench.compiler import PayloadError, compiled
from vmonty.bench.payload import SOURCES
from vmonty.bench.process import Process
from vmonty.bench.qemu import COMMAND
from vmonty.bench.report import Report, Row, qemu_version
from vmonty.guests.progress import Progress, silent
from vmonty.vmm.display.vnc.encodings import Encoding

SOURCE = SOURCES / "screen" / "scroll.c"
GCC = (
    "gcc", "-m32", "-O2", "-ffreestanding", "-fno-stack-protector", "-fcf-protection=none", "-fno-pic", "-no-pie",
    "-nostdlib", "-static", "-Wl,-N", "-Wl,--build-id=none", "-Wl,--section-start=.multiboot=0x100000",
    "-Wl,-Ttext=0x101000",
)  # fmt: skip
SIZE = (1024, 768)
UNDERSTOOD = (Encoding.COPY_RECT, Encoding.ZRLE, Encoding.RAW, Encoding.DESKTOP_SIZE)
LIMIT_S = 60.0
# Rounds, and seconds of each.
FULL, QUICK = (3, 10.0), (1, 4.0)


class Viewer:
    """The least that a viewer has to be. Source: RFC 6143."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT_S)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rb")
        self._read(12)
        self._socket.sendall(b"RFB 003.008\n")
        self._read(self._read(1)[0])
        self._socket.sendall(b"\x01")  # no authentication
        if any(self._read(4)):
            raise PayloadError("the VNC server refused its viewer")
        self._socket.sendall(b"\x01")
        *size, name = struct.unpack(">HH16xI", self._read(24))
        self.size = tuple(size)
        self._read(name)
        self._socket.sendall(struct.pack(f">BxH{len(UNDERSTOOD)}i", 2, len(UNDERSTOOD), *UNDERSTOOD))

    def close(self) -> None:
        """End the connection."""
        self._stream.close()
        self._socket.close()

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise PayloadError("the VNC server closed the connection")
        return data

    def update(self, incremental: bool = True) -> int:
        """Ask for an update and take it; gives its bytes."""
        self._socket.sendall(struct.pack(">BBHHHH", 3, incremental, 0, 0, *self.size))
        kind, rectangles = struct.unpack(">BxH", self._read(4))
        if kind != 0:
            raise PayloadError(f"the VNC server sent message {kind}")
        taken = 4
        for _ in range(rectangles):
            *_, width, height, encoding = struct.unpack(">HHHHi", self._read(12))
            taken += 12
            if encoding == Encoding.DESKTOP_SIZE:
                self.size = width, height
            elif encoding == Encoding.COPY_RECT:
                taken += len(self._read(4))
            elif encoding == Encoding.ZRLE:
                taken += len(self._read(*struct.unpack(">I", self._read(4))))
            elif encoding == Encoding.RAW:
                taken += len(self._read(4 * width * height))
            else:
                raise PayloadError(f"the VNC server used encoding {encoding}")
        return taken


def measure(quick: bool = False, say: Progress = silent) -> Report:
    """Three rounds of ten seconds, *quick* one of four. Raises PayloadError."""
    rounds, seconds = QUICK if quick else FULL
    guest = str(compiled("scroll-*.elf", GCC, [SOURCE]))
    report = Report("VNC: a scrolling text console of 1024x768, one viewer")
    taken: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vnc")
        ours = [sys.executable, "-m", "vmonty", "run", "--accel", "soft", "--net", "none", "--memory", "64M"]
        commands = {"vmonty": [*ours, "--kernel", guest, "--append", "", "--vnc", f"unix:{path}"]}
        if qemu_version():
            plain = [word for word in COMMAND if word not in ("-display", "none")]
            commands["qemu_tcg"] = [
                *plain, "-M", "pc", "-m", "64", "-vga", "std", "-serial", "stdio", "-kernel", guest,
                "-vnc", f"unix:{path}",
            ]  # fmt: skip
        for number in range(rounds):
            for who, command in commands.items():
                say("rounds", number, rounds)
                taken.setdefault(who, []).append(_watch(command, path, seconds))
                path.unlink(missing_ok=True)
    for at, (name, unit, target) in enumerate(
        (("updates", "per second", "≥ 30"), ("CPU time", "cores", "≤ 0.5"), ("sent", "KB per update", ""))
    ):
        known = {who: statistics.median(values[at] for values in all_) for who, all_ in taken.items()}
        better = "more" if at == 0 else "less"
        report.rows.append(Row(name, unit, better, known["vmonty"], None, known.get("qemu_tcg"), target))  # type: ignore[arg-type]
    return report


def _watch(command: list[str], path: Path, seconds: float) -> tuple[float, float, float]:
    """Updates a second, cores, and KB of an update."""
    with Process(command) as process:
        process.wait_for(b"!", LIMIT_S)
        viewer = Viewer(path)
        try:
            viewer.update(incremental=False)
            while viewer.size != SIZE:
                viewer.update()
            viewer.update(incremental=False)
            count = sent = 0
            cpu, begin = process.cpu_seconds(), time.perf_counter()
            while time.perf_counter() - begin < seconds:
                sent += viewer.update()
                count += 1
            passed = time.perf_counter() - begin
            return count / passed, (process.cpu_seconds() - cpu) / passed, sent / count / 1e3
        finally:
            viewer.close()
