"""Each statistic by name: it moves for what it counts, in the file of KVM_GET_STATS_FD; or is told to be always 0."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from vmonty import kvm
from vmonty.base.ram import Ram
from vmonty.kvm.api import Vcpu
from vmonty.kvm.soft import modules, pcpu
from vmonty.kvm.soft.kvm_main import Kvm
from vmonty.kvm.soft.stats import VCPU_STATISTICS, VM_STATISTICS
from vmonty.kvm.uapi import Cap, Exit, flags
from vmonty.testing.guests import DATA, HIGH_MMIO, PML4, RAM_SIZE, Mode, TinyGuest, load

LINES = ["kvm_intel", "kvm_amd", "kvm_intel ept=0", "kvm_amd npt=0"]
# What is never counted here, and why.
ALWAYS_ZERO = {
    "mmu_flooded": "a table that the guest goes on writing is out of step, or emulated over, and not counted",
    "max_mmu_page_hash_collisions": "shadow pages are found by their whole key",
    "nx_lpage_splits": "large pages are executable: no processor here has the erratum",
    "l1d_flush": "there is no L1 terminal fault here",
    "pf_fast": "each fault takes the MMU's lock",
    "pf_mmio_spte_created": "where no slot is, no entry is made",
    "halt_poll_invalid": "no wake-up of a vCPU is spurious on x86",
    "preemption_other": "a vCPU gives its processor up between two instructions only",
    "nested_run": "nested virtualization is not offered",
    "guest_mode": "as nested_run",
    "notify_window_exits": "no guest can keep the processor from looking at its run flag",
}
WAIT_S = 40
VECTOR = 0x40
PT, PD = 0x70000, PML4 + 0x2000
READY = "again: out 0x10, al\n jmp again"
APIC_ON = "mov ebx, 0xfee000f0\n mov dword [rbx], 0x1ff\n"
EOI = "push rbx\n mov ebx, 0xfee000b0\n mov dword [rbx], 0\n pop rbx\n"
tested: set[str] = set()
Test = TypeVar("Test", bound=Callable[..., None])


def counts(names: str) -> Callable[[Test], Test]:
    """Note that a test looks at these."""
    tested.update(names.split())
    return lambda test: test


def newest() -> Kvm:
    module = modules.loaded()
    assert module is not None
    return module.vm_list[-1]


def read(guest: TinyGuest) -> dict[str, int]:
    """The VM's and the vCPU's; of a histogram the sum."""
    found: dict[str, int] = {}
    for handle in (guest.vm, guest.vcpu):
        with handle.stats() as stats:
            found |= {name: value if isinstance(value, int) else sum(value) for name, value in stats.read().items()}
    return found


@contextmanager
def moves(guest: TinyGuest, **expected: int | None) -> Iterator[None]:
    """Each of these goes up, by so much where it is told."""
    before = read(guest)
    yield
    after = read(guest)
    for name, by in expected.items():
        moved = after[name] - before[name]
        assert moved == by if by is not None else moved > 0, f"{name} moved by {moved}, not {by}"


@pytest.fixture(params=LINES)
def line(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@contextmanager
def made(line: str, chips: bool = False) -> Iterator[TinyGuest]:
    name, parameters = modules.parse(line)
    with modules.only(name, **parameters), kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        if chips:
            vm.create_irqchip()
        with vm.create_vcpu() as vcpu:
            yield TinyGuest(vm, vcpu, ram)


@pytest.fixture
def guest(line: str) -> Iterator[TinyGuest]:
    with made(line) as tiny:
        yield tiny


@pytest.fixture
def chipped(line: str) -> Iterator[TinyGuest]:
    with made(line, chips=True) as tiny:
        yield tiny


@contextmanager
def running(vcpu: Vcpu) -> Iterator[list[Exit | int]]:
    """It runs on a thread until it leaves, or is kicked in the end."""
    ended: list[Exit | int] = []
    thread = threading.Thread(target=lambda: ended.append(vcpu.run()))
    thread.start()
    try:
        yield ended
    finally:
        while thread.is_alive():
            vcpu.kick()
            thread.join(0.05)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def is_shadow(line: str) -> bool:
    return line.endswith("=0")


# ---- exits ---------------------------------------------------------------------------------------------------------


@counts("exits io_exits mmio_exits insn_emulation pf_taken pf_fixed pf_emulate")
def test_accesses(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"mov ebx, {HIGH_MMIO:#x}\n again: out 0x10, al\n mov [rbx], al\n jmp again")
    with moves(guest, exits=None, io_exits=1, pf_taken=None, pf_fixed=None):
        guest.out()
    with moves(guest, exits=None, mmio_exits=1, insn_emulation=1, pf_emulate=1):
        assert guest.run() is Exit.MMIO


@counts("insn_emulation_fail")
def test_a_fetch_from_a_device(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, f"mov ebx, {HIGH_MMIO:#x}\n jmp rbx")
    with moves(guest, insn_emulation_fail=1):
        assert guest.run() is Exit.INTERNAL_ERROR


@counts("halt_exits hypercalls")
def test_instructions(guest: TinyGuest) -> None:
    call = "vmcall" if newest().module.name == "kvm_intel" else "vmmcall"
    guest.load(Mode.LONG, f"mov eax, 99\n {call}\n {call}\n hlt")
    with moves(guest, hypercalls=2, halt_exits=1):
        assert guest.run() is Exit.HLT


@counts("signal_exits")
def test_a_signal(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "again: jmp again")
    arch = newest().vcpus[0].arch
    with moves(guest, signal_exits=1), running(guest.vcpu):
        until(lambda: bool(arch.in_guest))


@counts("request_irq_exits irq_window_exits irq_injections nmi_injections nmi_window_exits")
def test_windows_and_injections(guest: TinyGuest) -> None:
    guest.load(
        Mode.LONG, f"cli\n out 0x10, al\n sti\n nop\n {READY}",
        handlers={VECTOR: "mov al, 1\n out 0x11, al\n iretq", 2: "mov al, 2\n out 0x12, al\n iretq"},
    )  # fmt: skip
    guest.out()
    guest.vcpu.kvm_run.request_interrupt_window = 1
    with moves(guest, irq_window_exits=1, request_irq_exits=1):
        assert guest.run() is Exit.IRQ_WINDOW_OPEN
    guest.vcpu.kvm_run.request_interrupt_window = 0
    guest.vcpu.interrupt(VECTOR)
    with moves(guest, irq_injections=None):  # once more where its delivery meets a fault
        assert guest.out()[0] == 0x11
    guest.vcpu.nmi()
    guest.vcpu.nmi()
    with moves(guest, nmi_injections=None, nmi_window_exits=None):
        assert [guest.out()[0] for _ in range(3)].count(0x12) == 2


# ---- memory --------------------------------------------------------------------------------------------------------


@counts("pf_spurious")
def test_a_fault_that_another_vcpu_was_quicker_to_settle(guest: TinyGuest, line: str) -> None:
    if is_shadow(line):
        return  # with shadow paging such a fault is settled again
    mmu = newest().mmu
    good = mmu.page_fault

    def second(gpa: int, write: bool, walk: bool = False) -> int:
        good(gpa, write, walk)
        return int(good(gpa, write, walk))

    mmu.page_fault = second  # type: ignore[method-assign]
    guest.load(Mode.LONG, READY)
    with moves(guest, pf_spurious=None, pf_fixed=0):
        guest.out()


@counts("remote_tlb_flush remote_tlb_flush_requests tlb_flush")
def test_a_slot_that_goes(guest: TinyGuest) -> None:
    guest.vm.set_user_memory_region(1, 1 << 24, Ram(4096))
    guest.load(Mode.LONG, READY)
    guest.out()
    with moves(guest, remote_tlb_flush=None, remote_tlb_flush_requests=None, tlb_flush=None):
        guest.vm.set_user_memory_region(1, 0, None)
        guest.out()


@counts("pages_4k pages_2m pages_1g")
@pytest.mark.parametrize(("size", "name"), [(4096, "pages_4k"), (2 << 20, "pages_2m"), (1 << 30, "pages_1g")])
def test_pages(guest: TinyGuest, line: str, size: int, name: str) -> None:
    """Where a slot has one whole. They are gone with it."""
    at = 1 << 30
    ram = Ram(size)
    guest.vm.set_user_memory_region(1, at, ram)
    guest.load(Mode.LONG, f"out 0x10, al\n mov ebx, {at}\n mov al, [rbx]\n {READY}")
    guest.out()
    if is_shadow(line) and size > 2 << 20:
        name = "pages_2m"  # the guest's own tables have no larger ones
    before = read(guest)
    guest.out()
    assert read(guest)[name] > before[name]
    guest.vm.set_user_memory_region(1, 0, None)
    after = read(guest)
    assert after[name] <= before[name]


@counts("pf_guest invlpg")
def test_faults_and_flushes_of_a_guest_with_shadow_tables(guest: TinyGuest, line: str) -> None:
    guest.load(Mode.LONG, f"invlpg [rsp]\n mov rbx, 1 << 40\n mov al, [rbx]\n {READY}", handlers={14: READY})
    by = 1 if is_shadow(line) else 0
    with moves(guest, pf_guest=by, invlpg=by):
        guest.out()


@counts("mmu_cache_miss mmu_shadow_zapped mmu_pte_write mmu_pde_zapped mmu_unsync max_mmu_rmap_size")
def test_shadow_pages(guest: TinyGuest, line: str) -> None:
    """A table of 4 KiB pages in which one page is mapped twice, and which the guest writes; then the one above it."""
    if not is_shadow(line):
        return
    guest.load(
        Mode.LONG,
        f"mov rax, [abs {DATA}]\n mov rax, [abs {0x50000}]\n out 0x10, al\n"
        f"mov rax, [abs {PT + 8 * 0x60}]\n mov [abs {PT + 8 * 0x60}], rax\n out 0x10, al\n"
        f"mov rax, cr3\n mov cr3, rax\n mov cr3, rax\n out 0x10, al\n"
        f"mov rax, [abs {PD + 8 * 100}]\n mov [abs {PD + 8 * 100}], rax\n {READY}",
    )
    for index in range(512):
        guest.ram.write_u64(PT + 8 * index, index << 12 | 7)
    guest.ram.write_u64(PT + 8 * 0x50, DATA | 7)
    guest.ram.write_u64(PD, PT | 7)
    guest.vcpu.set_sregs(guest.vcpu.get_sregs())
    with moves(guest, mmu_cache_miss=None, max_mmu_rmap_size=None):
        guest.out()
    assert read(guest)["max_mmu_rmap_size"] == 2
    with moves(guest, mmu_pte_write=1, mmu_unsync=1, mmu_pde_zapped=0):
        guest.out()
    with moves(guest, mmu_unsync=-1):
        guest.out()
    with moves(guest, mmu_pde_zapped=None, mmu_shadow_zapped=None):
        guest.out()


@counts("mmu_recycled")
def test_shadow_pages_beyond_the_limit(guest: TinyGuest, line: str) -> None:
    if not is_shadow(line):
        return
    at, count = 1 << 30, 80
    guest.vm.set_nr_mmu_pages(64)
    guest.vm.set_user_memory_region(1, at, Ram((count << 21) + 4096), offset=4096)  # small ones
    guest.load(
        Mode.LONG, f"mov ebx, {at}\n mov ecx, {count}\n more: mov al, [rbx]\n add rbx, 1 << 21\n loop more\n {READY}"
    )
    with moves(guest, mmu_recycled=None):
        guest.out()


# ---- halts, events, processors -------------------------------------------------------------------------------------

HALTING = f"{APIC_ON} sti\n out 0x10, al\n again: hlt\n jmp again"


@counts("blocking halt_wakeup halt_wait_ns halt_wait_hist")
def test_a_halt(chipped: TinyGuest) -> None:
    chipped.load(Mode.LONG, HALTING, handlers={VECTOR: f"{EOI} out 0x11, al\n iretq"})
    chipped.out()
    vcpu = newest().vcpus[0]
    before = read(chipped)
    assert before["blocking"] == 0
    with running(chipped.vcpu) as ended:
        until(lambda: vcpu.stats.get("blocking") == 1)
        chipped.vm.signal_msi(0xFEE00000, VECTOR)
        until(lambda: bool(ended))
    after = read(chipped)
    assert [after[name] - before[name] for name in ("halt_wakeup", "halt_wait_hist")] == [1, 1]
    assert after["halt_wait_ns"] > before["halt_wait_ns"]
    assert after["blocking"] == 0


@counts("halt_attempted_poll halt_successful_poll halt_poll_success_ns halt_poll_success_hist")
def test_a_halt_that_is_polled(line: str) -> None:
    """The module's halt_poll_ns: a wake-up in that time costs no sleep."""
    with made(f"{line} halt_poll_ns=40000000000", chips=True) as guest:
        guest.load(Mode.LONG, HALTING, handlers={VECTOR: f"{EOI} out 0x11, al\n iretq"})
        guest.out()
        before = read(guest)
        with running(guest.vcpu) as ended:
            halts = newest().vcpus[0].stats
            until(lambda: halts.get("halt_exits") > before["halt_exits"])
            guest.vm.signal_msi(0xFEE00000, VECTOR)
            until(lambda: bool(ended))
        after = read(guest)
        for name in ("halt_attempted_poll", "halt_successful_poll", "halt_poll_success_hist"):
            assert after[name] == before[name] + 1, name
        assert after["halt_poll_success_ns"] > before["halt_poll_success_ns"]
        assert after["halt_wakeup"] == before["halt_wakeup"]


@counts("halt_poll_fail_ns halt_poll_fail_hist")
def test_a_halt_that_is_polled_in_vain(chipped: TinyGuest) -> None:
    chipped.vm.enable_cap(Cap.HALT_POLL, 1000)
    chipped.load(Mode.LONG, HALTING)
    chipped.out()
    vcpu = newest().vcpus[0]
    expected = {
        "halt_attempted_poll": 1,
        "halt_successful_poll": 0,
        "halt_poll_fail_ns": None,
        "halt_poll_fail_hist": 1,
    }
    with moves(chipped, **expected), running(chipped.vcpu):
        until(lambda: vcpu.stats.get("blocking") == 1)


@counts("irq_exits req_event")
def test_an_interrupt_for_a_guest_that_runs(chipped: TinyGuest) -> None:
    chipped.load(
        Mode.LONG, f"{APIC_ON} sti\n out 0x10, al\n again: jmp again", handlers={VECTOR: f"{EOI} out 0x11, al\n iretq"}
    )
    chipped.out()
    vcpu = newest().vcpus[0]
    with moves(chipped, irq_exits=None, req_event=None, irq_injections=None), running(chipped.vcpu) as ended:
        until(lambda: bool(vcpu.arch.in_guest))
        chipped.vm.signal_msi(0xFEE00000, VECTOR)
        until(lambda: bool(ended))


@counts("directed_yield_attempted directed_yield_successful")
def test_a_yield(chipped: TinyGuest) -> None:
    call = "vmcall" if newest().module.name == "kvm_intel" else "vmmcall"
    with chipped.vm.create_vcpu(1):
        chipped.load(Mode.LONG, f"mov eax, {flags.KVM_HC_SCHED_YIELD}\n mov ebx, 1\n {call}\n {READY}")
        with moves(chipped, directed_yield_attempted=1, directed_yield_successful=1):
            chipped.out()


@counts("preemption_reported host_state_reload fpu_reload")
def test_two_vcpus_on_one_processor(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pcpu.PhysicalCpus(limit=1)
    pool.online(0)
    monkeypatch.setattr(pcpu, "POOL", pool)
    with made(line) as guest, guest.vm.create_vcpu(1) as other:
        guest.load(Mode.LONG, "again: jmp again")
        load(other, guest.ram, Mode.LONG, "again: jmp again")
        stats = newest().vcpus[0].stats
        expected = dict.fromkeys(("preemption_reported", "host_state_reload", "fpu_reload"))
        with moves(guest, **expected), running(guest.vcpu), running(other):
            until(lambda: stats.get("preemption_reported") > 1)


def test_every_statistic_is_tested_or_always_zero() -> None:
    names = {entry.name for entry in (*VM_STATISTICS, *VCPU_STATISTICS)}
    assert tested | set(ALWAYS_ZERO) == names
    assert not tested & set(ALWAYS_ZERO)
