"""Physical processors as KVM_RUN sees them when it enters a guest again: taken and given back without the scheduler.

All of it with the GIL, which no method gives up: so each is one step for all threads.
"""

from __future__ import annotations

import cython


@cython.cclass
class Seats:
    """A pool of them."""


@cython.cclass
class Seat:
    """A processor of *pool*: whether a vCPU is at work there."""

    def __init__(self, pool: Seats) -> None:
        self.pool = pool
        self.online = True

    def claim(self) -> bool:
        """Take it for a vCPU, or for nobody; False when another is at work there."""
        if self.running:
            return False
        self.running = True
        return True
