"""The firmware configuration device, by ports and by DMA."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.vmm.hw import fw_cfg
from vmonty.vmm.hw.fw_cfg import FwCfg
from vmonty.vmm.memory import GuestMemory

MEMORY = 1 << 20
REQUEST, BUFFER = 0x1000, 0x8000


class Firmware:
    def __init__(self) -> None:
        self.memory = GuestMemory(MEMORY)
        self.device = FwCfg(self.memory)

    def read(self, key: int, size: int) -> bytes:
        self.device.write(fw_cfg.SELECTOR, 2, key)
        return bytes(self.device.read(fw_cfg.DATA, 1) for _ in range(size))

    def directory(self) -> dict[str, tuple[int, int]]:
        """Name → (size, number)."""
        (count,) = struct.unpack(">I", self.read(fw_cfg.FILE_DIRECTORY, 4))
        raw = self.read(fw_cfg.FILE_DIRECTORY, 4 + 64 * count)[4:]
        entries = struct.iter_unpack(">IHH56s", raw)
        return {name.rstrip(b"\0").decode(): (size, key) for size, key, _, name in entries}

    def dma(self, control: int, length: int, address: int, *, at: int = REQUEST, halves: bool = True) -> int:
        self.memory.write(at, struct.pack(">IIQ", control, length, address))
        raw = at.to_bytes(8, "big")
        if halves:
            self.device.write(fw_cfg.DMA, 4, int.from_bytes(raw[:4], "little"))
            self.device.write(fw_cfg.DMA + 4, 4, int.from_bytes(raw[4:], "little"))
        else:
            self.device.write(fw_cfg.DMA, 8, int.from_bytes(raw, "little"))
        return int.from_bytes(self.memory.read(at, 4), "big")


@pytest.fixture
def firmware() -> Firmware:
    return Firmware()


def test_signature(firmware: Firmware) -> None:
    assert firmware.read(fw_cfg.SIGNATURE, 6) == b"QEMU\0\0", "zeros behind the end"
    assert firmware.read(fw_cfg.INTERFACE, 4) == b"\3\0\0\0"
    assert firmware.read(0x7777, 2) == b"\0\0", "no such item"


def test_dma_says_that_it_is_there(firmware: Firmware) -> None:
    halves = [firmware.device.read(offset, 4).to_bytes(4, "little") for offset in (4, 8)]
    assert b"".join(halves) == b"QEMU CFG"


def test_files(firmware: Firmware) -> None:
    firmware.device.add_file("opt/b", b"bee")
    firmware.device.add_file("etc/a", b"ay")
    assert list(firmware.directory()) == ["etc/a", "opt/b"]
    size, key = firmware.directory()["opt/b"]
    assert firmware.read(key, size) == b"bee"
    firmware.device.add_file("opt/b", b"bumble")
    size, key = firmware.directory()["opt/b"]
    assert firmware.read(key, size) == b"bumble"


@pytest.mark.parametrize("name", ["", "x" * 56, "ü" * 28])
def test_impossible_names(firmware: Firmware, name: str) -> None:
    with pytest.raises(ValueError, match="file name"):
        firmware.device.add_file(name, b"")


@pytest.mark.parametrize("halves", [True, False])
def test_dma_read(firmware: Firmware, halves: bool) -> None:
    firmware.device.add_file("etc/big", bytes(range(256)) * 700)
    size, key = firmware.directory()["etc/big"]
    control = fw_cfg.DMA_SELECT | fw_cfg.DMA_READ | key << 16
    assert firmware.dma(control, size + 8, BUFFER, halves=halves) == 0
    assert firmware.memory.read(BUFFER, size + 8) == bytes(range(256)) * 700 + bytes(8)


def test_dma_goes_on_where_it_was(firmware: Firmware) -> None:
    firmware.device.add_file("etc/x", b"0123456789")
    _, key = firmware.directory()["etc/x"]
    firmware.dma(fw_cfg.DMA_SELECT | fw_cfg.DMA_SKIP | key << 16, 4, 0)
    firmware.dma(fw_cfg.DMA_READ, 3, BUFFER)
    assert firmware.memory.read(BUFFER, 3) == b"456"


def test_what_cannot_be_done_is_told(firmware: Firmware) -> None:
    assert firmware.dma(fw_cfg.DMA_READ, 16, MEMORY - 8) == fw_cfg.DMA_ERROR
    assert firmware.dma(fw_cfg.DMA_READ, 0xFFFF_FFFF, 0) == fw_cfg.DMA_ERROR
    assert firmware.dma(fw_cfg.DMA_WRITE, 1, BUFFER) == fw_cfg.DMA_ERROR


@given(st.lists(st.tuples(st.integers(0, 11), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))))
def test_no_access_is_wrong(accesses: list[tuple[int, int, int]]) -> None:
    firmware = Firmware()
    for offset, size, value in accesses:
        firmware.device.write(offset, size, value)
        assert firmware.device.read(offset, size) >= 0
