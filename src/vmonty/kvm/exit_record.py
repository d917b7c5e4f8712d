"""What a tracer is told of each exit, by a KVM in this process and over a control socket alike."""

from __future__ import annotations

from typing import NamedTuple


class ExitRecord(NamedTuple):
    """One exit: the vCPU, when its guest was entered and left (host's monotonic nanoseconds), why, and where."""

    vcpu: int
    entered_ns: int
    left_ns: int
    reason: int
    name: str
    qualification: int
    rip: int
