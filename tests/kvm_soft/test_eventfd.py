"""irqfd and ioeventfd on real eventfds. Waits are for events, with a limit that only a failure reaches."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import select
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vmonty.kvm.soft.eventfd import IoEventfds, Irqfds, eventfd_id
from vmonty.kvm.soft.iodev import KvmIoBuses
from vmonty.kvm.uapi.irq import kvm_ioeventfd, kvm_irqfd

from .board import Board, write

LIMIT_S = 30.0
DEASSIGN, RESAMPLE = 1, 2
DATAMATCH, PIO, IO_DEASSIGN = 1, 2, 4
LEVEL = 1 << 15


@pytest.fixture
def files() -> Iterator[Callable[[], int]]:
    """A factory of eventfds, all closed afterwards."""
    opened: list[int] = []

    def make() -> int:
        opened.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def irqfds(board: Board) -> Iterator[Irqfds]:
    made = Irqfds(board.irqs)
    yield made
    made.close()


def until(condition: Callable[[], bool]) -> None:
    """Let the irqfd thread work until *condition* holds."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0)


def count(fd: int) -> int:
    """What the eventfd has; 0 when it was not signalled."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def refusal(call: Callable[[], None]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def open_files() -> int:
    gc.collect()  # what earlier tests left in cycles would close its files meanwhile
    return len(os.listdir("/proc/self/fd"))


def test_identity(files: Callable[[], int]) -> None:
    one, other = files(), files()
    copy = os.dup(one)
    try:
        assert eventfd_id(one) == eventfd_id(copy) != eventfd_id(other)
    finally:
        os.close(copy)
    reader, writer = os.pipe()
    for fd, code in ((reader, errno.EINVAL), (-1, errno.EBADF), (1 << 20, errno.EBADF)):
        assert refusal(lambda fd=fd: eventfd_id(fd)) == code
    os.close(reader)
    os.close(writer)


# ---- irqfd ---------------------------------------------------------------------------------------------------


def test_a_write_raises_the_gsi(board: Board, irqfds: Irqfds, files: Callable[[], int]) -> None:
    fd = files()
    board.redirect(5, 0x35)
    irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5))
    for _ in range(3):
        os.eventfd_write(fd, 1)
        until(lambda: board.apics[0].get_interrupt() == 0x35)
        board.apics[0].set_eoi()
    assert count(fd) == 0
    assert board.ioapic.irr == 0


def test_what_was_written_before_counts(board: Board, irqfds: Irqfds, files: Callable[[], int]) -> None:
    fd = files()
    board.redirect(5, 0x35)
    os.eventfd_write(fd, 3)
    irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5))
    until(lambda: board.apics[0].has_interrupt() == 0x35)


def test_a_signal_raises_the_gsi_at_once(board: Board, irqfds: Irqfds, files: Callable[[], int]) -> None:
    fd, other = files(), files()
    board.redirect(5, 0x35)
    irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5))
    assert irqfds.signal(fd)
    assert board.apics[0].get_interrupt() == 0x35
    board.apics[0].set_eoi()
    assert not irqfds.signal(other)
    irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5, flags=DEASSIGN))
    assert not irqfds.signal(fd)
    assert board.apics[0].has_interrupt() is None


def test_our_duplicate_outlives_the_callers(board: Board, irqfds: Irqfds) -> None:
    fd = os.eventfd(0)
    other = os.dup(fd)
    board.redirect(5, 0x35)
    irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5))
    os.close(fd)
    os.eventfd_write(other, 1)
    os.close(other)
    until(lambda: board.apics[0].has_interrupt() == 0x35)


def test_an_eventfd_is_used_once(irqfds: Irqfds, files: Callable[[], int]) -> None:
    fd = files()
    copy = os.dup(fd)
    irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5))
    assert refusal(lambda: irqfds.irqfd(kvm_irqfd(fd=copy, gsi=6))) == errno.EBUSY
    # Another GSI is no match, and deassigning what isn't there is no error.
    irqfds.irqfd(kvm_irqfd(fd=copy, gsi=6, flags=DEASSIGN))
    assert refusal(lambda: irqfds.irqfd(kvm_irqfd(fd=copy, gsi=6))) == errno.EBUSY
    irqfds.irqfd(kvm_irqfd(fd=copy, gsi=5, flags=DEASSIGN))
    irqfds.irqfd(kvm_irqfd(fd=copy, gsi=6))
    os.close(copy)


def test_refusals(board: Board, irqfds: Irqfds, files: Callable[[], int]) -> None:
    fd = files()
    assert refusal(lambda: irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5, flags=4))) == errno.EINVAL
    assert refusal(lambda: irqfds.irqfd(kvm_irqfd(fd=9999, gsi=5))) == errno.EBADF
    assert refusal(lambda: irqfds.irqfd(kvm_irqfd(fd=9999, gsi=5, flags=DEASSIGN))) == errno.EBADF
    assert refusal(lambda: irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5, flags=RESAMPLE, resamplefd=9999))) == errno.EBADF
    board.irqs.ioapic = None
    assert refusal(lambda: irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5))) == errno.EINVAL
    assert irqfds._thread is None


def test_nothing_comes_after_deassign(board: Board, irqfds: Irqfds, files: Callable[[], int]) -> None:
    fd, other = files(), files()
    board.redirect(5, 0x35)
    board.redirect(6, 0x46)
    irqfds.irqfd(kvm_irqfd(fd=other, gsi=6))
    irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5))
    with board.irqs.lock:
        os.eventfd_write(fd, 1)
        irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5, flags=DEASSIGN))
    os.eventfd_write(other, 1)
    until(lambda: board.apics[0].get_interrupt() == 0x46)
    board.apics[0].set_eoi()
    assert board.apics[0].has_interrupt() is None
    assert count(fd) == 1


def test_resampling(board: Board, irqfds: Irqfds, files: Callable[[], int]) -> None:
    """KVM_IRQFD_FLAG_RESAMPLE: the line stays up until the guest's EOI, of which both devices are told."""
    apic = board.apics[0]
    board.redirect(10, LEVEL | 0x4A)
    pairs = [(files(), files()) for _ in range(2)]
    for fd, resample in pairs:
        irqfds.irqfd(kvm_irqfd(fd=fd, gsi=10, flags=RESAMPLE, resamplefd=resample))
    os.eventfd_write(pairs[0][0], 1)
    until(lambda: apic.get_interrupt() == 0x4A)
    assert board.ioapic.irr == 1 << 10
    assert [count(resample) for _, resample in pairs] == [0, 0]
    write(apic, 0xB0, 0)
    assert board.ioapic.irr == 0
    assert [count(resample) for _, resample in pairs] == [1, 1]
    os.eventfd_write(pairs[1][0], 1)
    until(lambda: apic.has_interrupt() == 0x4A)
    # The line goes down with the last of them.
    irqfds.irqfd(kvm_irqfd(fd=pairs[1][0], gsi=10, flags=DEASSIGN))
    assert board.ioapic.irr == 1 << 10
    irqfds.irqfd(kvm_irqfd(fd=pairs[0][0], gsi=10, flags=DEASSIGN))
    assert board.ioapic.irr == 0
    assert not board.irqs.has_ack_notifier(2, 10)


def test_a_full_resamplefd_does_not_block(board: Board, irqfds: Irqfds, files: Callable[[], int]) -> None:
    fd, resample = files(), os.eventfd(0)
    board.redirect(10, LEVEL | 0x4A)
    irqfds.irqfd(kvm_irqfd(fd=fd, gsi=10, flags=RESAMPLE, resamplefd=resample))
    os.eventfd_write(resample, (1 << 64) - 2)
    os.eventfd_write(fd, 1)
    until(lambda: board.apics[0].get_interrupt() == 0x4A)
    write(board.apics[0], 0xB0, 0)
    assert board.ioapic.irr == 0
    os.close(resample)


def test_close_ends_the_thread_and_leaves_no_file(files: Callable[[], int]) -> None:
    board = Board()
    fd, resample = files(), files()
    before, threads = open_files(), threading.active_count()
    irqfds = Irqfds(board.irqs)
    irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5, flags=RESAMPLE, resamplefd=resample))
    assert threading.active_count() == threads + 1
    irqfds.close()
    irqfds.close()
    assert (open_files(), threading.active_count()) == (before, threads)
    assert refusal(lambda: irqfds.irqfd(kvm_irqfd(fd=fd, gsi=5))) == errno.EINVAL


def test_many_irqfds_while_they_come_and_go(board: Board, irqfds: Irqfds, files: Callable[[], int]) -> None:
    board.redirect(5, 0x35)
    fds = [files() for _ in range(20)]
    stop = threading.Event()

    def shake() -> None:
        while not stop.is_set():
            for fd in fds[1:]:
                irqfds.irqfd(kvm_irqfd(fd=fd, gsi=6))
                os.eventfd_write(fd, 1)
                irqfds.irqfd(kvm_irqfd(fd=fd, gsi=6, flags=DEASSIGN))

    irqfds.irqfd(kvm_irqfd(fd=fds[0], gsi=5))
    thread = threading.Thread(target=shake)
    thread.start()
    try:
        for _ in range(200):
            os.eventfd_write(fds[0], 1)
            until(lambda: board.apics[0].get_interrupt() == 0x35)
            board.apics[0].set_eoi()
    finally:
        stop.set()
        thread.join()


# ---- ioeventfd -----------------------------------------------------------------------------------------------


@pytest.fixture
def buses() -> KvmIoBuses:
    return KvmIoBuses()


@pytest.fixture
def ioeventfds(buses: KvmIoBuses) -> Iterator[IoEventfds]:
    made = IoEventfds(buses)
    yield made
    made.close()


def doorbell(fd: int, address: int = 0x100, size: int = 2, flags: int = 0, datamatch: int = 0) -> kvm_ioeventfd:
    return kvm_ioeventfd(fd=fd, addr=address, len=size, flags=flags, datamatch=datamatch)


def test_a_matching_write_signals(buses: KvmIoBuses, ioeventfds: IoEventfds, files: Callable[[], int]) -> None:
    any_value, one_value, wildcard, port = (files() for _ in range(4))
    ioeventfds.ioeventfd(doorbell(any_value))
    ioeventfds.ioeventfd(doorbell(one_value, address=0x200, flags=DATAMATCH, datamatch=7))
    ioeventfds.ioeventfd(doorbell(wildcard, address=0x300, size=0))
    ioeventfds.ioeventfd(doorbell(port, flags=PIO))
    for bus, address, size, value, taken in (
        (buses.mmio, 0x100, 2, 0xFFFF, True),
        (buses.mmio, 0x100, 4, 0, False),
        (buses.mmio, 0x101, 1, 0, False),
        (buses.mmio, 0x200, 2, 7, True),
        (buses.mmio, 0x200, 2, 8, False),
        (buses.mmio, 0x300, 8, 1, True),
        (buses.fast_mmio, 0x300, 4, 0, True),
        (buses.mmio, 0x301, 1, 1, False),
        (buses.pio, 0x100, 2, 1, True),
    ):
        assert bus.write(address, size, value) is taken
    assert [count(fd) for fd in (any_value, one_value, wildcard, port)] == [1, 1, 2, 1]
    assert buses.mmio.read(0x100, 2) is None


def test_who_answers_at_once_is_not_signalled(
    buses: KvmIoBuses, ioeventfds: IoEventfds, files: Callable[[], int]
) -> None:
    bell, other = files(), files()
    ioeventfds.ioeventfd(doorbell(bell))
    ioeventfds.ioeventfd(doorbell(other, address=0x200))
    answers = [True, False]
    threads: list[int] = []

    def at_once() -> bool:
        threads.append(threading.get_ident())
        return answers.pop(0)

    ioeventfds.ring_at_once(bell, at_once)
    assert buses.mmio.write(0x100, 2, 0)
    assert count(bell) == 0
    assert buses.mmio.write(0x100, 2, 0)
    assert buses.mmio.write(0x200, 2, 0)
    assert [count(bell), count(other)] == [1, 1]
    assert threads == [threading.get_ident()] * 2
    ioeventfds.ioeventfd(doorbell(bell, flags=IO_DEASSIGN))
    ioeventfds.ioeventfd(doorbell(bell))
    assert buses.mmio.write(0x100, 2, 0)
    assert count(bell) == 1, "a new one is as it was made"


def test_many_doorbells_at_one_address(buses: KvmIoBuses, ioeventfds: IoEventfds, files: Callable[[], int]) -> None:
    """virtio: one register, a queue's number as data."""
    fds = [files() for _ in range(8)]
    for number, fd in enumerate(fds):
        ioeventfds.ioeventfd(doorbell(fd, flags=DATAMATCH, datamatch=number))
    assert not buses.mmio.write(0x100, 2, 8)
    for number in (3, 5, 3):
        assert buses.mmio.write(0x100, 2, number)
    assert [count(fd) for fd in fds] == [0, 0, 0, 2, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("first", "second", "collide"),
    [
        pytest.param({}, {}, True, id="the same"),
        pytest.param({}, {"flags": DATAMATCH}, True, id="any value and one value"),
        pytest.param({"flags": DATAMATCH}, {"flags": DATAMATCH, "datamatch": 1}, False, id="two values"),
        pytest.param({}, {"size": 4}, False, id="two sizes"),
        pytest.param({"size": 0}, {"size": 4}, True, id="any size and one size"),
        pytest.param({}, {"address": 0x102}, False, id="two addresses"),
        pytest.param({}, {"flags": PIO}, False, id="two buses"),
    ],
)
def test_collisions(
    ioeventfds: IoEventfds, files: Callable[[], int], first: dict[str, int], second: dict[str, int], collide: bool
) -> None:
    ioeventfds.ioeventfd(doorbell(files(), **first))
    refused = refusal(lambda: ioeventfds.ioeventfd(doorbell(files(), **second)))
    assert refused == (errno.EEXIST if collide else None)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 3},
        {"size": 16},
        {"size": 0, "flags": DATAMATCH},
        {"flags": 32},
        {"address": (1 << 64) - 1, "size": 2},
    ],
    ids=str,
)
def test_what_is_refused(ioeventfds: IoEventfds, files: Callable[[], int], fields: dict[str, int]) -> None:
    assert refusal(lambda: ioeventfds.ioeventfd(doorbell(files(), **fields))) == errno.EINVAL


def test_fds(ioeventfds: IoEventfds) -> None:
    assert refusal(lambda: ioeventfds.ioeventfd(doorbell(-1))) == errno.EBADF
    reader, writer = os.pipe()
    assert refusal(lambda: ioeventfds.ioeventfd(doorbell(reader))) == errno.EINVAL
    os.close(reader)
    os.close(writer)


def test_deassign_needs_all_of_it(buses: KvmIoBuses, ioeventfds: IoEventfds, files: Callable[[], int]) -> None:
    fd, other = files(), files()
    ioeventfds.ioeventfd(doorbell(fd, flags=DATAMATCH, datamatch=7))
    for wrong in (
        doorbell(other, flags=IO_DEASSIGN | DATAMATCH, datamatch=7),
        doorbell(fd, flags=IO_DEASSIGN | DATAMATCH, datamatch=8),
        doorbell(fd, flags=IO_DEASSIGN),
        doorbell(fd, size=4, flags=IO_DEASSIGN | DATAMATCH, datamatch=7),
        doorbell(fd, address=0, flags=IO_DEASSIGN | DATAMATCH, datamatch=7),
        doorbell(fd, flags=IO_DEASSIGN | DATAMATCH | PIO, datamatch=7),
    ):
        assert refusal(lambda wrong=wrong: ioeventfds.ioeventfd(wrong)) == errno.ENOENT
    assert buses.mmio.write(0x100, 2, 7)
    ioeventfds.ioeventfd(doorbell(fd, flags=IO_DEASSIGN | DATAMATCH, datamatch=7))
    assert not buses.mmio.write(0x100, 2, 7)


def test_a_doorbell_that_rings_while_it_goes_never_writes_to_another_file(buses: KvmIoBuses) -> None:
    """The number of a closed eventfd is soon another file's."""
    ioeventfds = IoEventfds(buses)
    stop = threading.Event()

    def ring() -> None:
        while not stop.is_set():
            buses.mmio.write(0x100, 2, 1)

    thread = threading.Thread(target=ring)
    thread.start()
    try:
        for _ in range(300):
            fd = os.eventfd(0)
            ioeventfds.ioeventfd(doorbell(fd))
            ioeventfds.ioeventfd(doorbell(fd, flags=IO_DEASSIGN))
            os.close(fd)
            innocent = os.eventfd(0)
            assert not select.select([innocent], [], [], 0)[0]
            os.close(innocent)
    finally:
        stop.set()
        thread.join()
        ioeventfds.close()


def test_a_full_counter_does_not_block(buses: KvmIoBuses, ioeventfds: IoEventfds) -> None:
    fd = os.eventfd((1 << 32) - 1)
    with contextlib.closing(os.fdopen(fd, "rb", closefd=True)):
        os.eventfd_write(fd, (1 << 64) - 2 - ((1 << 32) - 1))
        ioeventfds.ioeventfd(doorbell(fd))
        assert buses.mmio.write(0x100, 2, 1)


def test_close_leaves_no_file(buses: KvmIoBuses, files: Callable[[], int]) -> None:
    fd = files()
    before = open_files()
    ioeventfds = IoEventfds(buses)
    ioeventfds.ioeventfd(doorbell(fd))
    ioeventfds.close()
    assert open_files() == before
    assert not buses.mmio.write(0x100, 2, 1)
