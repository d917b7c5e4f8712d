"""The ISA devices that every PC has, and their names in ACPI."""

from __future__ import annotations

from vmonty.vmm.boot import aml, dsdt
from vmonty.vmm.hw.cmos import Cmos
from vmonty.vmm.hw.i8042 import I8042
from vmonty.vmm.hw.serial import Serial
from vmonty.vmm.machine import Machine

COM_PORTS = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
I8042_DATA, KEYBOARD_IRQ, MOUSE_IRQ = 0x60, 1, 12
RTC, RTC_IRQ = 0x70, 8


def add_legacy_devices(machine: Machine) -> None:
    """Place them: COM1 as the console, clock, keyboard controller."""
    ports, lines = machine.ports, machine.lines
    base, irq = COM_PORTS[0]
    machine.serial = Serial(lines.source(irq), machine.console)
    ports.place(base, 8, machine.serial, "serial")
    ports.place(I8042_DATA, 5, I8042(machine.reset), "i8042")
    ports.place(RTC, 2, Cmos(), "cmos")


def describe_legacy_devices() -> bytes:
    """Their AML, to stand inside the ISA bridge's device."""
    base, irq = COM_PORTS[0]
    return b"".join(
        (
            dsdt.plain_device("RTC", "PNP0B00", aml.io(RTC, 8), aml.irq(RTC_IRQ)),
            dsdt.plain_device(
                "KBD", "PNP0303", aml.io(I8042_DATA, 1), aml.io(I8042_DATA + 4, 1), aml.irq(KEYBOARD_IRQ)
            ),
            dsdt.plain_device("MOU", "PNP0F13", aml.irq(MOUSE_IRQ)),
            dsdt.serial_port(1, base, irq),
        )
    )
