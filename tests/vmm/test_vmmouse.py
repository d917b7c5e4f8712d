"""VMware's mouse: the port as a driver calls it, and Linux's driver, which a viewer's pointer reaches."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.vmm import full_kernel
from tests.vmm.ata.test_ahci_linux import padded
from tests.vmm.display.client import Client
from tests.vmm.display.test_console import free_display

import vmonty
from vmonty.base.errors import GuestError
from vmonty.guests import busybox
from vmonty.guests.cpio import Writer
from vmonty.vmm.hw import ps2, vmmouse
from vmonty.vmm.hw.vmmouse import MAGIC, NOBODY, VmMouse

LIMIT_S = 300.0
NAMES = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi")


class Guest:
    """A vCPU's registers, and the PS/2 mouse beside the port."""

    def __init__(self) -> None:
        self.mouse = ps2.Ps2Mouse()
        self.port = VmMouse(lambda: self, self.mouse)  # type: ignore[arg-type, return-value]
        self.registers = SimpleNamespace(**dict.fromkeys(NAMES, 0))

    def get_regs(self) -> SimpleNamespace:
        return self.registers

    def set_regs(self, registers: SimpleNamespace) -> None:
        self.registers = registers

    def call(self, command: int, argument: int = 0, magic: int = MAGIC) -> tuple[int, ...]:
        """EAX and the other registers after it."""
        values = (magic | 5 << 32, argument, command, vmmouse.PORT, 0x51, 0xD1)
        self.registers = SimpleNamespace(**dict(zip(NAMES, values, strict=True)))
        eax = self.port.read(0, 4)
        return (eax, *(getattr(self.registers, name) for name in NAMES[1:]))

    def enable(self) -> None:
        assert self.call(vmmouse.POINTER_COMMAND, vmmouse.ENABLE)[0] == 0
        assert self.call(vmmouse.POINTER_STATUS)[0] == 1
        assert self.call(vmmouse.POINTER_DATA, 1)[0] == vmmouse.IDENTITY
        self.call(vmmouse.POINTER_COMMAND, vmmouse.ABSOLUTE)
        for command in (ps2.SET_DEFAULTS, ps2.ENABLE):
            self.mouse.write(command)
            assert self.ps2() == bytes((ps2.ACK,))

    def ps2(self) -> bytes:
        return bytes(iter(self.mouse.take, None))


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_it_is_found(guest: Guest) -> None:
    assert guest.call(vmmouse.GET_VERSION, ~MAGIC & NOBODY)[:2] == (6, MAGIC)


def test_places_and_buttons(guest: Guest) -> None:
    guest.enable()
    assert guest.port.absolute
    guest.port.place(1, 2)
    guest.port.place(0x1234, 0xFFFF)  # instead of the one before, which nobody saw
    guest.port.place(0x1234, 0xFFFF, 0, ps2.LEFT | ps2.MIDDLE)
    guest.port.place(0x1234, 0xFFFF, -1, ps2.RIGHT)
    guest.port.place(5, 6, 0, ps2.RIGHT)
    assert guest.call(vmmouse.POINTER_STATUS)[0] == 16
    assert guest.call(vmmouse.POINTER_DATA, 4) == (0, 0x1234, 0xFFFF, 0, 0x51, 0xD1)
    assert guest.call(vmmouse.POINTER_DATA, 4)[:4] == (0x28, 0x1234, 0xFFFF, 0)
    assert guest.call(vmmouse.POINTER_DATA, 6) == (0x10, 0x1234, 0xFFFF, NOBODY, 0x10, 5)
    assert guest.call(vmmouse.POINTER_DATA, 2)[:3] == (6, 0, vmmouse.POINTER_DATA)
    assert guest.call(vmmouse.POINTER_STATUS)[0] == 0


def test_a_packet_tells_of_news(guest: Guest) -> None:
    guest.port.place(1, 2)
    assert guest.ps2() == b"", "nobody wants places yet"
    guest.enable()
    assert guest.ps2() == b""
    guest.port.place(1, 2)
    assert guest.ps2() == b"\x08\0\0"
    assert guest.ps2() == b""


def test_what_is_no_call(guest: Guest) -> None:
    assert guest.call(vmmouse.GET_VERSION, magic=1)[:2] == (NOBODY, 0)
    assert guest.call(0x14)[0] == NOBODY
    assert guest.port.read(0, 2) == NOBODY
    assert guest.call(vmmouse.POINTER_STATUS)[0] == vmmouse.OFF
    assert guest.call(vmmouse.POINTER_COMMAND, vmmouse.ABSOLUTE)[0] == NOBODY
    assert not guest.port.absolute
    guest.port.write(0, 4, 5)
    assert VmMouse(lambda: None, guest.mouse).read(0, 4) == NOBODY


@pytest.mark.parametrize("words", [0, 2, 7, NOBODY])
def test_to_read_what_is_not_there_ends_it(guest: Guest, words: int) -> None:
    guest.call(vmmouse.POINTER_COMMAND, vmmouse.ENABLE)
    assert guest.call(vmmouse.POINTER_DATA, words)[0] == vmmouse.OFF
    assert guest.call(vmmouse.POINTER_STATUS)[0] == vmmouse.OFF


def test_a_guest_that_does_not_read(guest: Guest) -> None:
    guest.enable()
    for n in range(10000):
        guest.port.place(n, n, 0, n & 1)
    guest.port.place(5, 6)
    assert guest.call(vmmouse.POINTER_STATUS)[0] == vmmouse.QUEUE_WORDS
    for _ in range(vmmouse.QUEUE_WORDS // 4 - 1):
        guest.call(vmmouse.POINTER_DATA, 4)
    assert guest.call(vmmouse.POINTER_DATA, 4)[:4] == (0, 5, 6, 0), "the last is how it stands"
    guest.call(vmmouse.POINTER_COMMAND, vmmouse.RELATIVE)
    assert not guest.port.absolute
    guest.call(vmmouse.POINTER_COMMAND, vmmouse.DISABLE)
    assert guest.call(vmmouse.POINTER_STATUS)[0] == vmmouse.OFF


COMMANDS = st.sampled_from((vmmouse.ENABLE, vmmouse.DISABLE, vmmouse.ABSOLUTE, vmmouse.RELATIVE, 0, 1, 3, 4, 5, 6, 7))


@given(st.lists(st.tuples(st.integers(8, 43), COMMANDS, st.integers(0, 3)), max_size=60))
def test_whatever_is_called(calls: list[tuple[int, int, int]]) -> None:
    guest = Guest()
    for command, argument, buttons in calls:
        assert all(0 <= value <= NOBODY for value in guest.call(command, argument))
        guest.port.place(argument & 0xFFFF, 3, 0, buttons)
        assert len(guest.port._queue) <= vmmouse.QUEUE_WORDS


SCRIPT = r"""
insmod /mouse/psmouse.ko; insmod /mouse/evdev.ko
n=0; until device=$(grep -L '^0$' /sys/class/input/event*/device/capabilities/abs) || [ $n = 200 ]
do usleep 50000; n=$((n+1)); done
device=${device%/device/*}; cat $device/device/name; exec 3</dev/input/${device##*/}; echo "ready"
dd bs=24 count=@EVENTS@ <&3 2>/dev/null | od -An -v -w24 -t x8; poweroff -f
"""
# Type, code, value, after the first place.
EVENTS = [(1, 0x110, 1), (0, 0, 0), (3, 0, 0xFFFF), (3, 1, 0xFFFF), (1, 0x110, 0), (0, 0, 0)]


@pytest.mark.skipif(not Path("/usr/share/seabios/vgabios-stdvga.bin").exists(), reason="no video BIOS: seabios")
@pytest.mark.parametrize("board", ["pc", "q35"])
def test_linux_has_its_driver(tmp_path: Path, board: str) -> None:
    try:
        kernel, modules = full_kernel.files(("psmouse", "evdev"))
    except GuestError as error:
        pytest.skip(f"no kernel with psmouse: {error}")
    extra = io.BytesIO()
    with Writer(extra) as archive:
        for name, contents in modules.items():
            archive.file(f"mouse/{name}.ko", contents)
    bzimage, initrd, display = tmp_path / "kernel", tmp_path / "initrd", free_display()
    bzimage.write_bytes(kernel)
    initrd.write_bytes(padded(busybox.build().initrd.read_bytes()) + extra.getvalue())
    with vmonty.VM(
        kernel=bzimage, initrd=initrd, append="console=ttyS0 cryptomgr.notests=1", memory="256M", accel="soft",
        machine=board, vnc=f":{display}",
    ) as vm:  # fmt: skip
        vm.start()
        vm.console.expect("/root # ", LIMIT_S)
        for line in SCRIPT.replace("@EVENTS@", str(3 + len(EVENTS))).strip().splitlines():
            vm.console.sendline(line)
        vm.console.expect("VirtualPS/2 VMware VMMouse", LIMIT_S)
        vm.console.expect("\nready", LIMIT_S)
        client = Client(5900 + display)
        right, bottom = client.width - 1, client.height - 1
        client.point(0, 100, 50)
        client.point(1, 100, 50)
        client.point(0, right, bottom)
        assert vm.wait(LIMIT_S) is not None, vm.console.text[-3000:]
        client.close()
        words = re.findall(r"^ [0-9a-f]{16} [0-9a-f]{16} ([0-9a-f]{16})\r?$", vm.console.text, re.MULTILINE)
        found = [struct.unpack("<HHi", int(word, 16).to_bytes(8, "little")) for word in words]
        there = [(3, 0, 100 * 0xFFFF // right), (3, 1, 50 * 0xFFFF // bottom), (0, 0, 0)]
        assert found == [*there, *EVENTS], vm.console.text[-3000:]
