"""Exits that compiled code handles: nobody who watches misses them, and state goes in and out as before."""

from __future__ import annotations

import os
import re
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.base import hostcall
from vmonty.base.ram import Ram
from vmonty.kvm.exit_record import ExitRecord
from vmonty.kvm.soft import fastpath, modules, stats
from vmonty.kvm.soft.vmx.exits import Handler, VmxExits
from vmonty.kvm.uapi import Exit, flags
from vmonty.kvm.uapi.exits import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
from vmonty.kvm.uapi.flags import KVM_MP_STATE_RUNNABLE, KVM_MSR_FILTER_READ, KVM_PIO_PAGE_OFFSET
from vmonty.kvm.uapi.run import kvm_run, kvm_run_u_io, kvm_run_u_mmio
from vmonty.kvm.uapi.vm import kvm_msr_filter_range
from vmonty.testing.guests import DATA, RAM_SIZE, USER_STACK, Mode, TinyGuest, load

from .conftest import with_irqchip

APIC_ON = "mov ecx, 0x1b\n rdmsr\n or eax, 0xc00\n wrmsr\n mov ecx, 0x80f\n mov eax, 0x1ff\n xor edx, edx\n wrmsr\n"
DEADLINE_MODE = "mov ecx, 0x832\n mov eax, 0x400e0\n xor edx, edx\n wrmsr\n"
VECTOR = 0xE0
HEADERS = "fastpath.pxd", "reentry.pxd", "fast_mmio.pxd"
WAIT_S = 30


@pytest.fixture(params=["kvm_intel", "kvm_amd"])
def guest(request: pytest.FixtureRequest) -> Iterator[TinyGuest]:
    with with_irqchip(request.param) as made:
        yield made


def test_counters_are_where_stats_has_them() -> None:
    declared = dict(re.findall(r"COUNT_(\w+) = (\d+)", Path(fastpath.__file__).with_name("fastpath.pxd").read_text()))
    assert len(declared) >= 6
    assert {name: getattr(stats, name) for name in declared} == {name: int(at) for name, at in declared.items()}


def test_kvm_run_is_as_declared() -> None:
    text = "".join(Path(fastpath.__file__).with_name(name).read_text() for name in HEADERS)
    declared = {name: int(value) for name, value in re.findall(r"    ((?:RUN|IO|EXIT)_\w+) = (\d+)\b", text)}
    assert declared == {
        "RUN_REQUEST_WINDOW": kvm_run.request_interrupt_window.offset,
        "RUN_IMMEDIATE_EXIT": kvm_run.immediate_exit.offset,
        "RUN_EXIT_REASON": kvm_run.exit_reason.offset,
        "RUN_SAVED": kvm_run.ready_for_interrupt_injection.offset,
        "RUN_SAVED_CR8": kvm_run.cr8.offset, "RUN_CR8": kvm_run.cr8.offset,
        "RUN_SAVED_BASE": kvm_run.apic_base.offset,
        "RUN_IO": kvm_run.u.offset, "RUN_SYNC_REGS": kvm_run.kvm_valid_regs.offset,
        "RUN_PIO_PAGE": KVM_PIO_PAGE_OFFSET * 4096, "EXIT_IO": Exit.IO,
        "IO_OUT": KVM_EXIT_IO_OUT, "IO_IN": KVM_EXIT_IO_IN, "EXIT_MMIO": Exit.MMIO,
        "RUN_MMIO_ADDRESS": kvm_run.u.offset + kvm_run_u_mmio.phys_addr.offset,
        "RUN_MMIO_DATA": kvm_run.u.offset + kvm_run_u_mmio.data.offset,
        "RUN_MMIO_LEN": kvm_run.u.offset + kvm_run_u_mmio.len.offset,
        "RUN_MMIO_IS_WRITE": kvm_run.u.offset + kvm_run_u_mmio.is_write.offset,
    }  # fmt: skip
    saved = [kvm_run.ready_for_interrupt_injection.offset, kvm_run.if_flag.offset, kvm_run.flags.offset]
    assert saved == [12, 13, 14]
    assert kvm_run.kvm_dirty_regs.offset == kvm_run.kvm_valid_regs.offset + 8
    fields = [(name, getattr(kvm_run_u_io, name).offset) for name, *_ in kvm_run_u_io._fields_]
    assert fields == [("direction", 0), ("size", 1), ("port", 2), ("count", 4), ("data_offset", 8)]


def test_an_eventfd_at_a_port_of_a_guest_that_runs(guest: TinyGuest) -> None:
    """From then on OUT does not go to user space."""
    guest.load(Mode.LONG, "again: out 0x10, al\n jmp again")
    assert guest.out()[0] == 0x10
    event = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        guest.vm.ioeventfd(event, 0x10, 1, pio=True)
        thread = threading.Thread(target=guest.vcpu.run)
        thread.start()
        assert select.select([event], [], [], WAIT_S)[0]
        guest.vcpu.kick()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        assert guest.vcpu.kvm_run.exit_reason == Exit.INTR
    finally:
        os.close(event)


def test_each_exit_is_counted(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "mov r15d, 1000\n out 0x10, al\n again: cpuid\n dec r15d\n jnz again\n out 0x11, al")
    guest.out()
    with guest.vcpu.stats() as counters:
        before = counters.read()["exits"]
        guest.out()
        assert counters.read()["exits"] - before == 1001


def test_the_task_priority_does_not_exit(guest: TinyGuest) -> None:
    """CR8 is the processor's own, while nothing that it holds back waits."""
    guest.load(
        Mode.LONG,
        f"""
        {APIC_ON}
        out 0x10, al
        mov r15d, 1000
        again:
        mov rax, r15
        and eax, 15
        mov cr8, rax
        mov rbx, cr8
        cmp rax, rbx
        jne wrong
        dec r15d
        jnz again
        out 0x11, al
        wrong: out 0x12, al
        """,
    )
    guest.out()
    with guest.vcpu.stats() as counters:
        before = counters.read()["exits"]
        assert guest.out()[0] == 0x11
        assert counters.read()["exits"] - before == 1
    assert guest.vcpu.get_sregs().cr8 == 1


def noted(handler: Handler, calls: list[object]) -> Handler:
    """*handler*, with each call in *calls*."""

    def handle(exits: VmxExits) -> bool:
        calls.append(exits)
        return handler(exits)

    return handle


@pytest.mark.parametrize("icr", [0x40400, 0x4400], ids=["self", "destination"])
def test_nmis_to_itself(guest: TinyGuest, icr: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is handled one more waits, however many come. kvm-intel needs no Python."""
    seen: list[object] = []
    for reason in (8, 32):  # NMI window, WRMSR
        monkeypatch.setitem(VmxExits.HANDLERS, reason, noted(VmxExits.HANDLERS[reason], seen))
    send = f"mov ecx, 0x830\n mov eax, {icr:#x}\n xor edx, edx\n wrmsr\n"
    code = f"""
        {APIC_ON}
        out 0x10, al
        sti
        mov r15d, 1000
        again:
        xor r14d, r14d
        {send}
        waits: pause
        cmp r14d, 2
        jb waits
        mov r8d, 100
        later: dec r8d
        jnz later
        cmp r14d, 2
        jne wrong
        dec r15d
        jnz again
        out 0x11, al
        wrong: out 0x12, al
    """
    handler = f"""
        inc r14d
        cmp r14d, 1
        jne done
        mov r13d, 10
        more: {send} dec r13d
        jnz more
        done: iretq
    """
    guest.load(Mode.LONG, code, handlers={2: handler})
    assert guest.out()[0] == 0x10
    seen.clear()
    with guest.vcpu.stats() as counters:
        before = counters.read()["nmi_injections"]
        assert guest.out()[0] == 0x11
        assert counters.read()["nmi_injections"] - before == 2000
    assert not seen


@pytest.mark.parametrize("waits", ["pause", "hlt"])
@pytest.mark.parametrize("module", ["kvm_intel", "kvm_amd"])
def test_nmis_to_another(module: str, waits: str) -> None:
    """Each arrives, whether the target runs or sleeps."""
    count = 500
    with modules.only(module), kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        vm.create_irqchip()
        with vm.create_vcpu(0) as first, vm.create_vcpu(1) as second:
            for vcpu in (first, second):
                vcpu.set_cpuid2(system.supported_cpuid())
            second.set_mp_state(KVM_MP_STATE_RUNNABLE)
            guest = TinyGuest(vm, first, ram)
            guest.load(
                Mode.LONG,
                f"""
                {APIC_ON}
                ready: cmp dword [abs {DATA + 8}], 1
                jne ready
                xor r15d, r15d
                again:
                inc r15d
                mov ecx, 0x830
                mov eax, 0x4400
                mov edx, 1
                wrmsr
                arrives: pause
                cmp [abs {DATA}], r15d
                jne arrives
                cmp r15d, {count}
                jne again
                out 0x11, al
                """,
            )
            load(second, ram, Mode.LONG, f"{APIC_ON} mov dword [abs {DATA + 8}], 1\n again: {waits}\n jmp again",
                 {2: f"inc dword [abs {DATA}]\n iretq"}, code=0x9000, stack=USER_STACK)  # fmt: skip
            thread = threading.Thread(target=second.run)
            thread.start()
            try:
                assert guest.out()[0] == 0x11
                assert ram.read_u32(DATA) == count
            finally:
                second.kick()
                thread.join(WAIT_S)
            assert not thread.is_alive()


def test_an_nmi_and_an_interrupt_at_once(guest: TinyGuest) -> None:
    """The NMI first; the interrupt when it has ended."""
    send = "mov ecx, 0x830\n xor edx, edx\n mov eax, {:#x}\n wrmsr\n"
    guest.load(
        Mode.LONG,
        f"""
        {APIC_ON}
        {send.format(0x40000 | VECTOR)} {send.format(0x40400)}
        out 0x11, al
        sti
        nop
        out 0x12, al
        """,
        handlers={2: "sti\n nop\n out 0x13, al\n iretq", VECTOR: "out 0x14, al\n iretq"},
    )
    assert [guest.out()[0] for _ in range(4)] == [0x14, 0x13, 0x11, 0x12]


def test_an_x2apic_guest_sends_its_eoi(guest: TinyGuest) -> None:
    """It is handled sooner than the guest could be told that it need not: the bit of PV EOI is never set there."""
    assert guest.vcpu.set_msrs({flags.MSR_KVM_PV_EOI_EN: DATA | 1}) == 1
    end = f"btr dword [abs {DATA}], 0\n setc al\n mov r9b, al\n mov ecx, 0x80b\n xor eax, eax\n xor edx, edx\n wrmsr"
    guest.load(
        Mode.LONG,
        f"{APIC_ON} sti\n again: out 0x10, al\n jmp again",
        handlers={VECTOR: f"{end}\n mov al, r9b\n out 0x14, al\n iretq"},
    )
    assert guest.out()[0] == 0x10
    for _ in range(5):
        guest.vm.signal_msi(0xFEE00000, VECTOR)
        seen = [guest.out() for _ in range(3)]
        assert (0x14, 0) in seen
        assert (0x14, 1) not in seen
    assert not any(bytes(guest.vcpu.get_lapic().regs)[0x100:0x180])


def test_cr8_and_the_x2apics_tpr(guest: TinyGuest) -> None:
    """One register: a value by either is read by the other, whichever of them exits."""
    guest.load(
        Mode.LONG,
        f"""
        {APIC_ON}
        mov ecx, 0x808
        mov eax, 6
        mov cr8, rax
        rdmsr
        out 0x10, al
        mov eax, 0x93
        wrmsr
        mov rax, cr8
        out 0x11, al
        mov eax, 2
        mov cr8, rax
        cpuid
        mov rax, cr8
        out 0x12, al
        mov ecx, 0x808
        rdmsr
        out 0x13, al
        """,
    )
    assert [guest.out() for _ in range(4)] == [(0x10, 0x60), (0x11, 9), (0x12, 2), (0x13, 0x20)]


@pytest.mark.parametrize("watched", ["trace", "filter"])
def test_a_guest_that_runs_is_watched_at_once(guest: TinyGuest, watched: str) -> None:
    """It never leaves compiled code by itself: who begins to trace, or filters MSRs, gets it out."""
    guest.load(Mode.LONG, f"mov ecx, 0x1a0\n again: rdmsr\n cmp byte [abs {DATA}], 1\n jne again\n out 0x10, al")
    ended: list[Exit | int] = []
    thread = threading.Thread(target=lambda: ended.append(guest.vcpu.run()))
    thread.start()
    seen: list[ExitRecord] = []
    enough = threading.Event()

    def tracer(record: ExitRecord) -> None:
        seen.append(record)
        if len(seen) > 3:
            enough.set()

    try:
        if watched == "trace":
            guest.vm.trace(tracer)
            assert enough.wait(WAIT_S)
            guest.vm.trace(None)
            assert {record.name for record in seen[1:]} <= {"MSR_READ", "MSR", "EXTERNAL_INTERRUPT", "INTR"}
        else:
            nothing = bytearray(1)
            denied = kvm_msr_filter_range(
                flags=KVM_MSR_FILTER_READ, nmsrs=1, base=0x1A0, bitmap=hostcall.address_of(nothing)
            )
            guest.vm.set_msr_filter([denied])
            thread.join(WAIT_S)
            assert not thread.is_alive(), "the filtered MSR still reads"
            assert ended == [Exit.SHUTDOWN]  # #GP, and no IDT
    finally:
        guest.ram.write_u8(DATA, 1)
        guest.vcpu.kick()
        thread.join(WAIT_S)
    assert not thread.is_alive()


@pytest.mark.parametrize(("first", "then"), [(200, 5), (200, 300)], ids=["earlier", "later"])
def test_a_deadline_that_moves(guest: TinyGuest, first: int, then: int) -> None:
    """The host's timer is set for the first; the interrupt comes when the last is reached, and not before."""
    khz = guest.vcpu.get_tsc_khz()
    code = f"""
        {APIC_ON} {DEADLINE_MODE}
        rdtsc
        shl rdx, 32
        or rax, rdx
        mov r8, rax
    """
    for milliseconds in (first, then):
        code += f"""
        lea rax, [r8 + {milliseconds * khz}]
        mov r9, rax
        mov rdx, rax
        shr rdx, 32
        mov ecx, 0x6e0
        wrmsr
        """
    code += "sti\n halted: hlt\n jmp halted"
    handler = f"rdtsc\n shl rdx, 32\n or rax, rdx\n sub rax, r9\n mov [abs {DATA}], rax\n out 0x10, al\n iretq"
    guest.load(Mode.LONG, code, handlers={VECTOR: handler})
    assert guest.out()[0] == 0x10
    late = guest.ram.read_u64(DATA)
    assert 0 <= late < 1 << 63, "before its time"
    assert guest.vcpu.get_msrs([0x6E0]) == {0x6E0: 0}


def test_the_tsc_jumps_over_a_deadline(guest: TinyGuest) -> None:
    """The host's timer was set for an hour; with the jump the deadline has come."""
    far = 3600 * 1000 * guest.vcpu.get_tsc_khz()
    code = f"""
        {APIC_ON} {DEADLINE_MODE}
        rdtsc
        mov rbx, {far}
        shl rdx, 32
        or rax, rdx
        add rax, rbx
        mov rdx, rax
        shr rdx, 32
        mov ecx, 0x6e0
        wrmsr
        out 0x10, al
        sti
        halted: hlt
        jmp halted
    """
    guest.load(Mode.LONG, code, handlers={VECTOR: "out 0x11, al\n iretq"})
    assert guest.out()[0] == 0x10
    assert guest.vcpu.set_msrs({0x10: 2 * far}) == 1
    assert guest.out()[0] == 0x11


def test_what_the_fast_path_left_is_saved_and_restored(guest: TinyGuest) -> None:
    """An interrupt to itself, a priority: KVM_GET_LAPIC has them, and KVM_SET_LAPIC brings them back."""
    code = f"""
        {APIC_ON}
        mov ecx, 0x83f
        mov eax, {VECTOR}
        xor edx, edx
        wrmsr
        mov ecx, 0x808
        mov eax, 0x50
        wrmsr
        out 0x10, al
        sti
        nop
        out 0x12, al
    """
    guest.load(Mode.LONG, code, handlers={VECTOR: "out 0x11, al\n mov ecx, 0x80b\n xor eax, eax\n wrmsr\n iretq"})
    assert guest.out()[0] == 0x10
    state = guest.vcpu.get_lapic()
    page = bytes(state.regs)
    assert page[0x200 + (VECTOR >> 5) * 0x10 + (VECTOR & 31) // 8] == 1 << (VECTOR & 7)
    assert page[0x80] == 0x50
    assert guest.out()[0] == 0x11
    taken = bytes(guest.vcpu.get_lapic().regs)
    assert any(taken[0x100:0x180])
    assert not any(taken[0x200:0x280])
    assert guest.out()[0] == 0x12
    regs = guest.vcpu.get_regs()
    guest.vcpu.set_lapic(state)
    regs.rip -= 3  # the nop again, behind sti's shadow
    guest.vcpu.set_regs(regs)
    assert guest.out()[0] == 0x11
