"""Guests for the interrupt chips: they set up what they use themselves, by the chips' own registers.

The vCPU is in 64-bit mode with its local APIC on. ``ready`` loops on port 0x10; a handler reports its
vector on port 0x30 and ends with an EOI. (Ports 0x20 and 0x21 are the PIC's.)
"""

from __future__ import annotations

import time

from vmonty.testing.guests import Mode, TinyGuest

APIC, IOAPIC = 0xFEE00000, 0xFEC00000
# Local APIC registers (SDM, "Local APIC Register Address Map").
APIC_ID, APIC_EOI, APIC_SVR, APIC_ICR, APIC_ICR2 = 0x20, 0xB0, 0xF0, 0x300, 0x310
APIC_LVTT, APIC_LVT0, APIC_TMICT, APIC_TMCCT, APIC_TDCR = 0x320, 0x350, 0x380, 0x390, 0x3E0

# A pin that the I/O APIC has and the PIC has not.
GSI = 20
LINE_VECTOR, TIMER_VECTOR, IPI_VECTOR = 0x60, 0x61, 0x62
# The port of the handlers, and that on which one of a level-triggered interrupt tells that it has sent its EOI.
REPORT, EOI_LEVEL = 0x30, 0x31
SPURIOUS = 0x1FF

READY = "ready: out 0x10, al\n jmp ready"


def store(address: int, value: int) -> str:
    """Write 32 bits to *address*, which needs a register above 2 GiB; it spoils EBX."""
    return f"mov ebx, {address:#x}\n mov dword [rbx], {value:#x}\n"


def apic_write(register: int, value: int) -> str:
    """Write a register of the local APIC."""
    return store(APIC + register, value)


APIC_ON = apic_write(APIC_SVR, SPURIOUS)
EOI = apic_write(APIC_EOI, 0)


def handler(vector: int, after: str = "") -> str:
    """Report *vector*, end the interrupt, do *after*, return."""
    return f"push rax\n push rbx\n mov al, {vector}\n out {REPORT:#x}, al\n {EOI} {after}\n pop rbx\n pop rax\n iretq"


def redirect(pin: int, low: int, high: int = 0) -> str:
    """Write the redirection entry of I/O APIC *pin* (82093AA, "IOREDTBL")."""
    return "".join(
        store(IOAPIC, 0x10 + 2 * pin + index) + store(IOAPIC + 0x10, value) for index, value in ((1, high), (0, low))
    )


def ioapic_guest(guest: TinyGuest, level: bool = False, masked: bool = False) -> TinyGuest:
    """GSI arrives as LINE_VECTOR through the I/O APIC."""
    entry = LINE_VECTOR | (1 << 15 if level else 0) | (1 << 16 if masked else 0)
    after = f"out {EOI_LEVEL:#x}, al" if level else ""
    return guest.load(
        Mode.LONG,
        f"{APIC_ON} {redirect(GSI, entry)} sti\n {READY}",
        handlers={LINE_VECTOR: handler(LINE_VECTOR, after)},
    )


def apic_guest(guest: TinyGuest, setup: str, *vectors: int) -> TinyGuest:
    """The local APIC is on; *setup* is done before interrupts are enabled."""
    return guest.load(
        Mode.LONG, f"{APIC_ON} {setup}\n sti\n {READY}", handlers={vector: handler(vector) for vector in vectors}
    )


def pic_guest(guest: TinyGuest, mask: int = 0) -> TinyGuest:
    """A PC of old: real mode, the PIC pair at vectors 0x20 and 0x28, handlers for IRQ 0, 1 and 10."""
    program = "".join(
        f"mov al, {value:#x}\n out {port:#x}, al\n"
        for port, value in (
            (0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1),
            (0xA0, 0x11), (0xA1, 0x28), (0xA1, 2), (0xA1, 1),
            (0x21, mask & 0xFF), (0xA1, mask >> 8),
        )
    )  # fmt: skip
    master = "push ax\n mov al, {}\n out 0x90, al\n mov al, 0x20\n out 0x20, al\n pop ax\n iret"
    slave = "push ax\n mov al, {}\n out 0x90, al\n mov al, 0x20\n out 0xa0, al\n out 0x20, al\n pop ax\n iret"
    return guest.load(
        Mode.REAL,
        f"cli\n {program} sti\n ready: out 0x80, al\n jmp ready",
        handlers={0x20: master.format(0x20), 0x21: master.format(0x21), 0x2A: slave.format(0x2A)},
    )


PIC_READY, PIC_REPORT = 0x80, 0x90


def interrupted(guest: TinyGuest) -> int:
    """The vector that the next handler reports.

    That may take some turns of the ready loop: an irqfd's work is done on another thread of the kernel, and a KVM
    that emulates code looks for interrupts only now and then.
    """
    return out_of(guest, REPORT)


def out_of(guest: TinyGuest, port: int, limit_s: float = 20.0) -> int:
    """The value of the next OUT to *port*; the guest's turns of its ready loop are passed over."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found, value = guest.out()
        if found == port:
            return value
    raise AssertionError(f"no OUT to {port:#x} came within {limit_s:g} s")
