"""Which medium firmware starts from: media in an order, and single devices that go before them.

Firmware is told twice. CMOS knows kinds of media only. The fw_cfg file ``bootorder`` names devices by Open Firmware
paths, as SeaBIOS and OVMF read it. Source: QEMU's documentation, "Managing device boot order with bootindex
properties"; IEEE 1275, "PCI Bus Binding".
"""

from __future__ import annotations

from typing import NamedTuple

from vmonty.base.errors import UsageError

# QEMU's letters → the nibbles by which CMOS has them.
FLOPPY, DISK, CDROM, NETWORK = "a", "c", "d", "n"
NIBBLES = {FLOPPY: 1, DISK: 2, CDROM: 3, NETWORK: 4}
MOST_KINDS = 3
USUAL = DISK + FLOPPY + CDROM
# CMOS registers: the third medium, with bit 0 against a check of floppies for a signature; the second and the first.
CMOS_THIRD, CMOS_FIRST_TWO = 0x38, 0x3D
NO_FLOPPY_CHECK = 1
MOST_INDEX = 1 << 30
HALT = "HALT"


class _Device(NamedTuple):
    kind: str
    path: str
    place: int | None


def check_order(text: str) -> str:
    """*text* if it is an order such as ``dcn``, each medium once. Raises UsageError."""
    if not 1 <= len(text) <= MOST_KINDS or set(text) - NIBBLES.keys() or len(set(text)) != len(text):
        raise UsageError(
            f"--boot: the order {text!r} is none: up to {MOST_KINDS} different letters of "
            "a (floppy), c (disk), d (CD-ROM) and n (network)"
        )
    return text


def check_index(option: str, text: str) -> int:
    """The boot index in *text*. Raises UsageError that begins with *option*."""
    if not text.isdecimal() or int(text) > MOST_INDEX:
        raise UsageError(f"{option}: bootindex={text!r}: a number from 0, which is first, to {MOST_INDEX}")
    return int(text)


def cmos_registers(order: str) -> dict[int, int]:
    """CMOS registers and their values for *order*, the usual one if it is empty."""
    first, second, third, *_ = [*(NIBBLES[kind] for kind in order or USUAL), 0, 0, 0]
    return {CMOS_FIRST_TWO: second << 4 | first, CMOS_THIRD: third << 4 | NO_FLOPPY_CHECK}


class BootOrder:
    """The devices of one machine that firmware may start from."""

    def __init__(self) -> None:
        self._devices: list[_Device] = []

    def add(self, kind: str, path: str, index: int | None = None) -> None:
        """A device of *kind* at *path*; with *index* it goes before all without. Raises UsageError for one in use."""
        if index is not None and any(device.place == index for device in self._devices):
            raise UsageError(f"bootindex={index} is given twice")
        self._devices.append(_Device(kind, path, index))

    def file(self, order: str = "", *, strict: bool = False) -> bytes:
        """The contents of ``bootorder``: devices with an index, then those of the media that *order* names.

        *strict* tells firmware to try nothing else. Empty when there is nothing to tell.
        """
        first = sorted(
            (device.place, device.path) for device in self._devices if device.place is not None
        )  # each index is there once
        paths = [path for _, path in first]
        for kind in order:
            paths += [device.path for device in self._devices if device.kind == kind and device.place is None]
        if strict:
            paths.append(HALT)
        return "\n".join(paths).encode() + b"\0" if paths else b""
