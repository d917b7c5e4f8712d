"""The local APIC, driven through MMIO and MSRs on a virtual clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.kvm.soft.lapic import Lapic
from vmonty.kvm.uapi.irq import kvm_lapic_state

from .board import APIC_BASE, Board, FakeVcpu, read, to_x2apic, write

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR2 = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVTT, LVT_PMC, LVT0, LVT1, LVT_ERROR, TMICT, TMCCT, TDCR = 0x320, 0x340, 0x350, 0x360, 0x370, 0x380, 0x390, 0x3E0
PERIODIC, TSC_DEADLINE, MASKED = 1 << 17, 2 << 17, 1 << 16
DIVIDE_BY_1 = 0xB


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def apic(board: Board) -> Lapic:
    return board.apics[0]


@pytest.fixture
def vcpu(board: Board) -> FakeVcpu:
    return board.vcpus[0]


# ---- reset and registers -------------------------------------------------------------------------------------


def test_power_up_state() -> None:
    """SDM, "Local APIC State After Power-Up or Reset", and KVM's open LINT0 on the bootstrap processor."""
    bsp, ap = Board(vcpus=2, on=False).apics
    for apic, base, lvt0 in ((bsp, 0xFEE00900, 0x700), (ap, 0xFEE00800, MASKED)):
        assert apic.apic_base == base
        shown = {offset: read(apic, offset) for offset in (ID, VERSION, TPR, LDR, DFR, SVR, ICR, LVTT, LVT0, TMICT)}
        assert shown == {
            ID: apic.owner.vcpu_id << 24, VERSION: 0x50014, TPR: 0, LDR: 0, DFR: 0xFFFFFFFF, SVR: 0xFF, ICR: 0,
            LVTT: MASKED, LVT0: lvt0, TMICT: 0,
        }  # fmt: skip


def test_init_keeps_the_base_and_the_id(board: Board, apic: Lapic) -> None:
    """SDM, "Local APIC State After an INIT Reset"."""
    assert apic.set_base(0xFED00900)
    apic.mmio_write(0xFED00000 + ID, 4, 7 << 24)
    apic.accept_irq(0, 0x40)
    apic.reset(init_event=True)
    assert apic.apic_base == 0xFED00900
    assert apic.mmio_read(0xFED00000 + ID, 4) == 7 << 24
    assert apic.irr == 0
    apic.reset(init_event=False)
    assert (apic.apic_base, read(apic, ID)) == (0xFEE00900, 0)


@pytest.mark.parametrize(
    ("offset", "written", "reads"),
    [
        (ID, 0xFFFFFFFF, 0xFF000000),
        (VERSION, 0xFFFFFFFF, 0x50014),
        (TPR, 0xFFFFFFFF, 0xFF),
        (LDR, 0xFFFFFFFF, 0xFF000000),
        (DFR, 0, 0x0FFFFFFF),
        (SVR, 0xFFFFFFFF, 0x3FF),
        (ICR2, 0xFFFFFFFF, 0xFF000000),
        (LVTT, 0xFFFFFFFF, 0x710FF),
        (0x330, 0xFFFFFFFF, 0x117FF),
        (LVT_PMC, 0xFFFFFFFF, 0x117FF),
        (LVT0, 0xFFFFFFFF, 0x1F7FF),
        (LVT1, 0xFFFFFFFF, 0x1F7FF),
        (LVT_ERROR, 0xFFFFFFFF, 0x110FF),
        (TDCR, 0xFFFFFFFF, 0xB),
        (0x90, 0xFF, 0),
        (0x2F0, 0xFF, 0),
    ],
)
def test_what_can_be_written(apic: Lapic, offset: int, written: int, reads: int) -> None:
    """SDM, "Local APIC Register Address Map"; the same on Linux's KVM."""
    write(apic, offset, written)
    assert read(apic, offset) == reads


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (SVR, 1, 0xFF),
        (SVR + 1, 1, 0x01),
        (SVR, 2, 0x1FF),
        (SVR + 2, 2, 0),
        (SVR + 2, 4, 0),
        (SVR + 4, 4, 0),
        (SVR, 8, 0),
    ],
)
def test_reads_inside_32_bits(apic: Lapic, offset: int, size: int, value: int) -> None:
    assert apic.mmio_read(APIC_BASE + offset, size) == value


@pytest.mark.parametrize(("offset", "size"), [(TPR, 1), (TPR, 2), (TPR, 8), (TPR + 4, 4), (TPR + 1, 4)])
def test_other_writes_are_ignored(apic: Lapic, offset: int, size: int) -> None:
    assert apic.mmio_write(APIC_BASE + offset, size, 0x20)
    assert read(apic, TPR) == 0


def test_the_page_moves_and_disappears(apic: Lapic) -> None:
    assert apic.mmio_read(APIC_BASE - 4, 4) is None
    assert apic.mmio_read(APIC_BASE + 0x1000, 4) is None
    assert not apic.mmio_write(APIC_BASE + 0x1000, 4, 0)
    assert apic.set_base(0xFEE00100)
    assert apic.mmio_read(APIC_BASE + SVR, 4) == 0xFFFFFFFF
    apic.quirk_mmio_hole = False
    assert apic.mmio_read(APIC_BASE + SVR, 4) is None
    assert not apic.mmio_write(APIC_BASE + SVR, 4, 0)


def test_tpr_accesses_are_reported(apic: Lapic) -> None:
    seen: list[bool] = []
    apic.report_tpr_access = seen.append
    write(apic, TPR, 0)
    read(apic, TPR)
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("path", "accepted"),
    [
        pytest.param((0xFEE00C00,), (True,), id="xAPIC to x2APIC"),
        pytest.param((0xFEE00C00, 0xFEE00800), (True, False), id="x2APIC to xAPIC"),
        pytest.param((0xFEE00C00, 0xFEE00000, 0xFEE00800), (True, True, True), id="off in between"),
        pytest.param((0xFEE00000, 0xFEE00C00), (True, False), id="off to x2APIC"),
        pytest.param((0xFEE00400,), (False,), id="EXTD without EN"),
        pytest.param((0xFEE00801,), (False,), id="a reserved bit"),
        pytest.param((0xFEE00A00,), (False,), id="bit 9"),
        pytest.param((1 << 46 | 0xFEE00800,), (False,), id="beyond MAXPHYADDR"),
        pytest.param((1 << 45 | 0xFEE00800,), (True,), id="high"),
    ],
)
def test_state_transitions(apic: Lapic, path: tuple[int, ...], accepted: tuple[bool, ...]) -> None:
    """SDM, "x2APIC State Transitions"."""
    assert tuple(apic.set_base(value) for value in path) == accepted


def test_user_space_may_make_any_transition_but_no_x2apic_without_cpuid(apic: Lapic) -> None:
    assert apic.set_base(0xFEE00000, host_initiated=True)
    assert apic.set_base(0xFEE00C00, host_initiated=True)
    assert apic.set_base(0xFEE00800, host_initiated=True)
    apic.configure(x2apic=False, tsc_deadline=False, phys_bits=46)
    assert not apic.set_base(0xFEE00C00, host_initiated=True)
    write(apic, LVTT, 0xFFFFFFFF)
    assert read(apic, LVTT) == 0x310FF


def test_version_follows_the_configuration(apic: Lapic) -> None:
    apic.configure(x2apic=True, tsc_deadline=True, phys_bits=46, directed_eoi=True, cmci=True)
    assert read(apic, VERSION) == 0x1060014
    write(apic, SVR, 0x11FF)
    assert apic.suppresses_eoi_broadcast
    write(apic, 0x2F0, 0xFFFFFFFF)
    assert read(apic, 0x2F0) == 0x117FF


# ---- x2APIC --------------------------------------------------------------------------------------------------


def test_x2apic_registers_that_exist(apic: Lapic) -> None:
    """SDM, "x2APIC Register Address Space"."""
    assert apic.read_msr(0x802) is None
    to_x2apic(apic)
    readable = {msr for msr in range(0x800, 0x900) if apic.read_msr(msr) is not None}
    assert readable == {
        0x802, 0x803, 0x808, 0x80A, 0x80D, 0x80F, *range(0x810, 0x829), 0x830, *range(0x832, 0x83A), 0x83E,
    }  # fmt: skip
    writable = {msr for msr in range(0x800, 0x900) if apic.write_msr(msr, 0)}
    assert writable == {0x808, 0x80B, 0x80F, 0x828, 0x830, *range(0x832, 0x839), 0x83E, 0x83F}


@pytest.mark.parametrize(
    ("msr", "value", "accepted"),
    [
        (0x808, 1 << 32, False),
        (0x808, 0x1FF, True),
        (0x80B, 1, True),
        (0x80F, 0xFFFFFFFF, True),
        (0x828, 1, False),
        (0x83F, 0x100, False),
        (0x83F, 0x41, True),
        (0x830, 1 << 12 | 0x40, True),
        (0x830, 1 << 13, False),
        (0x830, 1 << 16, False),
        (0x830, 1 << 17, False),
        (0x830, 1 << 20, False),
        (0x830, 1 << 31, False),
        (0x830, 1 << 32 | 0xC40, True),
    ],
)
def test_x2apic_reserved_bits(apic: Lapic, msr: int, value: int, accepted: bool) -> None:
    """What Linux's KVM refuses (its KVM_SET_MSRS says so)."""
    to_x2apic(apic)
    assert apic.write_msr(msr, value) is accepted


def test_x2apic_ids() -> None:
    """SDM, "Deriving Logical x2APIC ID from the Local x2APIC ID"."""
    apic = Board(vcpus=20).apics[19]
    to_x2apic(apic)
    assert (apic.read_msr(0x802), apic.read_msr(0x80D)) == (19, 1 << 16 | 1 << 3)


def test_x2apic_icr_is_one_register_of_64_bits() -> None:
    board = Board(vcpus=2)
    for apic in board.apics:
        to_x2apic(apic)
    assert board.apics[0].write_msr(0x830, 1 << 32 | 0x1041)
    assert board.apics[0].read_msr(0x830) == 1 << 32 | 0x41
    assert board.apics[1].has_interrupt() == 0x41
    state = bytes(board.apics[0].get_state())
    assert state[0x300:0x308].hex() == "4100000001000000"
    assert state[0x310] == 1


# ---- priorities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tpr", "in_service", "ppr"),
    [(0, None, 0), (0x35, None, 0x35), (0x35, 0x41, 0x40), (0x35, 0x3F, 0x35), (0x35, 0x21, 0x35), (0xFF, 0xF0, 0xFF)],
)
def test_processor_priority(apic: Lapic, tpr: int, in_service: int | None, ppr: int) -> None:
    """SDM, "Task and Processor Priorities"."""
    if in_service is not None:
        apic.accept_irq(0, in_service)
        assert apic.get_interrupt() == in_service
    write(apic, TPR, tpr)
    assert read(apic, PPR) == apic.ppr == ppr


def test_interrupts_are_nested_by_class(board: Board, apic: Lapic) -> None:
    """SDM, "Interrupt Acceptance for Fixed Interrupts", "Signaling Interrupt Servicing Completion"."""
    for vector in (0x41, 0x42, 0x51):
        assert apic.accept_irq(0, vector) == 1
    assert board.vcpus[0].kicks == 3
    assert apic.get_interrupt() == 0x51
    assert apic.has_interrupt() is None
    apic.accept_irq(0, 0x5F)
    assert apic.has_interrupt() is None
    apic.accept_irq(0, 0x60)
    assert apic.get_interrupt() == 0x60
    order = []
    for _ in range(5):
        write(apic, EOI, 0)
        vector = apic.get_interrupt()
        if vector is not None:
            order.append(vector)
    assert order == [0x5F, 0x42, 0x41]
    assert apic.isr == 0


def test_cr8_is_the_tprs_class(apic: Lapic) -> None:
    """SDM, "Interaction of Task Priorities between CR8 and APIC"."""
    write(apic, TPR, 0x37)
    assert apic.get_cr8() == 3
    apic.set_cr8(5)
    assert read(apic, TPR) == 0x50
    apic.accept_irq(0, 0x5F)
    assert apic.has_interrupt() is None
    apic.set_cr8(4)
    assert apic.has_interrupt() == 0x5F


def test_an_eoi_without_anything_in_service_is_nothing(apic: Lapic) -> None:
    assert apic.set_eoi() is None
    apic.accept_irq(0, 0x30, level_triggered=True)
    assert read(apic, TMR + 0x10) == 1 << 16
    apic.get_interrupt()
    assert apic.set_eoi() == 0x30
    apic.accept_irq(0, 0x30)
    assert read(apic, TMR + 0x10) == 0
    assert (read(apic, IRR + 0x10), read(apic, ISR + 0x10)) == (1 << 16, 0)


def test_pv_eoi(board: Board, apic: Lapic) -> None:
    apic.accept_irq(0, 0x30)
    assert apic.pv_eoi_vector() is None
    apic.get_interrupt()
    assert apic.pv_eoi_vector() == 0x30
    board.redirect(5, 0x8030)
    assert apic.pv_eoi_vector() is None


# ---- software disable, errors, local sources -----------------------------------------------------------------


def test_a_software_disabled_apic_drops_fixed_interrupts_and_masks_its_lvts(apic: Lapic, vcpu: FakeVcpu) -> None:
    """SDM, "Local APIC State After It Has Been Software Disabled"."""
    apic.accept_irq(0, 0x30)
    write(apic, LVT0, 0x700)
    write(apic, SVR, 0xFF)
    assert read(apic, LVT0) == MASKED | 0x700
    write(apic, LVT0, 0x40)
    assert read(apic, LVT0) == MASKED | 0x40
    assert apic.accept_irq(0, 0x31) == 0
    assert apic.accept_irq(4, 0) == 1
    assert vcpu.events == ["nmi"]
    assert apic.has_interrupt() == 0x30


def test_errors(board: Board, apic: Lapic) -> None:
    """SDM, "Error Handling": collected, shown by a write, one interrupt until then."""
    write(apic, LVT_ERROR, 0xFE)
    apic.accept_irq(0, 0x0F)
    assert apic.irr == 1 << 0xFE
    apic.get_interrupt()
    write(apic, ICR, 0x0E)
    write(apic, 0x40, 0)
    assert apic.irr == 0
    assert read(apic, ESR) == 0
    write(apic, ESR, 0)
    assert read(apic, ESR) == 0xE0
    write(apic, ESR, 0)
    assert read(apic, ESR) == 0
    apic.mmio_read(APIC_BASE + 0x40, 4)
    assert apic.irr == 1 << 0xFE


def test_an_illegal_error_vector_does_not_recurse(apic: Lapic) -> None:
    write(apic, LVT_ERROR, 5)
    apic.accept_irq(0, 3)
    write(apic, ESR, 0)
    assert read(apic, ESR) == 0x40
    assert apic.irr == 0


def test_a_performance_interrupt_masks_its_entry(apic: Lapic, vcpu: FakeVcpu) -> None:
    """SDM, "Local Vector Table"."""
    write(apic, LVT_PMC, 0x400)
    assert apic.local_deliver(LVT_PMC) == 1
    assert read(apic, LVT_PMC) == MASKED | 0x400
    assert apic.local_deliver(LVT_PMC) == 0
    assert vcpu.events == ["nmi"]


@pytest.mark.parametrize(("lvt0", "accepts"), [(0x700, True), (MASKED | 0x700, False), (0x030, False), (0x400, False)])
def test_who_hears_the_pic(apic: Lapic, lvt0: int, accepts: bool) -> None:
    write(apic, LVT0, lvt0)
    assert apic.accept_pic_intr() is accepts
    apic.set_base(0xFEE00100)
    assert apic.accept_pic_intr()


def test_other_delivery_modes(apic: Lapic, vcpu: FakeVcpu) -> None:
    results = {mode: apic.accept_irq(mode, 0x40) for mode in range(8)}
    assert results == {0: 1, 1: 1, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1, 7: 0}
    assert vcpu.events == ["unhalt", "nmi"]
    assert (apic.init_pending, apic.sipi_pending, apic.sipi_vector) == (True, True, 0x40)


def test_init_and_sipi_wait_for_the_vcpus_thread(apic: Lapic, vcpu: FakeVcpu) -> None:
    """SDM, "MP Initialization Protocol Algorithm for MP Systems"."""
    assert apic.accept_irq(5, 0, level=0, level_triggered=True) == 0
    apic.accept_events()
    assert vcpu.events == []
    apic.accept_irq(6, 0x12)
    apic.accept_irq(5, 0)
    assert not apic.sipi_pending
    apic.accept_irq(6, 0x99)
    apic.accept_events()
    assert vcpu.events == ["init", ("sipi", 0x99)]
    apic.accept_irq(5, 0)
    apic.accept_irq(6, 0x9A)
    apic.accept_events(allowed=False)
    assert (apic.init_pending, apic.sipi_pending) == (True, False)
    apic.accept_events()
    assert vcpu.events[2:] == ["init"]


# ---- the timer -----------------------------------------------------------------------------------------------


def start(apic: Lapic, mode: int, count: int, tdcr: int = DIVIDE_BY_1) -> None:
    write(apic, TDCR, tdcr)
    write(apic, LVTT, mode | 0xEF)
    write(apic, TMICT, count)


def fired(apic: Lapic) -> bool:
    return apic.get_interrupt() == 0xEF and apic.set_eoi() == 0xEF


@pytest.mark.parametrize(
    ("tdcr", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1), (4, 2)]
)
def test_divide_configuration(board: Board, apic: Lapic, tdcr: int, divisor: int) -> None:
    """SDM, "APIC Timer": a nanosecond times the divisor for each count."""
    start(apic, 0, 1_000_000, tdcr)
    board.timers.advance(divisor * 999_999)
    assert not fired(apic)
    assert read(apic, TMCCT) == 1
    board.timers.advance(divisor)
    assert fired(apic)
    assert read(apic, TMCCT) == 0


def test_one_shot(board: Board, apic: Lapic) -> None:
    start(apic, 0, 1000)
    assert (read(apic, TMICT), read(apic, TMCCT)) == (1000, 1000)
    board.timers.advance(400)
    assert read(apic, TMCCT) == 600
    board.timers.advance(10_000)
    assert fired(apic)
    assert not fired(apic)
    write(apic, TMICT, 1000)
    write(apic, TMICT, 0)
    board.timers.advance(10_000)
    assert not fired(apic)


def test_periodic(board: Board, apic: Lapic) -> None:
    start(apic, PERIODIC, 1_000_000)
    for _ in range(3):
        board.timers.advance(999_999)
        assert not fired(apic)
        board.timers.advance(1)
        assert fired(apic)
    board.timers.advance(250_000)
    assert read(apic, TMCCT) == 750_000
    write(apic, LVTT, MASKED | PERIODIC | 0xEF)
    board.timers.advance(1_000_000)
    assert not fired(apic)
    assert read(apic, TMCCT) == 750_000


def test_short_periods_are_stretched(board: Board, apic: Lapic) -> None:
    start(apic, PERIODIC, 1)
    assert board.timers.advance(1_000_000) == 5


def test_a_late_periodic_timer_fires_once_and_keeps_its_phase(board: Board, apic: Lapic) -> None:
    start(apic, PERIODIC, 1_000_000)
    board.timers.virtual.time_ns += 10_500_000
    assert board.timers.run_due() == 1
    assert fired(apic)
    assert read(apic, TMCCT) == 500_000


def test_changing_the_divisor_stretches_what_is_left(board: Board, apic: Lapic) -> None:
    start(apic, 0, 1_000_000)
    board.timers.advance(400_000)
    write(apic, TDCR, 0)
    assert read(apic, TMCCT) == 600_000
    board.timers.advance(1_199_999)
    assert not fired(apic)
    board.timers.advance(1)
    assert fired(apic)


def test_tsc_deadline(board: Board, apic: Lapic) -> None:
    """SDM, "TSC-Deadline Mode"."""
    apic.set_tsc_deadline(12345)
    assert apic.get_tsc_deadline() == 0
    start(apic, TSC_DEADLINE, 1000)
    assert read(apic, TMICT) == 0
    deadline = board.vcpus[0].guest_tsc() + 2000
    apic.set_tsc_deadline(deadline)
    assert (apic.get_tsc_deadline(), read(apic, TMCCT)) == (deadline, 0)
    board.timers.advance(999)
    assert not fired(apic)
    board.timers.advance(1)
    assert fired(apic)
    assert apic.get_tsc_deadline() == 0
    apic.set_tsc_deadline(1)
    assert fired(apic)
    apic.set_tsc_deadline(deadline * 2)
    apic.set_tsc_deadline(0)
    assert len(board.timers) == 0
    apic.set_tsc_deadline((1 << 64) - 1)
    write(apic, LVTT, 0xEF)
    assert len(board.timers) == 0
    assert apic.get_tsc_deadline() == 0


# ---- state ---------------------------------------------------------------------------------------------------


def test_state_moves_to_another_apic_with_its_timer() -> None:
    old, new = Board(), Board()
    apic = old.apics[0]
    start(apic, PERIODIC, 1_000_000)
    old.timers.advance(300_000)
    for vector, level in ((0x41, False), (0x60, True)):
        apic.accept_irq(0, vector, level_triggered=level)
    apic.get_interrupt()
    state = apic.get_state()
    assert new.apics[0].set_state(state)
    assert bytes(new.apics[0].get_state()) == bytes(state)
    assert new.vcpus[0].kicks
    assert new.apics[0].isr == 1 << 0x60
    new.timers.advance(699_999)
    assert read(new.apics[0], TMCCT) == 1
    new.timers.advance(1)
    assert new.apics[0].irr == 1 << 0x41 | 1 << 0xEF


def test_a_finished_single_shot_ends_again_when_it_is_restored(board: Board, apic: Lapic) -> None:
    """As in KVM: better one too many than one lost."""
    start(apic, 0, 1000)
    board.timers.advance(1000)
    assert fired(apic)
    assert apic.set_state(apic.get_state())
    board.timers.advance(0)
    assert fired(apic)


def test_setting_the_page_keeps_a_deadline(board: Board, apic: Lapic) -> None:
    start(apic, TSC_DEADLINE, 0)
    apic.set_tsc_deadline(board.vcpus[0].guest_tsc() + 2000)
    assert apic.set_state(apic.get_state())
    board.timers.advance(1000)
    assert fired(apic)


@pytest.mark.parametrize("wide", [False, True])
def test_the_x2apic_id_in_the_page(wide: bool) -> None:
    """KVM_CAP_X2APIC_API: KVM_X2APIC_API_USE_32BIT_IDS."""
    board = Board(vcpus=4)
    board.irqs.x2apic_format = wide
    apic = board.apics[3]
    to_x2apic(apic)
    page = bytearray(apic.get_state())
    assert page[ID : ID + 4].hex() == ("03000000" if wide else "00000003")
    page[ID : ID + 4] = b"\x09\0\0\0"
    assert apic.set_state(kvm_lapic_state.from_buffer_copy(page)) is not wide
    assert (apic.read_msr(0x802), apic.read_msr(0x80D)) == (3, 8)


# ---- anything at all -----------------------------------------------------------------------------------------

offsets = st.sampled_from(range(0, 0x400, 0x10)) | st.integers(0, 0xFFF)
values = st.integers(0, 0xFFFFFFFF) | st.sampled_from([0, 0x1FF, 0xC0041, 0x40041, 0x200EF, 0x400EF, 0xEF])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("mmio"), offsets, values),
        st.tuples(st.just("mmio"), st.sampled_from(range(0, 0x400, 0x10)), values),
        st.tuples(st.just("read"), offsets, st.sampled_from([1, 2, 3, 4, 8])),
        st.tuples(st.just("wrmsr"), st.integers(0x800, 0x8FF), st.integers(0, (1 << 64) - 1) | values),
        st.tuples(st.just("rdmsr"), st.integers(0x800, 0x8FF), st.just(0)),
        st.tuples(st.just("base"), st.just(0), st.sampled_from([0xFEE00900, 0xFEE00D00, 0xFEE00100, 0xFED00900])),
        st.tuples(st.just("irq"), st.integers(0, 7), st.integers(0, 255)),
        st.tuples(st.just("get"), st.just(0), st.just(0)),
        st.tuples(st.just("eoi"), st.just(0), st.just(0)),
        st.tuples(st.just("cr8"), st.just(0), st.integers(0, 15)),
        st.tuples(st.just("deadline"), st.just(0), st.integers(0, (1 << 64) - 1)),
        st.tuples(st.just("time"), st.just(0), st.integers(0, 1 << 33)),
        st.tuples(st.just("events"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


def play(board: Board, sequence: list[tuple[str, int, int]], sane: bool = True) -> None:
    """Do all of *sequence*; *sane* unless user space has set pending vectors that no APIC can have."""
    apic = board.apics[0]
    for kind, place, value in sequence:
        match kind:
            case "mmio":
                apic.mmio_write(apic.base_address + place, 4, value)
            case "read":
                shown = apic.mmio_read(apic.base_address + place, value)
                assert shown is not None
                assert 0 <= shown < 1 << 8 * value
            case "wrmsr":
                apic.write_msr(place, value)
            case "rdmsr":
                apic.read_msr(place)
            case "base":
                apic.set_base(value)
            case "irq":
                apic.accept_irq(place, value, level_triggered=bool(value & 1))
            case "get":
                expected = apic.has_interrupt()
                assert apic.get_interrupt() == expected
            case "eoi":
                highest = apic.isr.bit_length() - 1 if apic.isr else None
                assert apic.set_eoi() == highest
            case "cr8":
                apic.set_cr8(value)
            case "deadline":
                apic.set_tsc_deadline(value)
            case "time":
                board.timers.advance(value)
            case _:
                apic.accept_events()
        assert len(board.timers) <= 1
        if sane:
            consistent(apic)


def consistent(apic: Lapic) -> None:
    """What always holds."""
    in_service = apic.isr.bit_length() - 1 if apic.isr else 0
    tpr = apic.register(TPR)
    assert apic.ppr >> 4 == max(tpr >> 4, in_service >> 4)
    vector = apic.has_interrupt()
    if vector is not None:
        assert vector >> 4 > apic.ppr >> 4
        assert apic.irr >> vector == 1
    assert all(vectors >> 256 == 0 for vectors in (apic.irr, apic.isr, apic.tmr))
    assert apic.register(TMCCT) <= apic.register(TMICT)


@given(steps)
def test_any_sequence_is_survived(sequence: list[tuple[str, int, int]]) -> None:
    board = Board(vcpus=2)
    play(board, sequence)
    apic = board.apics[0]
    assert (apic.irr | apic.isr) & 0xFFFF == 0
    state = apic.get_state()
    assert apic.set_state(state)
    assert bytes(apic.get_state()) == bytes(state) or state_without_count(state) == state_without_count(
        apic.get_state()
    )


def state_without_count(state: kvm_lapic_state) -> bytes:
    """A single shot that has ended, or a period at its end, begins again."""
    page = bytearray(state)
    page[TMCCT : TMCCT + 4] = bytes(4)
    return bytes(page)


@given(st.binary(min_size=1024, max_size=1024), st.booleans(), steps)
def test_any_state_that_user_space_sets_is_survived(
    page: bytes, x2apic: bool, sequence: list[tuple[str, int, int]]
) -> None:
    board = Board()
    apic = board.apics[0]
    if x2apic:
        to_x2apic(apic)
    assert apic.set_state(kvm_lapic_state.from_buffer_copy(page))
    first = state_without_count(apic.get_state())
    assert apic.set_state(apic.get_state())
    assert state_without_count(apic.get_state()) == first
    play(board, sequence, sane=False)
