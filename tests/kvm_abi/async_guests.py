"""Guests that do something else while a page is away: asynchronous page faults as a guest sees them.

Source: Documentation/virt/kvm/x86/msr.rst, MSR_KVM_ASYNC_PF_EN, _INT, _ACK.
"""

from __future__ import annotations

from vmonty.kvm.uapi import flags
from vmonty.testing.guests import CODE, DATA, STACK, Mode, TinyGuest

from .irq_guests import APIC_ON, EOI, IPI_VECTOR, handler

EN, INT, ACK = flags.MSR_KVM_ASYNC_PF_EN, flags.MSR_KVM_ASYNC_PF_INT, flags.MSR_KVM_ASYNC_PF_ACK
ENABLED, SEND_ALWAYS, AS_INT = (
    flags.KVM_ASYNC_PF_ENABLED,
    flags.KVM_ASYNC_PF_SEND_ALWAYS,
    flags.KVM_ASYNC_PF_DELIVERY_AS_INT,
)
ON = DATA | ENABLED | AS_INT
READY_VECTOR, BROADCAST = 0x70, 0xFFFF_FFFF
# Where the missing memory is; the stacks of the guest that had to wait, and what it does meanwhile.
AWAY, PAGES, SAVED, OTHER_STACK = 0x40_0000, 4, DATA + 0x100, STACK - 0x400
# How many tokens came.
TIMES = DATA + 0x110
# struct kvm_vcpu_pv_apf_data
REASON, TOKEN = DATA, DATA + 4
# What the guest tells on ports: the page's contents, that it does something else, tokens as they come.
VALUE, MEANWHILE, TOLD_READY, TOLD_ABSENT = 0x11, 0x12, 0x13, 0x14


def wrmsr(index: int, value: int) -> str:
    return f"mov ecx, {index:#x}\n mov eax, {value:#x}\n xor edx, edx\n wrmsr\n"


def enable(value: int) -> str:
    return f"{APIC_ON} {wrmsr(INT, READY_VECTOR)} {wrmsr(EN, value)}"


def told(times: int) -> str:
    """Code that waits until as many tokens have come. (A KVM that emulates it looks for interrupts at exits only.)"""
    return f"told{times}: out {MEANWHILE:#x}, al\n cmp dword [abs {TIMES}], {times}\n jb told{times}\n"


# At CODE + 16: the page is not there. Tell the token, and do something else until its page is.
ABSENT = CODE + 16
NOT_PRESENT = f"""
    add rsp, 8
    push rax
    mov eax, [abs {REASON}]
    cmp eax, 1
    jne $
    mov dword [abs {REASON}], 0
    mov [abs {SAVED}], rsp
    mov rax, cr2
    mov rsp, {OTHER_STACK}
    out {TOLD_ABSENT:#x}, eax
    sti
"""
ELSEWHERE = f"elsewhere: out {MEANWHILE:#x}, al\n jmp elsewhere\n"
# The page is there: tell the token, and go on where it was missed; but nobody waited for a broadcast.
READY_HANDLER = f"""
present:
    push rax
    push rbx
    push rcx
    push rdx
    mov eax, [abs {TOKEN}]
    out {TOLD_READY:#x}, eax
    mov dword [abs {TOKEN}], 0
    inc dword [abs {TIMES}]
    mov esi, eax
    {EOI}
    {wrmsr(ACK, 1)}
    pop rdx
    pop rcx
    pop rbx
    pop rax
    cmp esi, -1
    je back
    cmp qword [abs {SAVED}], 0
    je back
    mov rsp, [abs {SAVED}]
    mov qword [abs {SAVED}], 0
    pop rax
back:
    iretq
"""
HANDLERS = {14: f"jmp {ABSENT:#x}", READY_VECTOR: f"jmp {CODE + 0x100:#x}", IPI_VECTOR: handler(IPI_VECTOR)}


def program(main: str, meanwhile: str = ELSEWHERE) -> str:
    """*main*, and *meanwhile*, which the guest does while its page is away."""
    return (
        f"jmp start\n times {ABSENT - CODE}-($-$$) nop\n {NOT_PRESENT} {meanwhile}\n"
        f"times 0x100-($-$$) nop\n {READY_HANDLER}\n start:\n {main}"
    )


TOUCH = f"mov eax, [abs {AWAY}]\n out {VALUE:#x}, eax\n"
DONE = "done: out 0x10, al\n jmp done"


def until(guest: TinyGuest, port: int) -> int:
    """The value of the next OUT to *port*; what the guest does meanwhile is passed over."""
    for _ in range(1_000_000):
        found, value = guest.out()
        if found == port:
            return value
        assert found == MEANWHILE
    raise AssertionError(f"no OUT to {port:#x} came")


def begin(guest: TinyGuest, main: str, value: int = ON, meanwhile: str = ELSEWHERE) -> None:
    guest.load(Mode.LONG, program(f"{enable(value)} sti\n {told(1)} {main}", meanwhile), HANDLERS)
    assert until(guest, TOLD_READY) == BROADCAST
