"""Firmware: which file is meant, whether it can be one, and what it is told about booting."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from vmonty.base.errors import BootImageError, UsageError
from vmonty.base.ram import PAGE_SIZE
from vmonty.base.record import Record
from vmonty.vmm.bootorder import check_order

UNIT, MIB = 64 << 10, 1 << 20
MOST_BYTES = 16 << 20
# Where Debian's packages and those of others put it.
NAMES = {
    "bios": ("seabios", ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin")),
    # Code and variables in one image. As a ROM: what the guest stores lasts until the machine ends.
    "uefi": ("ovmf", ("/usr/share/ovmf/OVMF.fd", "/usr/share/OVMF/OVMF.fd")),
}
# A firmware with its template of variables, in the order in which a new store takes them.
SPLIT_OVMF = (
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
)
# UEFI PI Specification, volume 3, "Firmware Volume Header": its signature.
VOLUME_SIGNATURE_AT, VOLUME_SIGNATURE = 0x28, b"_FVH"
MOST_MENU_WAIT_MS = 0xFFFF


class Firmware(Record):
    """The ROM that ends at 4 GiB, and the file of a flash chip below it, which keeps the guest's *variables*.

    Raises BootImageError for what no such ROM or flash can be.
    """

    name: str
    code: bytes
    variables: Path | None = None

    def __post_init__(self) -> None:
        size = len(self.code)
        unit = UNIT if self.variables is None else PAGE_SIZE  # a flash chip ends where the other one begins
        if not size or size % unit or size > MOST_BYTES:
            split = self.variables is None and self._is_volume and size and size % PAGE_SIZE == 0
            remedy = (
                "; a UEFI firmware without its variables wants them in a file of their own: --nvram" if split else ""
            )
            raise BootImageError(
                f"the firmware {self.name} has {size} bytes: it must be a multiple of {unit >> 10} KiB, 16 MiB at most"
                + remedy
            )

    @property
    def _is_volume(self) -> bool:
        return self.code.startswith(VOLUME_SIGNATURE, VOLUME_SIGNATURE_AT)

    def check_variables(self, size: int) -> None:
        """Raise BootImageError when no flash of *size* bytes can stand below the ROM."""
        if not size or size % PAGE_SIZE or size + len(self.code) > MOST_BYTES:
            raise BootImageError(
                f"the variable store {self.variables} has {size} bytes: it must be a multiple of 4 KiB, "
                "and 16 MiB with its firmware at most"
            )
        if self._is_volume and (size + len(self.code)) % MIB:
            # Both halves of a UEFI firmware are cut from one flash image: it would look for its variables elsewhere.
            raise BootImageError(
                f"the variable store {self.variables} ({size} bytes) is not of the firmware {self.name} "
                f"({len(self.code)} bytes): together they must be whole MiB"
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


def read(text: str, variables: Path | None = None) -> Firmware:
    """The firmware that *text* means; with *variables* its flash, which is made for uefi when it is not there.

    Raises BootImageError.
    """
    path = find(text)
    if variables is not None and text == "uefi":
        path = _in_two_files(variables)
    try:
        with path.open("rb") as file:
            made = Firmware(str(path), file.read(MOST_BYTES + 1), variables)
    except OSError as error:
        raise BootImageError(f"the firmware {path} cannot be read: {error.strerror}") from error
    if variables is not None:
        try:
            made.check_variables(variables.stat().st_size)
        except OSError as error:
            raise BootImageError(f"the variable store {variables} cannot be read: {error.strerror}") from error
    return made


def _in_two_files(variables: Path) -> Path:
    """OVMF's code for a variable store of its own; the store is made from OVMF's template when it is not there.

    One that is there goes with the build whose template has its size.
    """
    pairs = [(Path(code), Path(template)) for code, template in SPLIT_OVMF]
    pairs = [(code, template) for code, template in pairs if code.is_file() and template.is_file()]
    if not pairs:
        raise BootImageError("there is no OVMF with a variable store on this host: apt-get install ovmf")
    try:
        if variables.exists():
            size = variables.stat().st_size
            return next((code for code, template in pairs if template.stat().st_size == size), pairs[0][0])
        variables.write_bytes(pairs[0][1].read_bytes())
    except OSError as error:
        raise BootImageError(f"the variable store {variables} cannot be made: {error.strerror}") from error
    return pairs[0][0]


def open_store(path: Path) -> BinaryIO:
    """The file of a variable store, for this machine alone. Raises BootImageError."""
    try:
        file = path.open("r+b", buffering=0)
    except OSError as error:
        raise BootImageError(f"the variable store {path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise BootImageError(f"the variable store {path} is in use by another machine") from error
    return cast("BinaryIO", file)


class BootOptions(NamedTuple):
    """What firmware starts from, and does it show its menu, and how many milliseconds does it wait for its key?

    *order* are media by QEMU's letters (see ``bootorder``), *once* those of the first start alone; *strict* keeps
    firmware from trying others.
    """

    menu: bool = False
    wait_ms: int | None = None
    order: str = ""
    once: str = ""
    strict: bool = False

    @classmethod
    def parse(cls, text: str) -> BootOptions:
        """From ``order=dc,once=d,menu=on,strict=on,wait=MS``. Raises UsageError that names the option."""
        made = cls()
        for option in filter(None, text.split(",")):
            key, _, value = option.partition("=")
            if key in ("menu", "strict") and value in ("on", "off"):
                made = made._replace(menu=value == "on") if key == "menu" else made._replace(strict=value == "on")
            elif key == "order":
                made = made._replace(order=check_order(value))
            elif key == "once":
                made = made._replace(once=check_order(value))
            elif key == "wait" and value.isdecimal() and int(value) <= MOST_MENU_WAIT_MS:
                made = made._replace(wait_ms=int(value))
            else:
                raise UsageError(
                    f"--boot: {option!r} is no option; "
                    "there are: order=LETTERS, once=LETTERS, menu=on|off, strict=on|off, "
                    f"wait=MILLISECONDS up to {MOST_MENU_WAIT_MS}"
                )
        return made

    def first(self) -> BootOptions:
        """Those of the first start."""
        return self._replace(order=self.once or self.order)
