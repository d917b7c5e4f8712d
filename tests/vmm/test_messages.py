"""Messages by irqfd: routes follow what is sent, places are reused, and a KVM without irqfds still gets them."""

from __future__ import annotations

import errno
import os

import pytest

from vmonty.base.errors import KvmError
from vmonty.kvm.uapi.irq import kvm_irq_routing_entry
from vmonty.vmm import messages
from vmonty.vmm.messages import Messages

FIRST = 24
ADDRESS = 0xFEE0_0000


class Wiring:
    """The calls of a VM that Messages makes; ``delivered`` are the messages that the routes make of its signals."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.table: list[kvm_irq_routing_entry] = []
        self.irqfds: dict[int, int] = {}
        self.delivered: list[tuple[int, int]] = []
        self.signalled_msi = 0

    def set_gsi_routing(self, entries: list[kvm_irq_routing_entry]) -> None:
        if self.refuses == "routes" and len(entries) > 1:
            raise KvmError(errno.EINVAL, "KVM_SET_GSI_ROUTING")
        assert len({entry.gsi for entry in entries}) == len(entries)
        self.table = list(entries)

    def irqfd(self, eventfd: int, gsi: int, deassign: bool = False) -> None:
        if self.refuses == "irqfd":
            raise KvmError(errno.ENOTTY, "KVM_IRQFD")
        os.fstat(eventfd)
        if deassign:
            assert self.irqfds.pop(eventfd) == gsi
        else:
            self.irqfds[eventfd] = gsi

    def signal(self, eventfd: int) -> None:
        (entry,) = (entry for entry in self.table if entry.gsi == self.irqfds[eventfd])
        self.delivered.append((entry.u.msi.address_hi << 32 | entry.u.msi.address_lo, entry.u.msi.data))

    def signal_msi(self, address: int, data: int) -> None:
        self.signalled_msi += 1
        self.delivered.append((address, data))


def made(wiring: Wiring) -> Messages:
    return Messages(wiring, [kvm_irq_routing_entry(gsi=4)], FIRST)  # type: ignore[arg-type]


def test_each_message_has_a_line_of_its_own() -> None:
    wiring = Wiring()
    sender = made(wiring)
    sent = [(ADDRESS, 0x31), (ADDRESS | 1 << 40, 0x31), (ADDRESS, 0x32), (ADDRESS, 0x31)]
    for message in sent:
        sender.send(*message)
    assert wiring.delivered == sent
    assert wiring.signalled_msi == 0
    assert [entry.gsi for entry in wiring.table] == [4, FIRST, FIRST + 1, FIRST + 2]
    sender.close()
    sender.close()
    assert wiring.irqfds == {}
    sender.send(ADDRESS, 0x31)
    assert wiring.delivered == sent


def test_a_guest_that_uses_many_takes_the_oldest_ones_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MOST_MESSAGES", 3)
    wiring = Wiring()
    sender = made(wiring)
    sent = [(ADDRESS, data) for data in (1, 2, 3, 1, 4, 1, 2, 5, 3, 1)]
    for message in sent:
        sender.send(*message)
        assert len(wiring.irqfds) <= 3
        assert {entry.gsi for entry in wiring.table} <= {4, FIRST, FIRST + 1, FIRST + 2}
    assert wiring.delivered == sent
    sender.close()


@pytest.mark.parametrize("refuses", ["routes", "irqfd"])
def test_a_kvm_without_irqfds_gets_them_by_ioctl(refuses: str) -> None:
    wiring = Wiring(refuses)
    sender = made(wiring)
    for data in (1, 2, 1):
        sender.send(ADDRESS, data)
    assert wiring.delivered == [(ADDRESS, 1), (ADDRESS, 2), (ADDRESS, 1)]
    assert wiring.signalled_msi == 3
    assert wiring.irqfds == {}
    sender.close()
