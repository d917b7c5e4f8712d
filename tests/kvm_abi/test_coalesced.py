"""Coalesced MMIO and ports: writes collect in a ring instead of exiting.

Source: api.rst, KVM_(UN)REGISTER_COALESCED_MMIO.
"""

from __future__ import annotations

import errno

import pytest

from vmonty.kvm.uapi import Cap, Exit, Requests
from vmonty.kvm.uapi.run import kvm_coalesced_mmio_zone
from vmonty.testing.guests import MMIO, Mode, TinyGuest

from .refusals import refused

PORT = 0x4560
END = "\n mov al, 0x77\n out 0x10, al\n jmp $"
pytestmark = pytest.mark.needs(Cap.COALESCED_MMIO)


def test_mmio_writes_collect(guest: TinyGuest) -> None:
    """In the order of the writes, each with its address and size; no exit until something else happens."""
    guest.vm.register_coalesced_mmio(MMIO, 0x1000)
    guest.load(Mode.LONG, f"mov rax, 0x8877665544332211\n mov [abs {MMIO:#x}], al\n mov [abs {MMIO + 8:#x}], ax\n"
               f" mov [abs {MMIO + 0x10:#x}], eax\n mov [abs {MMIO + 0x20:#x}], rax{END}")  # fmt: skip
    assert guest.out() == (0x10, 0x77)
    data = bytes.fromhex("1122334455667788")
    assert guest.vcpu.drain_coalesced_mmio() == [
        (MMIO, data[:1], False), (MMIO + 8, data[:2], False), (MMIO + 0x10, data[:4], False), (MMIO + 0x20, data, False)
    ]  # fmt: skip
    assert guest.vcpu.drain_coalesced_mmio() == []


@pytest.mark.needs(Cap.COALESCED_PIO)
def test_port_writes_collect(guest: TinyGuest) -> None:
    guest.vm.register_coalesced_mmio(PORT, 4, pio=True)
    guest.load(Mode.LONG, f"mov eax, 0x44332211\n mov dx, {PORT:#x}\n out dx, al\n out dx, eax{END}")
    assert guest.out() == (0x10, 0x77)
    assert guest.vcpu.drain_coalesced_mmio() == [(PORT, b"\x11", True), (PORT, b"\x11\x22\x33\x44", True)]


def test_reads_and_writes_outside_exit(guest: TinyGuest) -> None:
    guest.vm.register_coalesced_mmio(MMIO, 0x10)
    guest.load(Mode.LONG, f"mov [abs {MMIO:#x}], al\n mov al, [abs {MMIO:#x}]\n mov [abs {MMIO + 0x10:#x}], al")
    assert guest.run() is Exit.MMIO
    assert guest.vcpu.kvm_run.u.mmio.is_write == 0
    assert len(guest.vcpu.drain_coalesced_mmio()) == 1
    assert guest.run() is Exit.MMIO
    assert (guest.vcpu.kvm_run.u.mmio.phys_addr, guest.vcpu.kvm_run.u.mmio.is_write) == (MMIO + 0x10, 1)


def test_write_over_the_zones_end_exits(guest: TinyGuest) -> None:
    guest.vm.register_coalesced_mmio(MMIO, 0x10)
    guest.load(Mode.LONG, f"mov [abs {MMIO + 0xE:#x}], eax")
    assert guest.run() is Exit.MMIO
    assert guest.vcpu.drain_coalesced_mmio() == []


def test_full_ring_exits(guest: TinyGuest) -> None:
    """The write that finds no room is an ordinary exit; the ring holds all before it.

    Before Linux 6.12 the ring counts as full when half of it is used (coalesced_mmio_has_room divides a wrapped
    difference by a number of slots that is no power of two).
    """
    guest.vm.register_coalesced_mmio(MMIO, 0x1000)
    guest.load(Mode.LONG, f"xor eax, eax\n mov ebx, {MMIO:#x}\n again: mov [rbx], eax\n inc eax\n jmp again")
    assert guest.run() is Exit.MMIO
    refused_value = int.from_bytes(bytes(guest.vcpu.kvm_run.u.mmio.data[:4]), "little")
    ring, slots = guest.vcpu.coalesced_mmio_ring()
    assert ring.last == refused_value
    taken = guest.vcpu.drain_coalesced_mmio()
    assert [int.from_bytes(data, "little") for _, data, _ in taken] == list(range(refused_value))
    assert len(slots) // 2 <= refused_value <= len(slots) - 1
    assert guest.run() is Exit.MMIO
    follow_up = guest.vcpu.drain_coalesced_mmio()
    assert [int.from_bytes(data, "little") for _, data, _ in follow_up] == list(
        range(refused_value + 1, refused_value + 1 + len(follow_up))
    ), "the ring goes on, and wraps around"
    assert len(follow_up) >= 1


def test_unregister(guest: TinyGuest) -> None:
    guest.vm.register_coalesced_mmio(MMIO, 0x1000)
    guest.vm.unregister_coalesced_mmio(MMIO, 0x1000)
    guest.load(Mode.LONG, f"mov [abs {MMIO:#x}], al")
    assert guest.run() is Exit.MMIO
    assert guest.vcpu.drain_coalesced_mmio() == []


def test_zone_of_no_kind(guest: TinyGuest) -> None:
    """Anything but 0 and 1 in kvm_coalesced_mmio_zone.pio is refused."""
    zone = kvm_coalesced_mmio_zone(addr=MMIO, size=0x1000)
    zone.u.pio = 2
    with refused(errno.EINVAL):
        guest.vm.ioctl(Requests.KVM_REGISTER_COALESCED_MMIO, zone)
