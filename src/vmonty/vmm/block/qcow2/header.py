"""qcow2's header: what it may say, and what is refused.

Source: docs/interop/qcow2.txt, "Header" and "Header extensions". The limits are QEMU's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from vmonty.base.errors import DiskImageError

Refuse = Callable[[str], DiskImageError]

MAGIC = b"QFI\xfb"
DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = 1, 2, 4, 8, 16
LAZY_REFCOUNTS = 1
ZLIB, ZSTD = 0, 1
BACKING_FORMAT, FEATURE_NAMES, LUKS = 0xE279_2ACA, 0x6803_F857, 0x0537_BE77

V2_LENGTH, V3_LENGTH = 72, 112
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_BACKING_NAME = 1023
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21

# Fields that belong together are neighbours, so that one write changes them.
SIZE_AND_L1 = struct.Struct(">QIIQ")  # at 24: size, crypt_method, l1_size, l1_table_offset
REFCOUNT_TABLE = struct.Struct(">QI")  # at 48: offset, clusters
SNAPSHOTS = struct.Struct(">IQ")  # at 60: number, offset
SIZE_AT, REFCOUNT_TABLE_AT, SNAPSHOTS_AT, FEATURES_AT = 24, 48, 60, 72

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_FEATURES = {EXTERNAL_DATA: "an external data file", EXTENDED_L2: "extended L2 entries (subclusters)"}


@dataclass
class Header:
    """The header's fields by the specification's names; offsets and sizes in bytes."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: int = ZLIB
    backing_file: str | None = None
    backing_format: str | None = None

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Clusters that one L2 table maps."""
        return 1 << (self.cluster_bits - 3)

    def l1_needed(self, size: int) -> int:
        """Entries of an L1 table for a disk of *size* bytes."""
        return -(-size // (self.cluster_size * self.l2_entries))

    def pack(self) -> bytes:
        """The header's cluster, with its extensions and the backing file's name."""
        length = V3_LENGTH if self.version >= 3 else V2_LENGTH
        extensions = b""
        if self.backing_format:
            name = self.backing_format.encode()
            extensions += struct.pack(">II", BACKING_FORMAT, len(name)) + name + bytes(-len(name) % 8)
        if self.version >= 3:
            extensions += _feature_names()
        extensions += bytes(8)
        backing = (self.backing_file or "").encode(errors="surrogateescape")
        at = length + len(extensions)
        head = _V2.pack(
            MAGIC, self.version, at if backing else 0, len(backing), self.cluster_bits, self.size, 0, self.l1_size,
            self.l1_table_offset, self.refcount_table_offset, self.refcount_table_clusters,
            self.nb_snapshots, self.snapshots_offset,
        )  # fmt: skip
        if self.version >= 3:
            head += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, V3_LENGTH)
            head += bytes([self.compression_type]) + bytes(7)
        whole = head + extensions + backing
        if len(whole) > self.cluster_size:
            raise DiskImageError(f"the backing file's name does not fit into a cluster of {self.cluster_size} bytes")
        return whole


def _feature_names() -> bytes:
    names = [(0, 0, "dirty bit"), (0, 1, "corrupt bit"), (0, 3, "compression type"), (1, 0, "lazy refcounts")]
    data = b"".join(bytes([kind, bit]) + name.encode().ljust(46, b"\0") for kind, bit, name in names)
    return struct.pack(">II", FEATURE_NAMES, len(data)) + data


def parse(data: bytes, file_length: int, name: str) -> Header:
    """Read the header from the file's first cluster, or as many bytes as it has.

    Raises DiskImageError for all that this program could not keep intact.
    """

    def refuse(reason: str) -> DiskImageError:
        return DiskImageError(f"the qcow2 image {name} {reason}")

    if len(data) < V2_LENGTH or data[:4] != MAGIC:
        raise DiskImageError(f"{name} is no qcow2 image (it has another signature)")
    fields = _V2.unpack_from(data)
    _, version, backing_at, backing_size, cluster_bits, size, crypt, l1_size, l1_at, table_at, table_clusters = fields[
        :11
    ]
    header = Header(version, cluster_bits, size, l1_size, l1_at, table_at, table_clusters, *fields[11:])
    length = V2_LENGTH
    if version not in (2, 3):
        raise refuse(f"has version {version}; versions 2 and 3 are known")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise refuse(f"says clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are allowed")
    if version == 3:
        if len(data) < 104:
            raise refuse("is truncated in its header")
        header.incompatible, header.compatible, header.autoclear, header.refcount_order, length = _V3.unpack_from(
            data, 72
        )
        if length < 104 or length % 8 or length > header.cluster_size:
            raise refuse(f"says a header of {length} bytes")
        if length > 104:
            header.compression_type = data[104] if len(data) > 104 else 0
        _check_features(header, refuse)
    if crypt:
        raise refuse("is encrypted, which is not supported; convert it with qemu-img first")
    if header.refcount_order > 6:
        raise refuse(f"says refcounts of 2^{header.refcount_order} bits; 64 is the most")
    if size > 1 << 62:
        raise refuse(f"says a disk of {size} bytes")
    _check_tables(header, file_length, refuse)
    if backing_at:
        if not 1 <= backing_size <= MAX_BACKING_NAME or backing_at + backing_size > min(header.cluster_size, len(data)):
            raise refuse("names its backing file outside of its header")
        header.backing_file = data[backing_at : backing_at + backing_size].decode(errors="surrogateescape")
        if "\0" in header.backing_file:
            raise refuse("has a backing file name with a zero byte")
    _read_extensions(header, data[: backing_at or header.cluster_size], length, refuse)
    return header


def _check_features(header: Header, refuse: Refuse) -> None:
    for bit, what in _FEATURES.items():
        if header.incompatible & bit:
            raise refuse(f"uses {what}, which is not supported; convert it with qemu-img first")
    unknown = header.incompatible & ~(DIRTY | CORRUPT | COMPRESSION_TYPE)
    if unknown:
        raise refuse(f"uses features that are not known here (incompatible bits {unknown:#x})")
    if header.compression_type not in (ZLIB, ZSTD):
        raise refuse(f"has compression type {header.compression_type}; zlib and zstd are known")
    if (header.compression_type != ZLIB) != bool(header.incompatible & COMPRESSION_TYPE):
        raise refuse("contradicts itself about its compression type")


def _check_tables(header: Header, file_length: int, refuse: Refuse) -> None:
    cluster = header.cluster_size
    end = -(-file_length // cluster) * cluster

    def inside(what: str, offset: int, length: int) -> None:
        # The header's own cluster holds no table.
        if length and (offset % cluster or offset < cluster or offset + length > end):
            raise refuse(f"is damaged or truncated: its {what} of {length} bytes at {offset:#x} cannot be")

    if header.l1_size * 8 > MAX_L1_BYTES:
        raise refuse(f"says an L1 table of {header.l1_size} entries; {MAX_L1_BYTES // 8} is the most")
    if header.l1_size < header.l1_needed(header.size):
        raise refuse(f"has an L1 table of {header.l1_size} entries, too small for its size of {header.size} bytes")
    if header.refcount_table_clusters * cluster > MAX_REFCOUNT_TABLE_BYTES or not header.refcount_table_clusters:
        raise refuse(f"says a refcount table of {header.refcount_table_clusters} clusters")
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise refuse(f"says {header.nb_snapshots} snapshots; {MAX_SNAPSHOTS} is the most")
    inside("L1 table", header.l1_table_offset, header.l1_size * 8)
    inside("refcount table", header.refcount_table_offset, header.refcount_table_clusters * cluster)
    inside("snapshot table", header.snapshots_offset, header.nb_snapshots * 40)


def _read_extensions(header: Header, data: bytes, at: int, refuse: Refuse) -> None:
    while at + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, at)
        if kind == 0:
            return
        at += 8
        if length > len(data) - at:
            raise refuse("has a header extension that is longer than the header")
        if kind == BACKING_FORMAT:
            header.backing_format = data[at : at + length].decode(errors="replace")
        elif kind == LUKS:
            raise refuse("is encrypted, which is not supported; convert it with qemu-img first")
        at += -(-length // 8) * 8
