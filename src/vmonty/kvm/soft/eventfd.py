"""irqfd and ioeventfd: interrupts raised by, and guest writes turned into, events on file descriptors.

An eventfd is known by its identity, not by its number: the kernel tells it in /proc/self/fdinfo. We keep a duplicate
of each, so the caller may close its own; unlike Linux, which ends an irqfd when the last such file is closed, we end
it when it is deassigned or the VM goes.

One thread per VM waits for all irqfds; it starts with the first. Every irqfd's number is taken at its epoll wake-up
under the chip lock, so that none is raised after deassign() has returned.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Callable
from typing import NamedTuple

from vmonty.base.record import Record, made
from vmonty.kvm.soft.iodev import KvmIoBus, KvmIoBuses
from vmonty.kvm.soft.irq_comm import KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID, IrqComm
from vmonty.kvm.uapi.flags import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IOEVENTFD_VALID_FLAG_MASK,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
)
from vmonty.kvm.uapi.irq import kvm_ioeventfd, kvm_irqfd

__all__ = ["IoEventfds", "Irqfds", "eventfd_id"]

_M64 = (1 << 64) - 1
_IOEVENTFD_SIZES = (0, 1, 2, 4, 8)
_VIRTIO_CCW_NOTIFY = 8


def _refuse(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def eventfd_id(fd: int) -> int:
    """What tells the eventfd behind *fd* from all others. Raises OSError: EBADF, or EINVAL for what is no eventfd."""
    try:
        with open(f"/proc/self/fdinfo/{fd}") as lines:
            for line in lines:
                if line.startswith("eventfd-id:"):
                    return int(line.split()[1])
    except FileNotFoundError:
        raise _refuse(errno.EBADF) from None
    raise _refuse(errno.EINVAL)


class _Signal:
    """A duplicate of an eventfd that is to be signalled; never blocks, and never touches the fd once it is closed."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLOUT)
        self._lock = threading.Lock()
        self._closed = False

    def signal(self) -> None:
        """Add 1 to the counter, unless that is at its limit."""
        with self._lock:
            if not self._closed and self._poll.poll(0):
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        """Close the duplicate."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.fd)


# ---- irqfd -----------------------------------------------------------------------------------------------


class _Irqfd(Record):
    identity: int
    fd: int
    gsi: int
    number: int
    resampler: _Resampler | None = None
    resample: _Signal | None = None


class _Resampler(Record):
    """All resampling irqfds of one GSI: they hold the line up until the guest acknowledges it."""

    irqs: IrqComm
    gsi: int
    members: list[_Irqfd] = made(factory=list)

    def acked(self) -> None:
        """Lower the line, and tell everyone to look whether its device still wants it."""
        self.irqs.set_irq(self.gsi, 0, KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID)
        for member in self.members:
            if member.resample is not None:
                member.resample.signal()


class Irqfds:
    """The irqfds of a VM."""

    def __init__(self, irqs: IrqComm) -> None:
        self._irqs = irqs
        self._irqfds: dict[int, _Irqfd] = {}  # by our duplicate of the eventfd
        self._callers: dict[int, _Irqfd] = {}  # by the number that the caller gave
        self._resamplers: dict[int, _Resampler] = {}
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._closed = False

    def irqfd(self, args: kvm_irqfd) -> None:
        """KVM_IRQFD. Raises OSError: EINVAL, EBADF, EBUSY for an eventfd that is in use already."""
        if args.flags & ~(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE):
            raise _refuse(errno.EINVAL)
        if args.flags & KVM_IRQFD_FLAG_DEASSIGN:
            self._deassign(args)
        else:
            self._assign(args)

    def _assign(self, args: kvm_irqfd) -> None:
        resample = bool(args.flags & KVM_IRQFD_FLAG_RESAMPLE)
        if not (self._irqs.ioapic is not None if resample else self._irqs.in_kernel):
            raise _refuse(errno.EINVAL)
        identity = eventfd_id(args.fd)
        if resample:
            eventfd_id(args.resamplefd)
        with self._irqs.lock:
            if self._closed:
                raise _refuse(errno.EINVAL)
            if any(other.identity == identity for other in self._irqfds.values()):
                raise _refuse(errno.EBUSY)
            irqfd = _Irqfd(identity, os.dup(args.fd), args.gsi, args.fd)
            if resample:
                try:
                    irqfd.resample = _Signal(args.resamplefd)
                except OSError:
                    os.close(irqfd.fd)
                    raise
                self._join_resampler(irqfd)
            self._irqfds[irqfd.fd] = self._callers[irqfd.number] = irqfd
            self._start().register(irqfd.fd, select.EPOLLIN)

    def _join_resampler(self, irqfd: _Irqfd) -> None:
        resampler = self._resamplers.get(irqfd.gsi)
        if resampler is None:
            resampler = self._resamplers[irqfd.gsi] = _Resampler(self._irqs, irqfd.gsi)
            self._irqs.register_ack_notifier(irqfd.gsi, resampler.acked)
        resampler.members.append(irqfd)
        irqfd.resampler = resampler

    def _deassign(self, args: kvm_irqfd) -> None:
        identity = eventfd_id(args.fd)
        with self._irqs.lock:
            for irqfd in tuple(self._irqfds.values()):
                if irqfd.identity == identity and irqfd.gsi == args.gsi:
                    self._drop(irqfd)

    def _drop(self, irqfd: _Irqfd) -> None:
        del self._irqfds[irqfd.fd]
        if self._callers.get(irqfd.number) is irqfd:
            del self._callers[irqfd.number]
        if self._epoll is not None:
            self._epoll.unregister(irqfd.fd)
        resampler = irqfd.resampler
        if resampler is not None:
            resampler.members.remove(irqfd)
            if not resampler.members:
                del self._resamplers[irqfd.gsi]
                self._irqs.unregister_ack_notifier(irqfd.gsi, resampler.acked)
                self._irqs.set_irq(irqfd.gsi, 0, KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID)
        if irqfd.resample is not None:
            irqfd.resample.close()
        os.close(irqfd.fd)

    def close(self) -> None:
        """Deassign all and end the thread. Call it without the chip lock; a second call does nothing."""
        with self._irqs.lock:
            self._closed = True
            for irqfd in tuple(self._irqfds.values()):
                self._drop(irqfd)
            thread, self._thread = self._thread, None
            if thread is not None:
                os.eventfd_write(self._wake, 1)
        if thread is not None:
            if thread is not threading.current_thread():
                thread.join()
            if self._epoll is not None:
                self._epoll.close()
            os.close(self._wake)

    # ---- the thread ----------------------------------------------------------------------------------

    def _start(self) -> select.epoll:
        if self._epoll is None:
            self._epoll = select.epoll()
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
            self._epoll.register(self._wake, select.EPOLLIN)
            self._thread = threading.Thread(target=self._serve, args=(self._epoll,), name="kvm-irqfd", daemon=True)
            self._thread.start()
        return self._epoll

    def _serve(self, epoll: select.epoll) -> None:
        while not self._closed:
            for fd, _ in epoll.poll():
                with self._irqs.lock:
                    irqfd = self._irqfds.get(fd)
                    if irqfd is not None and self._take(fd):
                        self.inject(irqfd)

    @staticmethod
    def _take(fd: int) -> bool:
        """Reset the counter; False when someone else already has, or the number is another file's by now."""
        try:
            # The flag keeps us from waiting on an eventfd that blocks and was read by someone else.
            return os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
        except BlockingIOError:
            return False

    def signal(self, number: int) -> bool:
        """What the kernel does in the context of who writes to the eventfd *number*: raise its GSI at once.

        False when no irqfd was assigned by that number.
        """
        with self._irqs.lock:
            irqfd = self._callers.get(number)
            if irqfd is not None:
                self.inject(irqfd)
        return irqfd is not None

    def inject(self, irqfd: _Irqfd) -> None:
        """Raise the GSI: a pulse, or with a resampler until it is acknowledged."""
        if irqfd.resampler is not None:
            self._irqs.set_irq(irqfd.gsi, 1, KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID)
        else:
            self._irqs.set_irq(irqfd.gsi, 1)
            self._irqs.set_irq(irqfd.gsi, 0)


# ---- ioeventfd -------------------------------------------------------------------------------------------


class _IoEventfd(Record):
    """An IoDevice that signals an eventfd; *datamatch* None stands for any value, *size* 0 for any size."""

    identity: int
    address: int
    size: int
    datamatch: int | None
    # KVM_IOEVENTFD_FLAG_PIO, that of s390's channels (which nothing here reaches), or 0 for MMIO.
    space: int
    signal: _Signal | None = None
    number: int = -1  # by which the caller knows it
    at_once: Callable[[], bool] | None = None

    def collides(self, other: _IoEventfd) -> bool:
        if self.space != other.space or self.address != other.address:
            return False
        if not self.size or not other.size:
            return True
        return self.size == other.size and (
            self.datamatch is None or other.datamatch is None or self.datamatch == other.datamatch
        )

    def same(self, other: _IoEventfd) -> bool:
        mine = (self.identity, self.space, self.address, self.size, self.datamatch)
        return mine == (other.identity, other.space, other.address, other.size, other.datamatch)

    def read(self, address: int, size: int) -> int | None:
        """Reads don't signal."""
        return None

    def write(self, address: int, size: int, value: int) -> bool:
        """Signal, if address, size and value are those."""
        if address != self.address or (self.size and size != self.size):
            return False
        if self.datamatch is not None and value != self.datamatch:
            return False
        self.ring()
        return True

    def ring(self) -> None:
        """Somebody has written to it."""
        if self.signal is not None and not (self.at_once is not None and self.at_once()):
            self.signal.signal()


class Doorbell(NamedTuple):
    """An ioeventfd in memory, as VmArch.set_doorbells() takes it."""

    address: int
    size: int
    datamatch: int | None
    fd: int
    answered: bool  # by at_once()


class IoEventfds:
    """The ioeventfds of a VM."""

    def __init__(self, buses: KvmIoBuses, publish: Callable[[list[Doorbell]], None] = lambda bells: None) -> None:
        """*publish* gets those in memory, whenever they change."""
        self._buses = buses
        self._publish = publish
        self._all: list[_IoEventfd] = []
        self._lock = threading.Lock()

    def ioeventfd(self, args: kvm_ioeventfd) -> None:
        """KVM_IOEVENTFD.

        Raises OSError: EINVAL for a size that is not 0, 1, 2, 4 or 8, an unknown flag, a range beyond 64 bits, or a
        datamatch without size; EBADF or EINVAL for the fd; EEXIST on a collision; ENOENT when there is nothing to
        deassign.
        """
        flags = args.flags
        wanted = _IoEventfd(
            identity=0,
            address=args.addr,
            size=args.len,
            datamatch=args.datamatch if flags & KVM_IOEVENTFD_FLAG_DATAMATCH else None,
            space=flags & KVM_IOEVENTFD_FLAG_PIO or flags & _VIRTIO_CCW_NOTIFY,
        )
        if flags & KVM_IOEVENTFD_FLAG_DEASSIGN:
            wanted.identity = eventfd_id(args.fd)
            self._deassign(wanted)
            return
        if (
            wanted.size not in _IOEVENTFD_SIZES
            or wanted.address + wanted.size > _M64
            or flags & ~KVM_IOEVENTFD_VALID_FLAG_MASK
            or (not wanted.size and wanted.datamatch is not None)
        ):
            raise _refuse(errno.EINVAL)
        wanted.identity = eventfd_id(args.fd)
        self._assign(wanted, args.fd)

    def _places(self, device: _IoEventfd) -> tuple[KvmIoBus, ...]:
        if device.space:
            return (self._buses.pio,) if device.space == KVM_IOEVENTFD_FLAG_PIO else ()
        return (self._buses.mmio,) if device.size else (self._buses.mmio, self._buses.fast_mmio)

    def _assign(self, device: _IoEventfd, fd: int) -> None:
        with self._lock:
            if any(device.collides(other) for other in self._all):
                raise _refuse(errno.EEXIST)
            device.signal = _Signal(fd)
            device.number = fd
            for bus in self._places(device):
                bus.register(device.address, device.size, device, counted=False)
            self._all.append(device)
            self._tell()

    def memory_changed(self) -> None:
        """The memory slots are others: some may lie where an ioeventfd is."""
        with self._lock:
            self._tell()

    def _tell(self) -> None:
        """All that only ioeventfds answer for, in memory."""
        self._publish(
            [
                Doorbell(device.address, device.size, device.datamatch, device.signal.fd, device.at_once is not None)
                for device in self._all
                if not device.space and device.signal is not None
                and all(isinstance(other, _IoEventfd)
                        for other in self._buses.mmio.candidates(device.address, device.size or 1))
            ]
        )  # fmt: skip

    def ring_at_once(self, number: int, at_once: Callable[[], bool]) -> None:
        """Offer writes that would signal the eventfd *number* to *at_once* before."""
        with self._lock:
            for device in self._all:
                if device.number == number:
                    device.at_once = at_once
            self._tell()

    def answer(self, fd: int) -> None:
        """A store has rung the one whose eventfd is *fd* here."""
        with self._lock:
            found = next((device for device in self._all if device.signal is not None and device.signal.fd == fd), None)
        if found is not None:  # else it was deassigned meanwhile
            found.ring()

    def _deassign(self, wanted: _IoEventfd) -> None:
        with self._lock:
            for device in self._all:
                if device.same(wanted):
                    self._drop(device)
                    return
            raise _refuse(errno.ENOENT)

    def _drop(self, device: _IoEventfd) -> None:
        for bus in self._places(device):
            bus.unregister(device)
        self._all.remove(device)
        self._tell()
        if device.signal is not None:
            device.signal.close()

    def close(self) -> None:
        """Deassign all."""
        with self._lock:
            for device in tuple(self._all):
                self._drop(device)
