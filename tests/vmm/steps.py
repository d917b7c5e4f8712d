"""What a guest that is written in Python does: the steps of a generator, which a fake KVM plays.

    def guest(cpu: int) -> Guest:
        yield Out(0x3F8, ord("x"))
        status = yield In(0x3FD)
        yield Wait()                        # halted until an interrupt line rises
        yield Leave(Exit.SHUTDOWN)

After its last step a vCPU is halted for good.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any


@dataclass
class Out:
    """The guest writes to a port."""

    port: int
    value: int
    size: int = 1


@dataclass
class In:
    """The guest reads a port; the generator gets the value."""

    port: int
    size: int = 1


@dataclass
class Store:
    """The guest writes to memory where there is no RAM."""

    address: int
    value: int
    size: int = 4


@dataclass
class Load:
    """The guest reads memory where there is no RAM; the generator gets the value."""

    address: int
    size: int = 4


@dataclass
class Wait:
    """The guest is halted until an interrupt line rises; the generator gets the line."""


@dataclass
class Spin:
    """The guest counts in rcx, *mips* million instructions a second, two for each count, until it is kicked."""

    mips: float


@dataclass
class Leave:
    """KVM_RUN returns with *reason*; *fill* may set the rest of kvm_run."""

    reason: int
    fill: Callable[[Any], None] = lambda run: None


@dataclass
class Refuse:
    """KVM_RUN fails."""

    errno: int


Step = Out | In | Store | Load | Wait | Spin | Leave | Refuse
Guest = Generator[Step, Any, None]


def idle(cpu: int) -> Guest:
    """A guest that is halted from the start."""
    yield Wait()
