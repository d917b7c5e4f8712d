"""What a page walk and a segment register look like from Python."""

from __future__ import annotations

from dataclasses import dataclass

FAULTS = ("", "page fault", "EPT violation", "EPT misconfiguration", "nested page fault", "retry")

# Access bits, as in state.pxd.
ACCESS_READ, ACCESS_WRITE, ACCESS_EXEC, ACCESS_USER, ACCESS_IMPLICIT = 0, 1, 2, 4, 8


@dataclass(frozen=True)
class Walk:
    """The end of a walk: a page, or the fault (one of FAULTS) with what it reports.

    ``physical`` and ``host`` are addresses of the 4-KByte page (guest-physical, this process; host 0 is no memory);
    ``size`` is in bytes.
    ``error_code`` is of a page fault; ``qualification`` and ``fault_physical`` are of a fault in the second dimension.
    """

    fault: str
    physical: int = 0
    host: int = 0
    size: int = 0
    may_write: bool = False
    may_execute: bool = False
    is_global: bool = False
    user: bool = False
    error_code: int = 0
    qualification: int = 0
    fault_physical: int = 0


@dataclass(frozen=True)
class SegmentState:
    """A segment register: limit in bytes, access rights in VMX format (bit 16: unusable)."""

    selector: int
    base: int
    limit: int
    access_rights: int
