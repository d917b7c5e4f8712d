"""MSRs of a vCPU that are only kept: what was written is read. Exits look them up without the GIL."""

from __future__ import annotations

import cython
from cython.cimports.libc.string import memset
from cython.cimports.vmonty.kvm.soft.kvm_host import MSR_SLOTS


def _first(index):
    """Where to begin to look: the upper ten bits of a product with 2 ** 32 divided by the golden ratio."""
    return (index * cython.cast(uint32_t, 0x9E3779B1)) >> 22


def stored_msr(slots, index):
    """Look an MSR up."""
    at: uint32_t = _first(index)
    while slots[at].used:
        if slots[at].index == index:
            return cython.address(slots[at])
        at = (at + 1) & (MSR_SLOTS - 1)
    return cython.NULL


@cython.cclass
class StoredMsrs:
    """A dictionary of MSRs, as far as they are used: index to value."""

    def __cinit__(self, values: dict):
        memset(cython.address(self.slots[0]), 0, cython.sizeof(self.slots))
        self._count = 0
        self.update(values)

    def __contains__(self, index: cython.uint) -> bool:
        return stored_msr(cython.address(self.slots[0]), index) != cython.NULL

    def __getitem__(self, index: cython.uint) -> int:
        slot = stored_msr(cython.address(self.slots[0]), index)
        if slot == cython.NULL:
            raise KeyError(index)
        return slot.value

    def __setitem__(self, index: cython.uint, value: cython.ulonglong) -> None:
        at: uint32_t = _first(index)
        while self.slots[at].used and self.slots[at].index != index:
            at = (at + 1) & (MSR_SLOTS - 1)
        if not self.slots[at].used:
            if self._count >= MSR_SLOTS // 2:
                raise MemoryError("too many MSRs")
            self._count += 1
        self.slots[at].index = index
        self.slots[at].value = value
        self.slots[at].used = 1

    def get(self, index: cython.uint, default: int = 0) -> int:
        """The value, or *default* when it is not there."""
        slot = stored_msr(cython.address(self.slots[0]), index)
        return default if slot == cython.NULL else slot.value

    def update(self, values: dict) -> None:
        """Set several."""
        for index, value in values.items():
            self[index] = value
