"""The two formats of table entries that the processor's walkers read: EPT's, and the ordinary one, which NPT uses.

    EPT        51..12 address | 7 large | 5..3 memory type | 2 X | 1 W | 0 R
    ordinary   63 NX | 51..12 address | 7 large | 6 D | 5 A | 2 U/S | 1 R/W | 0 P

    MMIO       62..52 generation | 51 reserved | 50..12 gfn | 11..3 generation | 2 U/S | 1 R/W | 0 P

An entry of the third kind says in a shadow table that there is no memory, as of a generation of the slots. Its #PF has
RSVD in the error code, by which it is known without a walk of the guest's tables.

Source: SDM, "EPT Translation Mechanism"; APM, "Nested Paging"; in the kernel arch/x86/kvm/mmu/spte.h.
"""

from __future__ import annotations

from typing import NamedTuple

ADDRESS = 0x000F_FFFF_FFFF_F000
WRITE = 2  # in both formats
LARGE = 1 << 7  # in both: a page of 2 MiB at level 2, of 1 GiB at level 3


class Format(NamedTuple):
    """What an entry has beside its address. Accessed and dirty flags are set from the start: nobody asks for them."""

    table: int
    leaf: int

    def spte(self, hva: int, write: bool) -> int:
        """The entry for a page at *hva*."""
        return hva | self.leaf | (WRITE if write else 0)


EPT = Format(table=0x7, leaf=0x5 | 6 << 3)  # read and execute, write-back
NPT = Format(table=0x27, leaf=0x65)


MMIO = 1 << 51 | 1
GENERATION_BITS = 20
_GFN = (1 << 51) - (1 << 12)
_LOW_BITS, _LOW_SHIFT, _HIGH_SHIFT = 9, 3, 52


def make_mmio_spte(gfn: int, access: int, generation: int) -> int:
    """What there is of *generation*, which wraps around, in 20 bits; *access*: 2 to write, 4 for users."""
    low, high = generation & (1 << _LOW_BITS) - 1, generation >> _LOW_BITS & (1 << GENERATION_BITS - _LOW_BITS) - 1
    return MMIO | gfn << 12 | access & 6 | low << _LOW_SHIFT | high << _HIGH_SHIFT


def is_mmio_spte(spte: int) -> bool:
    """Whether it is such an entry, in the ordinary format."""
    return spte & MMIO == MMIO


def check_mmio_spte(spte: int, generation: int) -> bool:
    """Whether it is, and of *generation*: none of the slots has changed since."""
    return spte & ~(_GFN | 6) == make_mmio_spte(0, 0, generation)
