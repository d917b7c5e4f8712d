"""Linux's own virtio drivers, on both transports, on the software CPU: one boot for all devices."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.guests import busybox
from vmonty.guests.cpio import SEGMENT_ALIGN, Writer
from vmonty.vmm import boards
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.image import open_image
from vmonty.vmm.machine import Config, Machine
from vmonty.vmm.net.user.backend import UserBackend
from vmonty.vmm.outcome import Ending
from vmonty.vmm.peripherals import add_disk, add_network_card, add_virtio
from vmonty.vmm.virtio.balloon import Balloon
from vmonty.vmm.virtio.console import Console, Port
from vmonty.vmm.virtio.rng import Rng

from .conftest import Screen
from .guest_ioctl import ioctl_program

# A boot takes 3 to 8 seconds of CPU time; a busy host needs longer.
BOOT_LIMIT_S = 240.0
MIB = 1 << 20
DISK, MEMORY = 16 * MIB, 256 * MIB

SCRIPT = """
result() { echo "<$1:$2>"; }
result sectors $(cat /sys/block/vda/size)
result serial $(cat /sys/block/vda/serial)
result cache "$(cat /sys/block/vda/queue/write_cache)"
result discard $(cat /sys/block/vda/queue/discard_max_bytes)
result readonly $(cat /sys/block/vdb/ro)
result read $(md5sum </dev/vda)
dd if=/dev/vda of=/tmp/copy bs=1M count=4 2>/dev/null
result written $(tr 'a-z' 'b-za' </tmp/copy | dd of=/dev/vda bs=64k seek=128 conv=fsync 2>/dev/null; md5sum </dev/vda)
blkdiscard -o $((1 << 20)) -l $((2 << 20)) /dev/vda; result discarded "$? $(md5sum </dev/vda)"
/zeroout; result zeroed "$? $(md5sum </dev/vda)"
result random $(head -c 4096 /dev/hwrng | wc -c)
exec 3<>/dev/$(cd /sys/class/virtio-ports; grep -l echo */name | cut -d/ -f1)
echo hello port >&3; read answer <&3; result port "$answer"
exec 4<>/dev/hvc0
echo hello console >&4; read answer <&4; result typed "$answer"
result address $(ip -4 -o addr show eth0 | sed 's/.*inet \\([0-9.]*\\).*/\\1/')
result fetched $(wget -q -O - http://10.0.2.2:@PORT@/data | md5sum)
result offloads $(($(cat /sys/class/net/eth0/statistics/rx_bytes) / $(cat /sys/class/net/eth0/statistics/rx_packets)))
echo "<inflate:now>"
read answer <&3
result inflated "$answer $(($(sed -n 's/MemFree: *\\([0-9]*\\).*/\\1/p' /proc/meminfo) < 140000))"
poweroff -f
"""

# Linux makes one WRITE ZEROES of that.
BLKZEROOUT, ZEROOUT_AT, ZEROOUT_SIZE = 0x127F, 4 * MIB, MIB


class Told(BlockDevice):
    """A disk that writes down what it is asked for beside reads and writes; *inner* stays its owner's."""

    def __init__(self, inner: BlockDevice) -> None:
        self._inner, self.size, self.read_only = inner, inner.size, inner.read_only
        self.calls: set[tuple[object, ...]] = set()

    def preadv(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._inner.preadv(offset, buffers)

    def pwritev(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._inner.pwritev(offset, buffers)

    def flush(self) -> None:
        self.calls.add(("flush",))
        self._inner.flush()

    def discard(self, offset: int, length: int) -> None:
        self.calls.add(("discard", offset, length))
        self._inner.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        self.calls.add(("zeroes", offset, length))
        self._inner.write_zeroes(offset, length, unmap)

    def close(self) -> None:
        """Nothing."""


def zeroing_tool() -> bytes:
    """A second initrd, with that program."""
    made = io.BytesIO()
    with Writer(made) as archive:
        archive.file("zeroout", ioctl_program("/dev/vda", BLKZEROOUT, ZEROOUT_AT, ZEROOUT_SIZE), mode=0o755)
    return made.getvalue()


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SEGMENT_ALIGN)


@pytest.fixture(scope="module")
def guest() -> busybox.Guest:
    return busybox.build()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(5).randbytes(DISK))
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, bytes]]:
    """An HTTP server on the host: its port and what it serves."""
    data = random.Random(6).randbytes(4 * MIB)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, name="http")
        thread.start()
        yield serving.server_port, data
        serving.shutdown()
        thread.join()


def rotated(data: bytes) -> bytes:
    return data.translate(bytes.maketrans(b"abcdefghijklmnopqrstuvwxyz", b"bcdefghijklmnopqrstuvwxyza"))


@pytest.mark.parametrize("board", ["pc", "microvm"])
def test_linux_drives_all_devices(
    guest: busybox.Guest, screen: Screen, disk: Path, server: tuple[int, bytes], board: str
) -> None:
    before = disk.read_bytes()
    port, served = server
    console, echo = bytearray(), Port(lambda data: echo.receive(data.upper()), name="echo")
    config = Config(
        guest.kernel.read_bytes(), padded(guest.initrd.read_bytes()) + zeroing_tool(),
        "console=ttyS0 quiet cryptomgr.notests=1", MEMORY, machine=board,
    )  # fmt: skip
    with (
        open_image(disk) as backend,
        open_image(_second(disk), read_only=True) as second,
        kvm.open("soft") as system,
        boards.create(system, config, screen.write) as machine,
    ):
        told = Told(backend)
        add_disk(machine, told)
        add_disk(machine, second, 1)
        add_network_card(machine, UserBackend())
        add_virtio(machine, Rng(machine.memory, machine.loop))
        terminal = Port(console.extend, console=True)
        add_virtio(machine, Console(machine.memory, machine.loop, [terminal, echo]))
        terminal.receive(b"typed\n")
        balloon = Balloon(machine.memory, machine.loop)
        add_virtio(machine, balloon)
        machine.serial.receive(SCRIPT.replace("@PORT@", str(port)).encode())
        machine.start()
        allocated = inflate(machine, screen, balloon)
        echo.receive(b"yes\n")
        outcome = machine.wait(BOOT_LIMIT_S)
    text = bytes(screen.text)
    assert outcome is not None, text[-2000:]
    assert outcome.ending is Ending.POWER_OFF, (outcome, text[-2000:])
    found = dict(re.findall(rb"^<(\w+):(.*?)(?:  -)?>\r?$", text, re.MULTILINE))
    written = before[: 8 * MIB] + rotated(before[: 4 * MIB]) + before[12 * MIB :]
    discarded = written[:MIB] + bytes(2 * MIB) + written[3 * MIB :]
    after = discarded[:ZEROOUT_AT] + bytes(ZEROOUT_SIZE) + discarded[ZEROOUT_AT + ZEROOUT_SIZE :]
    assert found == {
        b"sectors": b"%d" % (DISK // 512),
        b"serial": b"vmonty-0",
        b"cache": b"write back",
        b"discard": b"%d" % (2 << 30),
        b"readonly": b"1",
        b"read": hashlib.md5(before).hexdigest().encode(),
        b"written": hashlib.md5(written).hexdigest().encode(),
        b"discarded": b"0 " + hashlib.md5(discarded).hexdigest().encode(),
        b"zeroed": b"0 " + hashlib.md5(after).hexdigest().encode(),
        b"random": b"4096",
        b"port": b"HELLO PORT",
        b"typed": b"typed",
        b"address": b"10.0.2.15",
        b"fetched": hashlib.md5(served).hexdigest().encode(),
        b"offloads": found[b"offloads"],
        b"inflate": b"now",
        b"inflated": b"yes 1",
    }
    assert int(found[b"offloads"]) > 3000, "frames came in one by one, not as large segments"
    assert disk.read_bytes() == after
    assert told.calls == {("flush",), ("discard", MIB, 2 * MIB), ("zeroes", ZEROOUT_AT, ZEROOUT_SIZE)}
    assert b"hello console\r\n" in console
    assert allocated[0] - allocated[1] > 4 * MIB  # what the guest had touched of it


def _second(disk: Path) -> Path:
    path = disk.with_name("second.raw")
    path.write_bytes(bytes(MIB))
    return path


def inflate(machine: Machine, screen: Screen, balloon: Balloon) -> tuple[int, int]:
    """When the guest is ready, ask it for 80 MiB; bytes of host memory before, and when it is done."""

    def allocated() -> int:
        return os.fstat(machine.memory.ram.fileno()).st_blocks * 512

    deadline = time.monotonic() + BOOT_LIMIT_S

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition():
            assert machine.wait(0) is None, bytes(screen.text)[-2000:]
            assert time.monotonic() < deadline, bytes(screen.text)[-2000:]
            time.sleep(0.05)  # the guest works meanwhile

    wait_for(lambda: b"\n<inflate:now>" in screen.text)
    before = allocated()
    balloon.set_target(MEMORY - 80 * MIB)
    wait_for(lambda: balloon.actual >= 80 * MIB // 4096)
    return before, allocated()
