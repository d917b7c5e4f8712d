"""Option ROMs: a card's own, in its ROM BAR, and those that belong to no card, which firmware gets by fw_cfg.

Source: PCI Firmware Specification 3.0, "PCI Expansion ROM"; UEFI Specification, "PCI Option ROMs".
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vmonty.base.errors import UsageError
from vmonty.vmm.bootorder import check_index

SIGNATURE = b"\x55\xaa"
BLOCK = 512  # what a ROM counts its size in
MOST_BYTES = 16 << 20
FOLDER, MOST_NAME = "genroms/", 55  # of a file in fw_cfg
# Debian's iPXE for the card: a ROM for a BIOS, and a driver for UEFI.
IPXE_VIRTIO = Path("/usr/lib/ipxe/qemu/efi-virtio.rom")


def read_rom(path: Path) -> bytes:
    """The ROM in the file *path*. Raises UsageError for what is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the option ROM {path} cannot be read: {error.strerror}") from error
    if not data.startswith(SIGNATURE) or len(data) < BLOCK or len(data) > MOST_BYTES:
        raise UsageError(
            f"{path} is no option ROM: it must begin with 55 AA, and have {BLOCK} bytes to {MOST_BYTES >> 20} MiB"
        )
    return data


class OptionRom(NamedTuple):
    """A ROM that firmware runs though no card has it, from ``FILE[,bootindex=N]``."""

    name: str
    data: bytes
    boot_index: int | None = None

    @classmethod
    def parse(cls, text: str) -> OptionRom:
        """Read it. Raises UsageError."""
        name, *options = text.split(",")
        index = None
        for option in options:
            key, _, value = option.partition("=")
            if key != "bootindex":
                raise UsageError(f"--option-rom {name}: {option!r} is no option; there is: bootindex=N")
            index = check_index(f"--option-rom {name}", value)
        made = cls(Path(name).name, read_rom(Path(name)), index)
        if len(made.file_name.encode()) > MOST_NAME:
            raise UsageError(
                f"--option-rom {name}: the file's name is too long; {MOST_NAME - len(FOLDER)} bytes at most"
            )
        return made

    @property
    def file_name(self) -> str:
        """In fw_cfg."""
        return f"{FOLDER}{self.name}"

    @property
    def boot_path(self) -> str:
        """In the boot order."""
        return f"/rom@{self.file_name}"
