"""Opening an image: its format, its backing files, and how it is used."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from vmonty.base.errors import DiskImageError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.foreign import FOREIGN, open_foreign
from vmonty.vmm.block.probe import PROBED_BYTES, probe
from vmonty.vmm.block.qcow2 import create
from vmonty.vmm.block.qcow2.open import open_disk, read_header
from vmonty.vmm.block.raw import RawDevice
from vmonty.vmm.block.throttle import Limits, ThrottledDevice

FORMATS = ("auto", "raw", "qcow2", *FOREIGN.values())
NATIVE = ("raw", "qcow2")
MAX_CHAIN = 64


def open_image(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",  # noqa: A002  # the option's name in QEMU and on the command line
    read_only: bool = False,
    snapshot: bool = False,
    limits: Limits | None = None,
    repair: bool = True,
    probe_raw: bool = True,
) -> BlockDevice:
    """Open the disk image at *path*.

    *format* is raw, qcow2, the name of another that qemu-img reads, or auto, which looks at the contents; without
    *probe_raw* it takes nothing that can be written for raw. With *snapshot* all changes go to a temporary file
    that ends with the disk. *limits* slow it down. A qcow2 image that was not closed is repaired, unless *repair* is
    off or it is only read. Raises DiskImageError with one line for the user.
    """
    device = _open(Path(path), format, read_only or snapshot, (), repair, probe_raw)
    try:
        if snapshot and not read_only:
            device = _overlay(device)
    except BaseException:
        device.close()
        raise
    return ThrottledDevice(device, limits) if limits else device


def detect(file: HostFile, format: str) -> str:  # noqa: A002
    """The format of an open file: *format*, unless it is auto. Raises DiskImageError for one that is not supported."""
    if format not in FORMATS:
        raise DiskImageError(f"unknown disk format {format!r}; there are: {', '.join(FORMATS)}")
    if format in NATIVE:
        return format
    length = file.length()
    tail = file.read(length - PROBED_BYTES, PROBED_BYTES) if length >= PROBED_BYTES else b""
    found = probe(file.read(0, PROBED_BYTES), tail)
    if format != "auto" and FOREIGN.get(found) != format:
        raise DiskImageError(f"{file.name} is no {format} image: by its contents it is {found}")
    if found not in NATIVE and found not in FOREIGN:
        raise DiskImageError(
            f"{file.name} is a {found} image, which is not supported; convert it to qcow2 or raw with qemu-img,"
            " or give format=raw for a disk that only looks like one"
        )
    return found


def format_of(path: Path, format: str = "auto") -> str:  # noqa: A002
    """The format of the image at *path*: raw, qcow2, or a key of FOREIGN. Raises DiskImageError."""
    file = HostFile(path, writable=False)
    try:
        return detect(file, format)
    finally:
        file.close()


def _open(
    path: Path,
    format: str,  # noqa: A002
    read_only: bool,
    above: tuple[tuple[int, int], ...],
    repair: bool,
    probe_raw: bool = True,
) -> BlockDevice:
    if _identity(path) in above or len(above) >= MAX_CHAIN:
        raise DiskImageError(f"{path} is a backing file of itself, or the chain of them is longer than {MAX_CHAIN}")
    file = HostFile(path, writable=not read_only)
    try:
        found = detect(file, format)
        if found in FOREIGN:
            return _foreign(file, path, found, above)
        if found == "raw":
            if format == "auto" and not read_only and not probe_raw:
                raise DiskImageError(
                    f"{path} has no format that can be recognised: say format=raw if it is a raw disk. (A guest could "
                    "write the header of another format into a disk that is only taken for one.)"
                )
            return RawDevice(file, probed=format == "auto")
        header = read_header(file)
        backing: BlockDevice | None = None
        if header.backing_file is not None:
            backing = open_backing(path, header.backing_file, header.backing_format, above)
        try:
            return open_disk(file, header, backing, repair=repair)
        except BaseException:
            if backing is not None:
                backing.close()
            raise
    except BaseException:
        file.close()
        raise


def open_backing(
    image: Path, name: str, format: str | None, above: tuple[tuple[int, int], ...] = ()  # noqa: A002
) -> BlockDevice:  # fmt: skip
    """The backing file *name* of *image*, which need not be there yet, with those behind it; *above* lie over both.

    Raises DiskImageError, also when *image* is among them.
    """
    return _open(backing_path(image, name), backing_format(image, format), True, (*above, _identity(image)), True)


def _foreign(file: HostFile, path: Path, kind: str, above: tuple[tuple[int, int], ...]) -> BlockDevice:
    """A copy of the image in *file*, which is closed."""
    if above:
        raise DiskImageError(f"{path} is a {kind} image, which cannot be a backing file here: convert it to qcow2")
    if file.writable:
        raise DiskImageError(
            f"{path} is a {kind} image, which is only read: add ro, or snapshot to keep no changes, "
            "or make a qcow2 image of it with `vmonty disk convert`"
        )
    device = open_foreign(path, kind)
    file.close()
    return device


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return (-1, hash(path))  # opening it will say what is wrong
    return status.st_dev, status.st_ino


def backing_path(image: Path, name: str) -> Path:
    """Where the backing file *name* of *image* is. Raises DiskImageError for what is no file."""
    if name.startswith("file:"):
        name = name.removeprefix("file:")
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
        raise DiskImageError(f"{image} has the backing file {name!r}, and only files are supported")
    # Relative to where the image lies, not to a symbolic link to it.
    return Path(os.path.realpath(image)).parent / name


def backing_format(image: Path, name: str | None) -> str:
    """The format to open a backing file with, as its overlay says. Raises DiskImageError."""
    if name in (None, ""):
        return "auto"
    assert name is not None
    if name in ("file", "host_device"):
        return "raw"
    if name not in ("raw", "qcow2"):
        raise DiskImageError(f"{image} has a backing file of format {name!r}; raw and qcow2 are supported")
    return name


def _overlay(base: BlockDevice) -> BlockDevice:
    """A disk over *base* whose changes end with it."""
    with tempfile.TemporaryFile(prefix="vmonty-snapshot-") as temporary:
        fd = os.dup(temporary.fileno())
    file = HostFile(Path("the temporary snapshot"), writable=True, lock=False, fd=fd, durable=False)
    try:
        create.create(file, base.size)
        return open_disk(file, read_header(file), base)
    except BaseException:
        file.close()
        raise
