"""Routing, messages, IPIs, and what a vCPU asks."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.kvm.soft.apicdef import LapicIrq
from vmonty.kvm.soft.irq_comm import KVM_MAX_IRQ_ROUTES, default_routing
from vmonty.kvm.uapi.irq import kvm_irq_routing_entry, kvm_msi

from .board import Board, msi_route, pin_route, to_x2apic, write

MSI = 0xFEE00000


@pytest.fixture
def board() -> Board:
    return Board()


def takers(board: Board) -> list[int]:
    """Which vCPUs have something, which is then taken and ended."""
    found = []
    for number, apic in enumerate(board.apics):
        if apic.get_interrupt() is not None:
            apic.set_eoi()
            found.append(number)
    return found


# ---- routing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gsi", range(24))
def test_the_default_is_one_to_one(board: Board, gsi: int) -> None:
    """KVM_CREATE_IRQCHIP: no override of GSI 0; the results are those of a new VM on Linux's KVM."""
    first, second, down = (board.irqs.set_irq(gsi, level, line_status=True) for level in (1, 1, 0))
    assert (first, second, down) == ((1, 1, 2) if gsi < 16 else (-1, 0, 1))
    board.irqs.set_irq(gsi, 1)
    assert board.ioapic.irr == 1 << gsi


def test_unknown_gsis_go_nowhere(board: Board) -> None:
    assert board.irqs.set_irq(24, 1) == board.irqs.set_irq(1 << 31, 1) == -1


def bad(entry: kvm_irq_routing_entry, **fields: int) -> kvm_irq_routing_entry:
    for name, value in fields.items():
        setattr(entry, name, value)
    return entry


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([bad(pin_route(0, 2, 0), gsi=4096)], id="GSI too large"),
        pytest.param([bad(pin_route(0, 2, 0), flags=1)], id="flags of a pin"),
        pytest.param([bad(msi_route(0, MSI, 0x30), flags=2)], id="unknown flags of a message"),
        pytest.param([bad(pin_route(0, 2, 0), type=3)], id="s390's adapters"),
        pytest.param([bad(pin_route(0, 2, 0), type=0)], id="no type"),
        pytest.param([pin_route(0, 3, 0)], id="no such chip"),
        pytest.param([pin_route(0, 2, 24)], id="no such pin of the I/O APIC"),
        pytest.param([pin_route(0, 0, 8)], id="no such pin of the PIC"),
        pytest.param([pin_route(0, 2, 0), pin_route(0, 2, 1)], id="two pins of one chip"),
        pytest.param([pin_route(0, 2, 0), msi_route(0, MSI, 0x30)], id="a pin and a message"),
        pytest.param([msi_route(0, MSI, 0x30), msi_route(0, MSI, 0x31)], id="two messages"),
        pytest.param([pin_route(0, 2, 0)] * (KVM_MAX_IRQ_ROUTES + 1), id="too many"),
    ],
)
def test_bad_routes_change_nothing(board: Board, entries: Sequence[kvm_irq_routing_entry]) -> None:
    with pytest.raises(OSError) as caught:
        board.irqs.set_routing([pin_route(30, 2, 5), *entries])
    assert caught.value.errno == errno.EINVAL
    assert board.irqs.set_irq(30, 1) == -1
    assert board.irqs.set_irq(1, 1) == 1


def test_a_pc_moves_the_timer_to_pin_2(board: Board) -> None:
    """What QEMU and kvmtool do: GSI 0 to the PIC's 0 and the I/O APIC's 2."""
    routes = [entry for entry in default_routing() if entry.gsi not in (0, 2)]
    board.irqs.set_routing([*routes, pin_route(0, 0, 0), pin_route(0, 2, 2), pin_route(2, 0, 2)])
    acked: list[int] = []
    board.irqs.register_ack_notifier(0, lambda: acked.append(1))
    board.redirect(2, 0x30)
    assert board.irqs.set_irq(0, 1) == 2
    assert takers(board) == [0]
    assert acked == [1]


def test_a_slaves_pin_is_counted_over_both_chips(board: Board) -> None:
    board.irqs.set_routing([pin_route(77, 1, 3)])
    board.irqs.set_irq(77, 1)
    assert board.pic.get_state(1).irr == 8
    acked: list[int] = []
    board.irqs.register_ack_notifier(77, lambda: acked.append(1))
    board.irqs.notify_acked(1, 11)
    assert acked == [1]
    assert board.irqs.has_ack_notifier(1, 11)
    assert not board.irqs.has_ack_notifier(1, 3)


def test_a_message_is_routed_by_its_rising_edge(board: Board) -> None:
    board.irqs.set_routing([msi_route(40, MSI, 0x41)])
    assert board.irqs.set_irq(40, 0) == -1
    assert board.irqs.set_irq(40, 1) == 1
    assert takers(board) == [0]


def test_notifiers_can_be_taken_away(board: Board) -> None:
    def never(*_: object) -> None:
        pytest.fail("unregistered")

    board.irqs.register_ack_notifier(5, never)
    board.irqs.unregister_ack_notifier(5, never)
    board.irqs.register_mask_notifier(5, never)
    board.irqs.unregister_mask_notifier(5, never)
    board.redirect(5, 0x35)
    board.irqs.set_irq(5, 1)
    takers(board)


# ---- messages ------------------------------------------------------------------------------------------------


def signal(board: Board, address: int, data: int, flags: int = 0) -> int:
    return board.irqs.signal_msi(
        kvm_msi(address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=data, flags=flags)
    )


@pytest.mark.parametrize(
    ("address", "data", "found"),
    [
        pytest.param(MSI | 1 << 12, 0x30, [1], id="physical"),
        pytest.param(MSI | 0xFF << 12, 0x30, [0, 1, 2], id="broadcast"),
        pytest.param(MSI | 6 << 12 | 4, 0x30, [1, 2], id="logical"),
        pytest.param(MSI | 9 << 12, 0x30, [], id="nobody"),
        pytest.param(MSI | 6 << 12 | 4, 0x130, [1], id="lowest priority: vector modulo 2"),
        pytest.param(MSI | 6 << 12 | 4, 0x131, [2], id="lowest priority: the other"),
        pytest.param(MSI | 6 << 12 | 12, 0x31, [2], id="redirection hint"),
    ],
)
def test_messages(address: int, data: int, found: list[int]) -> None:
    """SDM, "Message Address Register Format", "Message Data Register Format"."""
    board = Board(vcpus=3)
    for apic, ldr in zip(board.apics, (1, 2, 4), strict=True):
        write(apic, 0xD0, ldr << 24)
    assert signal(board, address, data) == len(found)
    assert takers(board) == found


def test_round_robin_without_vector_hashing() -> None:
    board = Board(vcpus=3)
    board.irqs.vector_hashing = False
    for apic in board.apics:
        write(apic, 0xD0, 1 << 24 + apic.owner.vcpu_id)
    order = []
    for _ in range(6):
        assert signal(board, MSI | 7 << 12 | 4, 0x130) == 1
        order += takers(board)
    assert order == [0, 1, 2, 0, 1, 2]


def test_cluster_model() -> None:
    """SDM, "Logical Destination Mode", hierarchical."""
    board = Board(vcpus=3)
    for apic, ldr in zip(board.apics, (0x11, 0x12, 0x21), strict=True):
        write(apic, 0xE0, 0x0FFFFFFF)
        write(apic, 0xD0, ldr << 24)
    for dest, found in ((0x13, [0, 1]), (0x21, [2]), (0x22, []), (0xFF, [0, 1, 2])):
        signal(board, MSI | dest << 12 | 4, 0x30)
        assert takers(board) == found


def test_a_signal_needs_an_irqchip_and_a_destination() -> None:
    board = Board(vcpus=0)
    for attempt, code in (
        (lambda: signal(board, MSI, 0x30), errno.EPERM),
        (lambda: signal(board, MSI, 0x30, flags=2), errno.EINVAL),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == code
    board.irqs.ioapic = None
    with pytest.raises(OSError) as caught:
        signal(board, MSI, 0x30)
    assert caught.value.errno == errno.EINVAL


def test_destinations_of_32_bits() -> None:
    """KVM_X2APIC_API_USE_32BIT_IDS: the upper 24 bits in the address, whose lowest byte must be 0."""
    board = Board(vcpus=301)
    board.irqs.x2apic_format = True
    to_x2apic(board.apics[300])
    assert signal(board, 0x100 << 32 | MSI | (300 & 0xFF) << 12, 0x30) == 1
    assert takers(board) == [300]
    with pytest.raises(OSError) as caught:
        signal(board, 0x101 << 32 | MSI, 0x30)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError) as caught:
        board.irqs.set_routing([msi_route(1, 1 << 32 | MSI, 0x30)])
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(("disabled", "found"), [(False, [0, 1]), (True, [])])
def test_the_broadcast_quirk(disabled: bool, found: list[int]) -> None:
    """KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK: 0xFF is an ID like any other for x2APICs."""
    board = Board(vcpus=2)
    board.irqs.x2apic_broadcast_quirk_disabled = disabled
    for apic in board.apics:
        to_x2apic(apic)
    assert signal(board, MSI | 0xFF << 12, 0x30) == len(found)
    assert takers(board) == found


# ---- IPIs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x2apic", [False, True])
@pytest.mark.parametrize(
    ("low", "dest", "found"),
    [
        pytest.param(0x00040, 2, [2], id="physical"),
        pytest.param(0x40040, 0, [1], id="self"),
        pytest.param(0x80040, 0, [0, 1, 2], id="all including self"),
        pytest.param(0xC0040, 0, [0, 2], id="all excluding self"),
        pytest.param(0x00840, 0b101, [0, 2], id="logical"),
        pytest.param(0x00040, 99, [], id="nobody"),
    ],
)
def test_ipis(x2apic: bool, low: int, dest: int, found: list[int]) -> None:
    """SDM, "Interrupt Command Register (ICR)", "Determining IPI Destination"."""
    board = Board(vcpus=3)
    source = board.apics[1]
    for apic in board.apics:
        if x2apic:
            to_x2apic(apic)
        else:
            write(apic, 0xD0, 1 << 24 + apic.owner.vcpu_id)
    if x2apic:
        assert source.write_msr(0x830, dest << 32 | low)
    else:
        write(source, 0x310, dest << 24)
        write(source, 0x300, low)
    assert takers(board) == found


def test_broadcast_ipis() -> None:
    board = Board(vcpus=3)
    write(board.apics[0], 0x310, 0xFF << 24)
    write(board.apics[0], 0x300, 0x40)
    assert takers(board) == [0, 1, 2]
    for apic in board.apics:
        to_x2apic(apic)
    board.apics[0].write_msr(0x830, 0xFF << 32 | 0x40)
    assert takers(board) == []
    board.apics[0].write_msr(0x830, 0xFFFFFFFF << 32 | 0x40)
    assert takers(board) == [0, 1, 2]


def test_starting_a_processor() -> None:
    """SDM, "MP Initialization Protocol Algorithm for MP Systems": INIT, SIPI, SIPI."""
    board = Board(vcpus=2, on=False)
    write(board.apics[0], 0x310, 1 << 24)
    for low in (0xC500, 0x8500, 0x4608, 0x4608):
        write(board.apics[0], 0x300, low)
    board.apics[1].accept_events()
    assert board.vcpus[1].events == ["init", ("sipi", 8)]
    assert board.vcpus[0].events == []


def test_apics_that_are_off_get_nothing() -> None:
    board = Board(vcpus=2)
    assert board.apics[1].set_base(0xFEE00000)
    assert board.irqs.deliver_to_apics(LapicIrq(vector=0x40, shorthand=2)) == 1
    assert board.irqs.deliver_to_apics(LapicIrq(vector=0, delivery_mode=4, dest_id=1)) == 0
    assert board.irqs.deliver_to_apics(LapicIrq(vector=0x40, shorthand=1)) == -1


# ---- what a vCPU asks ----------------------------------------------------------------------------------------


def test_the_pic_comes_first(board: Board) -> None:
    apic, vcpu = board.apics[0], board.vcpus[0]
    for value in (0x11, 0x20, 4, 1):
        board.buses.pio.write(0x20 + (value != 0x11), 1, value)
    write(apic, 0x350, 0x700)
    apic.accept_irq(0, 0x80)
    kicks = vcpu.kicks
    board.irqs.set_irq(1, 1)
    assert vcpu.kicks == kicks + 1
    assert board.irqs.has_extint(apic)
    assert [board.irqs.get_interrupt(apic) for _ in range(3)] == [0x21, 0x80, None]
    assert not board.irqs.has_interrupt(apic)


def test_only_an_apic_that_listens_hears_the_pic() -> None:
    board = Board(vcpus=2)
    write(board.apics[0], 0x350, 1 << 16 | 0x700)
    write(board.apics[1], 0x350, 0x700)
    board.irqs.set_irq(3, 1)
    assert (board.vcpus[0].kicks, board.vcpus[1].kicks) == (0, 1)
    assert not board.irqs.has_interrupt(board.apics[0])


# ---- split irqchip -------------------------------------------------------------------------------------------


def test_split_irqchip() -> None:
    """KVM_CAP_SPLIT_IRQCHIP: messages only; user space sees EOIs of its level-triggered pins."""
    board = Board(split=24)
    assert board.irqs.in_kernel
    with pytest.raises(OSError) as caught:
        board.irqs.set_routing([pin_route(0, 2, 0)])
    assert caught.value.errno == errno.EINVAL
    board.irqs.set_routing([msi_route(5, MSI, 0x8035), msi_route(6, MSI, 0x36), msi_route(30, MSI, 0x8037)])
    for gsi, events in ((6, []), (30, []), (5, [("eoi", 0x35)])):
        assert board.irqs.set_irq(gsi, 1) == 1
        assert takers(board) == [0]
        assert board.vcpus[0].events == events


@given(st.lists(st.binary(min_size=48, max_size=48), max_size=5), st.integers(0, 4100), st.booleans())
def test_any_routing_is_taken_or_refused(table: list[bytes], gsi: int, wide: bool) -> None:
    board = Board(vcpus=2)
    board.irqs.x2apic_format = wide
    entries = [kvm_irq_routing_entry.from_buffer_copy(row) for row in table]
    for entry in entries:
        entry.gsi &= 0x1FFF
        entry.type %= 4
        entry.flags &= 1
    with contextlib.suppress(OSError):
        board.irqs.set_routing(entries)
    for number in (gsi, *(entry.gsi for entry in entries)):
        assert board.irqs.set_irq(number, 1) >= -1
        assert board.irqs.set_irq(number, 0) >= -1


@given(
    st.integers(0, 255), st.integers(0, 7), st.booleans(), st.integers(0, 0xFFFFFFFF) | st.integers(0, 255),
    st.integers(0, 3), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_message_has_a_result(
    vector: int, mode: int, logical: bool, dest: int, shorthand: int, hint: bool, level: bool, from_apic: bool
) -> None:
    board = Board(vcpus=3)
    to_x2apic(board.apics[2])
    irq = LapicIrq(vector, mode, logical, dest, 1, level, shorthand, hint)
    assert -1 <= board.irqs.deliver_to_apics(irq, board.apics[0] if from_apic else None) <= 3
