"""Message-signalled interrupts by irqfd: each message in use has a GSI routed to it, and an eventfd that raises it.

Source: Documentation/virt/kvm/api.rst, KVM_SET_GSI_ROUTING, KVM_IRQFD, KVM_SIGNAL_MSI.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from vmonty.base.errors import HandleClosed, KvmError
from vmonty.kvm.api import Vm
from vmonty.kvm.uapi import flags
from vmonty.kvm.uapi.irq import kvm_irq_routing_entry

# Messages that have a GSI at a time; a guest that moves its vectors about takes the place of the one longest unused.
MOST_MESSAGES = 128


class _Line(NamedTuple):
    gsi: int
    fd: int


def _route(gsi: int, address: int, data: int) -> kvm_irq_routing_entry:
    entry = kvm_irq_routing_entry(gsi=gsi, type=flags.KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo, entry.u.msi.address_hi, entry.u.msi.data = address & 0xFFFF_FFFF, address >> 32, data
    return entry


class Messages:
    """Sends messages to *vm*, whose routing table it keeps: *pins*, and a route for each message.

    GSIs from *first* on are its own. A KVM that refuses a route or an irqfd gets its messages by KVM_SIGNAL_MSI.
    """

    def __init__(self, vm: Vm, pins: Sequence[kvm_irq_routing_entry], first: int) -> None:
        self._vm = vm
        self._pins = list(pins)
        self._first = first
        self._lock = threading.Lock()
        self._lines: OrderedDict[tuple[int, int], _Line] = OrderedDict()
        self._refused = self._closed = False
        vm.set_gsi_routing(self._pins)

    def send(self, address: int, data: int) -> None:
        """Deliver one message. From any thread; nothing after ``close``."""
        message = address, data
        with self._lock:
            if self._closed:
                return
            line = self._lines.get(message)
            if line is not None:
                self._lines.move_to_end(message)
            elif not self._refused:
                line = self._add(message)
            with contextlib.suppress(HandleClosed):
                if line is not None:
                    self._vm.signal(line.fd)
                else:
                    self._vm.signal_msi(address, data)

    def _add(self, message: tuple[int, int]) -> _Line | None:
        if len(self._lines) == MOST_MESSAGES:
            _, oldest = self._lines.popitem(last=False)
            self._drop(oldest)
            gsi = oldest.gsi
        else:
            gsi = self._first + len(self._lines)
        routes = [_route(line.gsi, *other) for other, line in self._lines.items()]
        fd = -1
        try:
            self._vm.set_gsi_routing([*self._pins, *routes, _route(gsi, *message)])
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._vm.irqfd(fd, gsi)
        except (KvmError, HandleClosed, OSError):
            # No irqfd here, or no descriptor left: the other way costs more and does the same.
            self._refused = True
            if fd >= 0:
                os.close(fd)
            return None
        line = self._lines[message] = _Line(gsi, fd)
        return line

    def _drop(self, line: _Line) -> None:
        with contextlib.suppress(HandleClosed):
            self._vm.irqfd(line.fd, line.gsi, deassign=True)
        os.close(line.fd)

    def close(self) -> None:
        """Give up all lines. A second call does nothing."""
        with self._lock:
            self._closed = True
            while self._lines:
                self._drop(self._lines.popitem()[1])
