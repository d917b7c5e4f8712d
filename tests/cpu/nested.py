"""A bare processor whose code is a hypervisor itself: assembly in, registers out."""

from __future__ import annotations

from vmonty.testing.nasm import assemble

from .machine import CODE, Machine

# Where the hypervisors of the tests keep things; memory is identity-mapped.
REGION, GUEST_CODE, HOST_SAVE, MAPS, GUEST_STACK = 0x20000, 0x30000, 0x31000, 0x32000, 0x3F000


def boot(source: str, guest: str) -> Machine:
    """64-bit mode at CPL 0 with *source* at CODE and *guest* at GUEST_CODE."""
    machine = Machine().long_mode()
    machine.ram.write(GUEST_CODE, assemble(guest, 64, GUEST_CODE))
    machine.ram.write(CODE, assemble(source, 64, CODE))
    machine["rip"] = CODE
    return machine
