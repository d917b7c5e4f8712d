"""The parts of a board's DSDT: PCI's root with its windows and interrupts, ISA devices, virtio-mmio, event device.

Source: ACPI Specification 6.5, "ACPI-Defined Devices and Device-Specific Objects", "Device Configuration";
PCI Firmware Specification, "_PRT"; "ACPI Generic Event Device".

Firmware has the tables made four times, and most machines have the same: the larger parts are remembered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmonty.vmm.boot import aml
from vmonty.vmm.hw import acpi_ged, acpi_hotplug

PINS = 4
LINK_INTERRUPTS = (5, 10, 11)
LINK_DISABLED = 0x80
# Where a resource template of one Interrupt descriptor holds its number.
INTERRUPT_NUMBER = 5
STATUS_PRESENT, STATUS_ENABLED = 0x09, 0x0B
NO_GSI = 0
# "Device Object Notifications".
DEVICE_CHECK, EJECT_REQUEST = 1, 3


class Window(NamedTuple):
    """Addresses that a PCI root passes on: from *first* to *last*, both inside."""

    first: int
    last: int


def system_bus(*devices: bytes) -> bytes:
    r"""Scope (\_SB) { devices }."""
    return aml.scope("\\_SB", *devices)


def processors(count: int) -> bytes:
    """A device for each processor; its _UID is that in the MADT."""
    return b"".join(
        aml.device(f"C{number:03X}", aml.name("_HID", "ACPI0007"), aml.name("_UID", number)) for number in range(count)
    )


def pci_root(memory: Sequence[Window], routing: bytes, *devices: bytes, express: bool = False) -> bytes:
    """Device (PCI0): *memory* are its windows, *routing* its _PRT, *devices* what stands behind it."""
    windows = [
        aml.bus_numbers(0, 255),
        aml.io(0xCF8, 8),
        aml.io_window(0, 0xCF7),
        aml.io_window(0xD00, 0xFFFF),
        aml.memory_window(0xA_0000, 0xB_FFFF, cacheable=True),
        *(aml.memory_window(window.first, window.last) for window in memory),
    ]
    identity = [aml.name("_HID", aml.eisa_id("PNP0A08")), aml.name("_CID", aml.eisa_id("PNP0A03"))]
    if not express:
        identity = [aml.name("_HID", aml.eisa_id("PNP0A03"))]
    control = _operating_system_control() if express else b""
    return aml.device(
        "PCI0", *identity, aml.name("_UID", 0), aml.name("_CRS", aml.resources(*windows)),
        control, routing, *devices,
    )  # fmt: skip


def _operating_system_control() -> bytes:
    """_OSC: the operating system may have every PCI Express feature that it asks for, but no hot-plug by SHPC."""
    return aml.method(
        "_OSC", 4,
        aml.create_dword_field(aml.ARG3, 0, "CDW1"),
        aml.create_dword_field(aml.ARG3, 8, "CDW3"),
        aml.bit_and(aml.path("CDW3"), 0x1D, aml.path("CDW3")),
        aml.bit_and(aml.path("CDW1"), 0xFFFF_FFFB, aml.path("CDW1")),
        aml.returns(aml.ARG3),
        serialized=True,
    )  # fmt: skip


def routing_by_links(route: Callable[[int, int], str]) -> bytes:
    """_PRT: pin *n* of a slot has its interrupt from the link device ``route(slot, pin)``."""
    return aml.name(
        "_PRT",
        aml.package(
            *(
                aml.package(slot << 16 | 0xFFFF, pin, aml.path(route(slot, pin)), 0)
                for slot in range(1, 32)
                for pin in range(PINS)
            )
        ),
    )


def routing_by_gsi(route: Callable[[int, int], int]) -> bytes:
    """_PRT: pin *n* of a slot is wired to the I/O APIC at ``route(slot, pin)``."""
    return aml.name(
        "_PRT",
        aml.package(
            *(
                aml.package(slot << 16 | 0xFFFF, pin, NO_GSI, route(slot, pin))
                for slot in range(1, 32)
                for pin in range(PINS)
            )
        ),
    )


@functools.cache
def hot_plug_slots(port: int, slots: tuple[int, ...]) -> bytes:
    """Devices for those *slots* of the root bus whose contents may change, by the registers of SlotEvents at *port*.

    It belongs into the root bus's device, and hot_plug_event() beside that.
    """
    terms = [
        aml.operation_region("HPLG", aml.SYSTEM_IO, port, acpi_hotplug.SLOTS_SIZE),
        aml.field("HPLG", aml.DWORD_ACCESS, ("HPUP", 32), ("HPDN", 32), ("HPEJ", 32)),
    ]
    tells = []
    for slot in slots:
        label = f"S{slot:02X}_"
        terms.append(
            aml.device(
                label, aml.name("_ADR", slot << 16), aml.name("_SUN", slot),
                aml.method("_EJ0", 1, aml.store(1 << slot, aml.path("HPEJ"))),
            )
        )  # fmt: skip
        tells.append(aml.if_(aml.bit_and(aml.ARG0, 1 << slot), aml.notify(label, aml.ARG1)))
    # The registers forget what they have told: each is read once.
    scan = [
        part
        for register, code in (("HPUP", DEVICE_CHECK), ("HPDN", EJECT_REQUEST))
        for part in (aml.store(aml.path(register), aml.LOCAL0), aml.call("HPTL", aml.LOCAL0, code))
    ]
    terms.append(aml.method("HPTL", 2, *tells))
    terms.append(aml.method("HPSC", 0, *scan, serialized=True))
    return b"".join(terms)


def hot_plug_event(port: int, event_block: int) -> bytes:
    """What general purpose event 1 does; and the ports, so that nobody else is put there."""
    ports = aml.io(port, acpi_hotplug.SLOTS_SIZE), aml.io(event_block, acpi_hotplug.GPE_SIZE)
    return aml.scope(
        "\\_SB", aml.device("HPPT", aml.name("_HID", aml.eisa_id("PNP0C02")), aml.name("_UID", 2),
        aml.name("_CRS", aml.resources(*ports))),
    ) + aml.scope("\\_GPE", aml.method(f"_E{acpi_hotplug.EVENT_PCI:02X}", 0, aml.call("\\_SB.PCI0.HPSC")))  # fmt: skip


@functools.cache
def interrupt_link(label: str, uid: int, register: str) -> bytes:
    """An interrupt link device, whose route is the byte *register*: bit 7 off, the rest an ISA interrupt."""
    reg = aml.path(register)
    choices = aml.resources(aml.interrupt(LINK_INTERRUPTS, shared=True))
    current = aml.resources(aml.interrupt([0], shared=True))
    return aml.device(
        label,
        aml.name("_HID", aml.eisa_id("PNP0C0F")),
        aml.name("_UID", uid),
        aml.name("_PRS", choices),
        aml.name("BUF0", current),
        aml.method(
            "_STA", 0,
            aml.if_(aml.bit_and(reg, LINK_DISABLED), aml.returns(STATUS_PRESENT)),
            aml.returns(STATUS_ENABLED),
        ),
        aml.method("_DIS", 0, aml.bit_or(reg, LINK_DISABLED, reg)),
        aml.method(
            "_CRS", 0,
            aml.create_dword_field(aml.path("BUF0"), INTERRUPT_NUMBER, "IRQN"),
            aml.store(aml.bit_and(reg, 0x0F), aml.path("IRQN")),
            aml.returns(aml.path("BUF0")),
            serialized=True,
        ),
        aml.method(
            "_SRS", 1,
            aml.create_dword_field(aml.ARG0, INTERRUPT_NUMBER, "IRQN"),
            aml.store(aml.path("IRQN"), reg),
            serialized=True,
        ),
    )  # fmt: skip


def isa_bridge(slot: int, *devices: bytes) -> bytes:
    """Device (ISA) at function 0 of *slot*, with its devices."""
    return aml.device("ISA", aml.name("_ADR", slot << 16), *devices)


def pirq_registers(offset: int, labels: Sequence[str]) -> bytes:
    """The route control registers of the bridge around this, as byte fields."""
    return aml.operation_region("PIRQ", aml.PCI_CONFIG, offset, len(labels)) + aml.field(
        "PIRQ", aml.BYTE_ACCESS, *((label, 8) for label in labels)
    )


@functools.cache
def plain_device(label: str, identity: str, *resources: bytes, uid: int = 0) -> bytes:
    """A device that needs a name and resources only: RTC, keyboard, mouse, UART, HPET, reserved resources."""
    hid = aml.eisa_id(identity) if identity.startswith("PNP") else identity
    return aml.device(
        label, aml.name("_HID", hid), aml.name("_UID", uid), aml.name("_STA", 0x0F),
        aml.name("_CRS", aml.resources(*resources)),
    )  # fmt: skip


def serial_port(number: int, base: int, irq: int) -> bytes:
    """COM1 is number 1."""
    return plain_device(f"COM{number}", "PNP0501", aml.io(base, 8), aml.irq(irq), uid=number)


def virtio_mmio(number: int, base: int, size: int, gsi: int) -> bytes:
    """A virtio device behind memory-mapped registers."""
    return plain_device(f"VR{number:02X}", "LNRO0005", aml.fixed_memory(base, size), aml.interrupt([gsi]), uid=number)


def generic_event_device(base: int, gsi: int) -> bytes:
    """The event device at *base*, and the power button that it tells of."""
    return aml.device(
        "PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", 0)
    ) + aml.device(
        "GED",
        aml.name("_HID", "ACPI0013"),
        aml.name("_UID", 0),
        aml.name("_CRS", aml.resources(aml.interrupt([gsi], level=False))),
        aml.operation_region("EREG", aml.SYSTEM_MEMORY, base + acpi_ged.EVENT_SELECT, 4),
        aml.field("EREG", aml.DWORD_ACCESS, ("ESEL", 32)),
        aml.method(
            "_EVT", 1,
            aml.store(aml.path("ESEL"), aml.LOCAL0),
            aml.if_(aml.bit_and(aml.LOCAL0, acpi_ged.POWER_BUTTON), aml.notify("\\_SB.PWRB", 0x80)),
            serialized=True,
        ),
    )  # fmt: skip
