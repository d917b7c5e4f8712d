"""Coalesced MMIO and PIO: guest writes to registered zones are collected in a ring instead of causing exits.

The ring (kvm_coalesced_mmio_ring) fills the page at KVM_COALESCED_MMIO_PAGE_OFFSET of a vCPU's mapping; all vCPUs of
a VM share it. We write at ``last``, user space reads at ``first``. When it is full, or user space has put nonsense
into it, a write goes to user space as an ordinary exit, which empties the ring first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading

from vmonty.base.layout import flexible
from vmonty.kvm.soft.iodev import KvmIoBuses
from vmonty.kvm.uapi.run import kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_coalesced_mmio_zone

__all__ = ["COALESCED_MMIO_MAX", "CoalescedMmio"]

_PAGE_SIZE = 4096
# How many entries fit into the page; one always stays free.
COALESCED_MMIO_MAX = (_PAGE_SIZE - ctypes.sizeof(kvm_coalesced_mmio_ring)) // ctypes.sizeof(kvm_coalesced_mmio)
_M64 = (1 << 64) - 1


class _Zone:
    """A registered zone. An IoDevice."""

    def __init__(self, ring: CoalescedMmio, zone: kvm_coalesced_mmio_zone) -> None:
        self._ring = ring
        self.start: int = zone.addr
        self.size: int = zone.size
        self.pio: int = zone.u.pio

    def contains(self, address: int, size: int) -> bool:
        end = address + size
        return end <= _M64 and self.start <= address and end <= self.start + self.size

    def read(self, address: int, size: int) -> int | None:
        """Reads are never coalesced."""
        return None

    def write(self, address: int, size: int, value: int) -> bool:
        """Put the write into the ring; False when it is full."""
        return self.contains(address, size) and self._ring.append(address, size, value, self.pio)


class CoalescedMmio:
    """The zones of a VM, and its ring in *page*: 4096 writable bytes that user space has mapped as well."""

    def __init__(self, page: memoryview | bytearray, buses: KvmIoBuses) -> None:
        ring: type[kvm_coalesced_mmio_ring] = flexible(kvm_coalesced_mmio_ring, COALESCED_MMIO_MAX)
        self._ring = ring.from_buffer(page)
        self._buses = buses
        self._zones: list[_Zone] = []
        self._zones_lock = threading.Lock()
        self._ring_lock = threading.Lock()

    def register(self, zone: kvm_coalesced_mmio_zone) -> None:
        """KVM_REGISTER_COALESCED_MMIO. Raises OSError: EINVAL when pio is neither 0 nor 1, ENOSPC for a full bus."""
        self._check(zone)
        device = _Zone(self, zone)
        with self._zones_lock:
            (self._buses.pio if device.pio else self._buses.mmio).register(device.start, device.size, device)
            self._zones.append(device)

    def unregister(self, zone: kvm_coalesced_mmio_zone) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: every zone that contains this one; there need not be any."""
        self._check(zone)
        with self._zones_lock:
            for device in tuple(self._zones):
                if device.pio == zone.u.pio and device.contains(zone.addr, zone.size):
                    (self._buses.pio if device.pio else self._buses.mmio).unregister(device)
                    self._zones.remove(device)

    @staticmethod
    def _check(zone: kvm_coalesced_mmio_zone) -> None:
        if zone.u.pio not in (0, 1):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def append(self, address: int, size: int, value: int, pio: int) -> bool:
        """Write one entry; False when there is no room."""
        with self._ring_lock:
            ring = self._ring
            last = ring.last
            if size > 8 or last >= COALESCED_MMIO_MAX or (last + 1) % COALESCED_MMIO_MAX == ring.first:
                return False
            entry = ring.coalesced_mmio[last]
            entry.phys_addr, entry.len = address, size
            entry.u.pio = pio
            data = (value & ((1 << 8 * size) - 1)).to_bytes(8, "little")
            ctypes.memmove(entry.data, data, size)
            # The entry is complete before user space can see it: x86 keeps stores in order.
            ring.last = (last + 1) % COALESCED_MMIO_MAX
            return True
