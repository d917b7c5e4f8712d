"""Binary statistics: the fd of KVM_GET_STATS_FD. Source: Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

from vmonty.base.closing import Closing
from vmonty.base.errors import VmontyError
from vmonty.kvm.uapi import flags
from vmonty.kvm.uapi.vm import kvm_stats_desc, kvm_stats_header

_UNITS = {
    flags.KVM_STATS_UNIT_NONE: "", flags.KVM_STATS_UNIT_BYTES: "bytes", flags.KVM_STATS_UNIT_SECONDS: "seconds",
    flags.KVM_STATS_UNIT_CYCLES: "cycles", flags.KVM_STATS_UNIT_BOOLEAN: "boolean",
}  # fmt: skip


class Descriptor(NamedTuple):
    """One statistic: *size* values of 64 bits at *offset*, in *unit* times base ** *exponent*."""

    name: str
    kind: int
    unit: str
    base: int
    exponent: int
    size: int
    offset: int
    bucket_size: int


class Stats(Closing):
    """The counters of a VM or vCPU. Descriptors are read once; ``read()`` takes a fresh snapshot."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        header = kvm_stats_header.from_buffer_copy(os.pread(fd, ctypes.sizeof(kvm_stats_header), 0))
        self.id = os.pread(fd, header.name_size, header.id_offset).split(b"\0")[0].decode()
        self._data_offset = header.data_offset
        step = ctypes.sizeof(kvm_stats_desc) + header.name_size
        table = os.pread(fd, step * header.num_desc, header.desc_offset)
        if len(table) != step * header.num_desc:
            raise VmontyError(f"KVM's statistics end early: {len(table)} bytes of descriptors")
        self.descriptors = [self._descriptor(table[at : at + step]) for at in range(0, len(table), step)]

    @staticmethod
    def _descriptor(raw: bytes) -> Descriptor:
        head = kvm_stats_desc.from_buffer_copy(raw)
        return Descriptor(
            name=raw[ctypes.sizeof(kvm_stats_desc) :].split(b"\0")[0].decode(),
            kind=head.flags & flags.KVM_STATS_TYPE_MASK,
            unit=_UNITS.get(head.flags & flags.KVM_STATS_UNIT_MASK, "?"),
            base=10 if head.flags & flags.KVM_STATS_BASE_MASK == flags.KVM_STATS_BASE_POW10 else 2,
            exponent=head.exponent,
            size=head.size,
            offset=head.offset,
            bucket_size=head.bucket_size,
        )

    def fileno(self) -> int:
        """The statistics fd."""
        return self._fd

    def read(self) -> dict[str, int | list[int]]:
        """Name → value now; a list where a statistic has several values (histograms)."""
        end = max((entry.offset + 8 * entry.size for entry in self.descriptors), default=0)
        data = os.pread(self._fd, end, self._data_offset)
        snapshot: dict[str, int | list[int]] = {}
        for entry in self.descriptors:
            values = list(struct.unpack_from(f"<{entry.size}Q", data, entry.offset))
            snapshot[entry.name] = values[0] if entry.size == 1 else values
        return snapshot

    def close(self) -> None:
        """Close the fd; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
