"""Opening an image: its format, its backing files, and how it is used."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from vmonty.base.errors import DiskImageError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.probe import PROBED_BYTES, probe
from vmonty.vmm.block.qcow2 import create
from vmonty.vmm.block.qcow2.open import open_disk, read_header
from vmonty.vmm.block.raw import RawDevice
from vmonty.vmm.block.throttle import Limits, ThrottledDevice

FORMATS = ("auto", "raw", "qcow2")
MAX_CHAIN = 64


def open_image(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",  # noqa: A002  # the option's name in QEMU and on the command line
    read_only: bool = False,
    snapshot: bool = False,
    limits: Limits | None = None,
    repair: bool = True,
) -> BlockDevice:
    """Open the disk image at *path*.

    *format* is raw, qcow2, or auto, which looks at the contents. With *snapshot* all changes go to a temporary file
    that ends with the disk. *limits* slow it down. A qcow2 image that was not closed is repaired, unless *repair* is
    off or it is only read. Raises DiskImageError with one line for the user.
    """
    device = _open(Path(path), format, read_only or snapshot, (), repair)
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
    if format != "auto":
        return format
    found = probe(file.read(0, PROBED_BYTES))
    if found not in FORMATS:
        raise DiskImageError(
            f"{file.name} is a {found} image, which is not supported; convert it to qcow2 or raw with qemu-img,"
            " or give format=raw for a disk that only looks like one"
        )
    return found


def _open(
    path: Path,
    format: str,  # noqa: A002
    read_only: bool,
    above: tuple[tuple[int, int], ...],
    repair: bool,
) -> BlockDevice:
    if _identity(path) in above or len(above) >= MAX_CHAIN:
        raise DiskImageError(f"{path} is a backing file of itself, or the chain of them is longer than {MAX_CHAIN}")
    file = HostFile(path, writable=not read_only)
    try:
        if detect(file, format) == "raw":
            return RawDevice(file, probed=format == "auto")
        header = read_header(file)
        backing: BlockDevice | None = None
        if header.backing_file is not None:
            place = backing_path(path, header.backing_file)
            backing = _open(place, backing_format(path, header.backing_format), True, (*above, _identity(path)), True)
        try:
            return open_disk(file, header, backing, repair=repair)
        except BaseException:
            if backing is not None:
                backing.close()
            raise
    except BaseException:
        file.close()
        raise


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
