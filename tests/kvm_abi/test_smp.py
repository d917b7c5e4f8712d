"""Several vCPUs: creation, threads, IPIs, INIT and SIPI. Source: api.rst, KVM_CREATE_VCPU; SDM, "MP Initialization"."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.api import Vcpu, Vm
from vmonty.kvm.uapi import Cap, Exit
from vmonty.kvm.uapi.flags import KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED
from vmonty.testing.guests import DATA, USER_STACK, Mode, TinyGuest, load
from vmonty.testing.nasm import assemble

from .irq_guests import APIC, APIC_ICR, APIC_ICR2, APIC_ID, APIC_ON, IPI_VECTOR, READY, apic_write, handler, out_of
from .refusals import outcome, refused
from .runner import Runner
from .second_vcpu import PAGES, SecondVcpu, second_vcpu

Start = Callable[[Vcpu], Runner]
INIT, SIPI, ASSERT = 5 << 8, 6 << 8, 1 << 14


def test_duplicate_id(vm: Vm) -> None:
    with vm.create_vcpu(3), refused(errno.EEXIST):
        vm.create_vcpu(3)


def test_id_is_taken_even_after_close(vm: Vm) -> None:
    """A vCPU lives as long as its VM."""
    vm.create_vcpu(0).close()
    with refused(errno.EEXIST):
        vm.create_vcpu(0)


def test_id_out_of_range(vm: Vm) -> None:
    limit = vm.check_extension(Cap.MAX_VCPU_ID) or vm.check_extension(Cap.MAX_VCPUS)
    with refused(errno.EINVAL):
        vm.create_vcpu(limit)
    with vm.create_vcpu(limit - 1) as last:
        assert last.id == limit - 1


def test_smaller_limit(vm: Vm) -> None:
    """KVM_CAP_MAX_VCPU_ID can be lowered per VM, once."""
    if outcome(lambda: vm.enable_cap(Cap.MAX_VCPU_ID, 4), errno.EINVAL):
        pytest.skip("this KVM cannot lower KVM_CAP_MAX_VCPU_ID (it came with Linux 6.1)")
    with refused(errno.EINVAL):
        vm.create_vcpu(4)
    with vm.create_vcpu(3) as last:
        assert last.id == 3


def test_apic_ids(configured: Vm, ram: Ram) -> None:
    """The vCPU's id is its initial APIC ID."""
    configured.create_irqchip()
    for number in (0, 1, 7):
        with configured.create_vcpu(number) as vcpu:
            state = bytes(vcpu.get_lapic())
            assert state[APIC_ID + 3] == number


@pytest.mark.parametrize("mode", [Mode.LONG, Mode.USER], ids=lambda mode: mode.value)
def test_vcpus_on_threads(configured: Vm, ram: Ram, runner: Start, mode: Mode) -> None:
    """Eight vCPUs add with LOCK to one counter; none of the additions is lost."""
    count, rounds = 8, 500
    with ExitStack() as stack:
        threads = []
        for number in range(count):
            vcpu = stack.enter_context(configured.create_vcpu(number))
            load(
                vcpu,
                ram,
                mode,
                f"mov ecx, {rounds}\n again: lock inc dword [abs {DATA}]\n dec ecx\n jnz again\n out 0x10, al",
            )
            threads.append(runner(vcpu))
        for thread in threads:
            assert thread.next() == (0x10, 0)
            thread.vcpu.kick()
        assert ram.read_u32(DATA) == count * rounds
        for thread in threads:
            thread.end()


def test_one_vcpu_from_several_threads(guest: TinyGuest, runner: Start) -> None:
    """A vCPU may move between threads from run to run."""
    guest.load(Mode.LONG, "inc ebx\n mov eax, ebx\n out 0x10, eax\n hlt\n inc ebx\n mov eax, ebx\n out 0x10, eax\n hlt")
    for expected in (1, 2):
        thread = runner(guest.vcpu)
        assert thread.next() == (0x10, expected)
        assert thread.next() is Exit.HLT
        thread.join()


@pytest.mark.parametrize("chipped", [False, True], ids=["bare", "irqchip"])
def test_the_second_vcpu_of_the_suite(configured: Vm, ram: Ram, chipped: bool) -> None:
    """What --vcpus 2 puts beside each test: it writes its pages, is interrupted, and goes on without the test's RAM."""
    if chipped:
        configured.create_irqchip()
    with configured.create_vcpu(), second_vcpu(configured, chipped) as second:
        while chipped and not second.ticks:
            second.turn()
        _goes_on(second)
        configured.set_user_memory_region(0, 0, None)
        for _ in range(2):
            second.turn()
        configured.set_user_memory_region(0, 0, ram)
        _goes_on(second)


def _goes_on(second: SecondVcpu) -> None:
    rounds = second.ram.read_u32(PAGES)
    while second.ram.read_u32(PAGES) == rounds:
        second.turn()


@pytest.fixture
def pair(configured: Vm, ram: Ram) -> Iterator[tuple[TinyGuest, TinyGuest]]:
    """Two vCPUs with local APICs; the second waits for INIT and SIPI."""
    configured.create_irqchip()
    with configured.create_vcpu(0) as first, configured.create_vcpu(1) as second:
        yield TinyGuest(configured, first, ram), TinyGuest(configured, second, ram)


def test_second_vcpu_waits(pair: tuple[TinyGuest, TinyGuest]) -> None:
    first, second = pair
    assert first.vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE
    assert second.vcpu.get_mp_state() == KVM_MP_STATE_UNINITIALIZED


def test_init_sipi_starts_the_second(pair: tuple[TinyGuest, TinyGuest], runner: Start) -> None:
    """It begins in real mode at vector << 12, and reports to the first through memory."""
    first, second = pair
    start = 0x6000
    first.ram.write(start, assemble(f"mov ax, cs\n mov [{DATA:#x}], ax\n mov al, 0x5a\n out 0x99, al\n hlt", 16, 0))
    thread = runner(second.vcpu)
    ipis = "".join(
        apic_write(APIC_ICR2, 1 << 24) + apic_write(APIC_ICR, command)
        for command in (INIT | ASSERT, SIPI | ASSERT | start >> 12)
    )
    first.load(Mode.LONG, f"{APIC_ON} {ipis} {READY}")
    assert first.out()[0] == 0x10
    result = thread.next()
    while result is Exit.INTR:  # EAGAIN: INIT and SIPI have changed its state, and it is to be run again
        thread = runner(second.vcpu)
        result = thread.next()
    assert result == (0x99, 0x5A)
    assert first.ram.read_u16(DATA) == start >> 4
    second.vcpu.kick()
    thread.end()
    assert second.vcpu.get_mp_state() != KVM_MP_STATE_UNINITIALIZED


def test_ipi_to_the_other(pair: tuple[TinyGuest, TinyGuest], runner: Start) -> None:
    """A fixed IPI wakes the second vCPU from HLT."""
    first, second = pair
    second.vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
    load(second.vcpu, first.ram, Mode.LONG, f"{APIC_ON} out 0x98, al\n sti\n sleep: hlt\n jmp sleep",
         {IPI_VECTOR: handler(IPI_VECTOR)}, code=0x9000, stack=USER_STACK)  # fmt: skip
    thread = runner(second.vcpu)
    assert thread.next() == (0x98, 0)
    ipi = apic_write(APIC_ICR2, 1 << 24) + apic_write(APIC_ICR, IPI_VECTOR | ASSERT)
    first.load(Mode.LONG, f"{APIC_ON} {ipi} {READY}")
    assert first.out()[0] == 0x10
    assert thread.next() == (0x30, IPI_VECTOR)


def test_self_ipi(chipped: TinyGuest) -> None:
    """Destination shorthand 1 is the sender."""
    chipped.load(Mode.LONG, f"{APIC_ON} sti\n {apic_write(APIC_ICR, IPI_VECTOR | ASSERT | 1 << 18)} {READY}",
                 {IPI_VECTOR: handler(IPI_VECTOR)})  # fmt: skip
    assert out_of(chipped, 0x30) == IPI_VECTOR


def test_boot_cpu_id(configured: Vm) -> None:
    """The chosen vCPU is the bootstrap processor: runnable, and so marked in its APIC base."""
    configured.create_irqchip()
    configured.set_boot_cpu_id(1)
    with configured.create_vcpu(0) as other, configured.create_vcpu(1) as boot:
        assert boot.get_mp_state() == KVM_MP_STATE_RUNNABLE
        assert other.get_mp_state() == KVM_MP_STATE_UNINITIALIZED
        assert boot.get_sregs().apic_base & 1 << 8
        assert not other.get_sregs().apic_base & 1 << 8
        with refused(errno.EBUSY):
            configured.set_boot_cpu_id(0)


@pytest.mark.needs(Cap.X2APIC_API)
def test_x2apic_api(configured: Vm) -> None:
    configured.enable_cap(Cap.X2APIC_API, 1)
    with refused(errno.EINVAL):
        configured.enable_cap(Cap.X2APIC_API, 1 << 30)
    configured.create_irqchip()
    with configured.create_vcpu(0x21) as vcpu:
        # 32-bit IDs: the id fills the register once x2APIC is on; in xAPIC mode it is the top byte.
        assert int.from_bytes(bytes(vcpu.get_lapic())[APIC_ID : APIC_ID + 4], "little") in (0x21 << 24, 0x21)
    assert APIC == 0xFEE00000
