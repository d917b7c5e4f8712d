"""irqfd and ioeventfd. Source: api.rst, KVM_IRQFD, KVM_IOEVENTFD."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator

import pytest

from vmonty.kvm.api import Vm
from vmonty.kvm.uapi import Cap, Exit
from vmonty.testing.guests import MMIO, Mode, TinyGuest

from .irq_guests import EOI_LEVEL, GSI, LINE_VECTOR, interrupted, ioapic_guest
from .refusals import refused

WAIT_MS = 20_000
PORT = 0x4560


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def other_event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def count(fd: int) -> int:
    """How often *fd* was signalled since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def wait(fd: int) -> int:
    """Wait until *fd* is signalled; return its count."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(WAIT_MS), "the eventfd was not signalled"
    return os.eventfd_read(fd)


class TestIrqfd:
    def test_write_interrupts_the_guest(self, chipped: TinyGuest, event: int) -> None:
        ioapic_guest(chipped)
        chipped.vm.irqfd(event, GSI)
        assert chipped.out()[0] == 0x10
        os.eventfd_write(event, 1)
        assert interrupted(chipped) == LINE_VECTOR
        assert chipped.out()[0] == 0x10, "one write, one interrupt"
        os.eventfd_write(event, 3)
        assert interrupted(chipped) == LINE_VECTOR
        assert chipped.out()[0] == 0x10

    def test_signalled_before_it_was_assigned(self, chipped: TinyGuest, event: int) -> None:
        """A pending event counts at once."""
        ioapic_guest(chipped)
        assert chipped.out()[0] == 0x10
        os.eventfd_write(event, 1)
        chipped.vm.irqfd(event, GSI)
        assert interrupted(chipped) == LINE_VECTOR

    def test_deassign(self, chipped: TinyGuest, event: int) -> None:
        ioapic_guest(chipped)
        chipped.vm.irqfd(event, GSI)
        assert chipped.out()[0] == 0x10
        chipped.vm.irqfd(event, GSI, deassign=True)
        os.eventfd_write(event, 1)
        assert chipped.out()[0] == 0x10
        assert count(event) == 1, "nobody else took it"

    def test_one_eventfd_twice(self, chipped: TinyGuest, event: int) -> None:
        chipped.vm.irqfd(event, GSI)
        with refused(errno.EBUSY):
            chipped.vm.irqfd(event, GSI)

    def test_closed_fd(self, chipped: TinyGuest) -> None:
        with refused(errno.EBADF):
            chipped.vm.irqfd(9999, GSI)

    def test_fd_that_is_no_eventfd(self, chipped: TinyGuest) -> None:
        with refused(errno.EINVAL):
            chipped.vm.irqfd(chipped.ram.fileno(), GSI)

    def test_without_irqchip(self, configured: Vm, event: int) -> None:
        with refused(errno.EINVAL, errno.EAGAIN):
            configured.irqfd(event, GSI)

    @pytest.mark.known_gap("apic-isr")
    @pytest.mark.needs(Cap.IRQFD_RESAMPLE)
    def test_resample(self, chipped: TinyGuest, event: int, other_event: int) -> None:
        """A level: it stays up until the guest's EOI, which lowers it and signals the second eventfd."""
        ioapic_guest(chipped, level=True)
        chipped.vm.irqfd(event, GSI, resamplefd=other_event)
        assert chipped.out()[0] == 0x10
        os.eventfd_write(event, 1)
        assert interrupted(chipped) == LINE_VECTOR
        assert count(other_event) == 0
        assert chipped.out()[0] == EOI_LEVEL
        assert wait(other_event) == 1
        assert chipped.out()[0] == 0x10, "the line is down again"
        os.eventfd_write(event, 1)
        assert interrupted(chipped) == LINE_VECTOR

    @pytest.mark.needs(Cap.IRQFD_RESAMPLE)
    def test_resample_with_a_bad_second_fd(self, chipped: TinyGuest, event: int) -> None:
        with refused(errno.EBADF):
            chipped.vm.irqfd(event, GSI, resamplefd=9999)


STORE = {1: "al", 2: "ax", 4: "eax", 8: "rax"}
AFTER = "\n mov al, 0x77\n out 0x10, al"


class TestIoeventfd:
    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_port(self, guest: TinyGuest, event: int, size: int) -> None:
        """The write signals and does not exit."""
        guest.vm.ioeventfd(event, PORT, size, pio=True)
        guest.load(Mode.LONG, f"mov dx, {PORT:#x}\n out dx, {STORE[size]}\n out dx, {STORE[size]}{AFTER}")
        assert guest.out() == (0x10, 0x77)
        assert count(event) == 2

    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_mmio(self, guest: TinyGuest, event: int, size: int) -> None:
        guest.vm.ioeventfd(event, MMIO + 16, size)
        guest.load(Mode.LONG, f"mov [abs {MMIO + 16:#x}], {STORE[size]}{AFTER}")
        assert guest.out() == (0x10, 0x77)
        assert count(event) == 1

    def test_another_size_exits(self, guest: TinyGuest, event: int) -> None:
        guest.vm.ioeventfd(event, PORT, 2, pio=True)
        guest.load(Mode.LONG, f"mov dx, {PORT:#x}\n out dx, al{AFTER}")
        assert guest.out()[0] == PORT
        assert count(event) == 0

    def test_read_exits(self, guest: TinyGuest, event: int) -> None:
        guest.vm.ioeventfd(event, PORT, 1, pio=True)
        guest.load(Mode.LONG, f"mov dx, {PORT:#x}\n in al, dx{AFTER}")
        assert guest.run() is Exit.IO
        assert guest.vcpu.kvm_run.u.io.direction == 0
        assert count(event) == 0

    @pytest.mark.parametrize("pio", [True, False], ids=["port", "mmio"])
    def test_datamatch(self, guest: TinyGuest, event: int, other_event: int, pio: bool) -> None:
        """Two values of one address signal two eventfds; a third exits."""
        address = PORT if pio else MMIO
        guest.vm.ioeventfd(event, address, 2, datamatch=1, pio=pio)
        guest.vm.ioeventfd(other_event, address, 2, datamatch=2, pio=pio)
        store = f"mov dx, {PORT:#x}\n out dx, ax\n" if pio else f"mov [abs {MMIO:#x}], ax\n"
        guest.load(Mode.LONG, "".join(f"mov eax, {value}\n {store}" for value in (1, 2, 2, 3)))
        if pio:
            assert guest.out() == (PORT, 3)
        else:
            assert guest.run() is Exit.MMIO
            assert guest.vcpu.kvm_run.u.mmio.data[0] == 3
        assert (count(event), count(other_event)) == (1, 2)

    @pytest.mark.needs(Cap.IOEVENTFD_ANY_LENGTH)
    def test_any_length_mmio(self, guest: TinyGuest, event: int) -> None:
        guest.vm.ioeventfd(event, MMIO, 0)
        stores = "\n".join(f"mov [abs {MMIO:#x}], {register}" for register in STORE.values())
        guest.load(Mode.LONG, stores + AFTER)
        assert guest.out() == (0x10, 0x77)
        assert count(event) == 4

    @pytest.mark.needs(Cap.IOEVENTFD_ANY_LENGTH)
    def test_any_length_port(self, guest: TinyGuest, event: int) -> None:
        guest.vm.ioeventfd(event, PORT, 0, pio=True)
        guest.load(Mode.LONG, f"mov dx, {PORT:#x}\n out dx, al\n out dx, ax\n out dx, eax{AFTER}")
        assert guest.out() == (0x10, 0x77)
        assert count(event) == 3

    def test_deassign(self, guest: TinyGuest, event: int) -> None:
        guest.vm.ioeventfd(event, PORT, 1, pio=True)
        guest.vm.ioeventfd(event, PORT, 1, pio=True, deassign=True)
        guest.load(Mode.LONG, f"mov dx, {PORT:#x}\n out dx, al")
        assert guest.out()[0] == PORT
        assert count(event) == 0

    def test_collision(self, configured: Vm, event: int, other_event: int) -> None:
        configured.ioeventfd(event, PORT, 1, pio=True)
        with refused(errno.EEXIST):
            configured.ioeventfd(other_event, PORT, 1, pio=True)

    def test_wildcard_collides_with_a_value(self, configured: Vm, event: int, other_event: int) -> None:
        configured.ioeventfd(event, PORT, 1, datamatch=5, pio=True)
        with refused(errno.EEXIST):
            configured.ioeventfd(other_event, PORT, 1, pio=True)

    def test_nothing_to_deassign(self, configured: Vm, event: int) -> None:
        with refused(errno.ENOENT):
            configured.ioeventfd(event, PORT, 1, pio=True, deassign=True)

    @pytest.mark.parametrize("size", [3, 16])
    def test_bad_size(self, configured: Vm, event: int, size: int) -> None:
        with refused(errno.EINVAL):
            configured.ioeventfd(event, PORT, size, pio=True)

    def test_address_wraps(self, configured: Vm, event: int) -> None:
        with refused(errno.EINVAL):
            configured.ioeventfd(event, (1 << 64) - 2, 4)

    def test_no_length_with_datamatch(self, configured: Vm, event: int) -> None:
        with refused(errno.EINVAL):
            configured.ioeventfd(event, MMIO, 0, datamatch=1)

    def test_closed_fd(self, configured: Vm) -> None:
        with refused(errno.EBADF):
            configured.ioeventfd(9999, PORT, 1, pio=True)
