"""Opening a qcow2 image whose file is open."""

from __future__ import annotations

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.qcow2.check import check
from vmonty.vmm.block.qcow2.disk import Qcow2Disk
from vmonty.vmm.block.qcow2.header import CORRUPT, DIRTY, MAX_CLUSTER_BITS, Header, parse


def read_header(file: HostFile) -> Header:
    """The header of the image in *file*. Raises DiskImageError."""
    try:
        length = file.length()
        return parse(file.read(0, min(length, 1 << MAX_CLUSTER_BITS)), length, file.name)
    except BlockError as error:
        raise DiskImageError(str(error)) from error


def open_disk(file: HostFile, header: Header, backing: BlockDevice | None, *, repair: bool = True) -> Qcow2Disk:
    """The disk in *file*, which it owns from now on, as *backing*. Raises DiskImageError.

    An image that was not closed (dirty) is repaired, unless it is only read, or *repair* is off.
    """
    if file.writable and repair and header.incompatible & CORRUPT:
        raise DiskImageError(
            f"the qcow2 image {file.name} is marked as corrupt; try vmonty disk check --repair, or open it read-only"
        )
    try:
        disk = Qcow2Disk(file, header, backing)
        if file.writable:
            if repair and disk.refcounts.doubled:
                raise DiskImageError(
                    f"the qcow2 image {file.name} is damaged: two entries of its refcount table name one block; "
                    "open it read-only, or make a new image of it with `vmonty disk convert`"
                )
            if header.autoclear:
                # We keep none of what these bits stand for up to date, so they go.
                header.autoclear = 0
                disk.writeback.write_features()
            if repair and header.incompatible & DIRTY:
                report = check(disk, repair=True)
                if report.damage_count > report.damages_fixed:
                    raise DiskImageError(f"the qcow2 image {file.name} is damaged: {report.damages[0]}")
    except BlockError as error:
        raise DiskImageError(str(error)) from error
    return disk
