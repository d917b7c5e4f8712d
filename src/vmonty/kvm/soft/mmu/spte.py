"""The two formats of table entries that the processor's walkers read: EPT's, and the ordinary one, which NPT uses.

    EPT        51..12 address | 7 large | 5..3 memory type | 2 X | 1 W | 0 R
    ordinary   63 NX | 51..12 address | 7 large | 6 D | 5 A | 2 U/S | 1 R/W | 0 P

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
