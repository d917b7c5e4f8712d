"""Firmware: which file is meant, whether it can be one, and what it is told about booting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vmonty.base.errors import BootImageError, UsageError

UNIT = 64 << 10
MOST_BYTES = 16 << 20
# Where Debian's packages and those of others put it.
NAMES = {
    "bios": ("seabios", ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin")),
    # Code and variables in one image. As a ROM: what the guest stores lasts until the machine ends.
    "uefi": ("ovmf", ("/usr/share/ovmf/OVMF.fd", "/usr/share/OVMF/OVMF.fd")),
}
MOST_MENU_WAIT_MS = 0xFFFF


@dataclass(frozen=True)
class Firmware:
    """The ROM that ends at 4 GiB. Raises BootImageError for what no such ROM can be."""

    name: str
    code: bytes

    def __post_init__(self) -> None:
        size = len(self.code)
        if not size or size % UNIT or size > MOST_BYTES:
            raise BootImageError(
                f"the firmware {self.name} has {size} bytes: it must be a multiple of 64 KiB, 16 MiB at most"
            )


def find(text: str) -> Path:
    """The file that *text* means: bios, uefi, or a path. Raises BootImageError when it is not there."""
    if text not in NAMES:
        return Path(text)
    package, places = NAMES[text]
    for place in map(Path, places):
        if place.is_file():
            return place
    raise BootImageError(f"there is no {text} firmware on this host: apt-get install {package}, or give its path")


def read(text: str) -> Firmware:
    """The firmware that *text* means. Raises BootImageError."""
    path = find(text)
    try:
        with path.open("rb") as file:
            return Firmware(str(path), file.read(MOST_BYTES + 1))
    except OSError as error:
        raise BootImageError(f"the firmware {path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class BootOptions:
    """Does firmware show its menu, and how many milliseconds does it wait for the key that opens it?"""

    menu: bool = False
    wait_ms: int | None = None

    @classmethod
    def parse(cls, text: str) -> BootOptions:
        """From ``menu=on,wait=MS``. Raises UsageError that names the option."""
        made = cls()
        for option in filter(None, text.split(",")):
            key, _, value = option.partition("=")
            if key == "menu" and value in ("on", "off"):
                made = replace(made, menu=value == "on")
            elif key == "wait" and value.isdecimal() and int(value) <= MOST_MENU_WAIT_MS:
                made = replace(made, wait_ms=int(value))
            else:
                raise UsageError(
                    f"--boot: {option!r} is no option; "
                    f"there are: menu=on|off, wait=MILLISECONDS up to {MOST_MENU_WAIT_MS}"
                )
        return made
