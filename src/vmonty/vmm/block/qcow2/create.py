"""Making qcow2 images."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.qcow2 import header as layout
from vmonty.vmm.block.qcow2.header import COMPRESSION_TYPE, LAZY_REFCOUNTS, ZSTD, Header
from vmonty.vmm.block.qcow2.refcounts import word_bytes


def create(file: HostFile, size: int, **options: Any) -> None:
    """Make an empty image of *size* bytes in *file*, which loses what it held; *options* are those of describe().

    Raises DiskImageError.
    """
    lay_out(file, describe(size, **options))


def describe(
    size: int,
    *,
    version: int = 3,
    cluster_size: int = 65536,
    refcount_bits: int = 16,
    lazy_refcounts: bool = False,
    compression: str = "zlib",
    backing_file: str | None = None,
    backing_format: str | None = None,
) -> Header:
    """The header of an empty image of *size* bytes, but for where its tables are.

    Raises DiskImageError for a choice that the format does not have.
    """
    bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << bits or not layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS:
        raise DiskImageError(f"clusters of {cluster_size} bytes: 512 to 2M are possible, powers of two")
    order = refcount_bits.bit_length() - 1
    if refcount_bits != 1 << order or not 0 <= order <= 6:
        raise DiskImageError(f"refcounts of {refcount_bits} bits: 1, 2, 4, 8, 16, 32 and 64 are possible")
    if version not in (2, 3) or compression not in ("zlib", "zstd"):
        raise DiskImageError("qcow2 has versions 2 and 3, and compression by zlib or zstd")
    if version == 2 and (refcount_bits != 16 or lazy_refcounts or compression != "zlib"):
        raise DiskImageError("version 2 has refcounts of 16 bits, none of them lazy, and compresses by zlib")
    if size < 0 or size % 512:
        raise DiskImageError(f"a disk of {size} bytes: it must be a multiple of 512")
    header = Header(version, bits, size, 0, 0, 0, 0, refcount_order=order)
    header.backing_file, header.backing_format = backing_file, backing_format
    header.compatible = LAZY_REFCOUNTS if lazy_refcounts else 0
    if compression == "zstd":
        header.compression_type, header.incompatible = ZSTD, COMPRESSION_TYPE
    header.l1_size = max(1, header.l1_needed(size))
    if header.l1_size * 8 > layout.MAX_L1_BYTES:
        raise DiskImageError(f"a disk of {size} bytes needs larger clusters than {cluster_size} bytes")
    header.pack()  # says whether all of it fits
    return header


def lay_out(file: HostFile, header: Header) -> None:
    """Write into *file*, which loses what it held: header, refcount table, refcount blocks, L1 table; each counted.

    Raises DiskImageError.
    """
    cluster = header.cluster_size
    per_block = cluster * 8 >> header.refcount_order
    l1_clusters = -(-header.l1_size * 8 // cluster)
    blocks = table_clusters = 1
    while True:
        used = 1 + table_clusters + blocks + l1_clusters
        needed = -(-used // per_block), -(-blocks * 8 // cluster)
        if needed <= (blocks, table_clusters) and needed[1] <= table_clusters:
            break
        blocks, table_clusters = max(blocks, needed[0]), max(table_clusters, needed[1])
    header.refcount_table_offset, header.refcount_table_clusters = cluster, table_clusters
    first_block = 1 + table_clusters
    header.l1_table_offset = (first_block + blocks) * cluster
    counts = _ones(used, 1 << header.refcount_order).ljust(blocks * cluster, b"\0")
    places = array("Q", [(first_block + index) * cluster for index in range(blocks)])
    try:
        file.truncate(0)
        file.truncate(used * cluster)
        if file.is_device:
            file.zero(0, used * cluster)
        file.write(cluster, word_bytes(places))
        file.write(first_block * cluster, counts)
        file.sync()
        file.write(0, header.pack())
        file.sync()
    except BlockError as error:
        raise DiskImageError(str(error)) from error


def _ones(number: int, bits: int) -> bytes:
    """*number* counts of 1."""
    if bits >= 8:
        return (1).to_bytes(bits // 8, "big") * number
    per_byte = 8 // bits
    whole = sum(1 << part * bits for part in range(per_byte))
    rest = sum(1 << part * bits for part in range(number % per_byte))
    return struct.pack("B", whole) * (number // per_byte) + (struct.pack("B", rest) if number % per_byte else b"")


@contextmanager
def making(path: str | os.PathLike[str]) -> Iterator[HostFile]:
    """*path* open for a new image: a file that may exist, or a block device. Raises DiskImageError.

    It is closed at the end. A file that was not there before goes again when its making fails.
    """
    file, made = _new_file(path)
    try:
        with closing(file):
            yield file
    except BaseException:
        if made:
            with suppress(OSError):
                os.unlink(path)
        raise


def _new_file(path: str | os.PathLike[str]) -> tuple[HostFile, bool]:
    """The file, and whether it was not there before."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        try:
            fd, made = os.open(path, flags | os.O_EXCL, 0o644), True
        except FileExistsError:
            fd, made = os.open(path, flags, 0o644), False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DiskImageError(f"the disk image {os.fspath(path)} cannot be made: {reason}") from error
    return HostFile(Path(path), writable=True, fd=fd), made
