"""The ISA devices that every PC has, and their names in ACPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmonty.vmm import bootorder
from vmonty.vmm.boards.ports import COM_PORTS
from vmonty.vmm.boot import aml, dsdt
from vmonty.vmm.bus import Part
from vmonty.vmm.hw import i8042
from vmonty.vmm.hw.cmos import INDEX_READ, Cmos
from vmonty.vmm.hw.debug_ports import PostPort
from vmonty.vmm.hw.i8042 import I8042
from vmonty.vmm.hw.port92 import A20_GATE, Port92
from vmonty.vmm.hw.ps2 import Ps2Keyboard, Ps2Mouse
from vmonty.vmm.hw.pvpanic import Pvpanic
from vmonty.vmm.hw.serial import Serial
from vmonty.vmm.machine import Machine

I8042_DATA, KEYBOARD_IRQ, MOUSE_IRQ = 0x60, 1, 12
RTC, RTC_IRQ = 0x70, 8
POST, FAST_A20, PVPANIC = 0x80, 0x92, 0x505
CMOS_PROCESSORS = 0x5F

# What firmware leaves in the command byte: interrupts on, scan codes translated.
COMMAND_BYTE = i8042.INTERRUPT_KEYBOARD | i8042.SYSTEM_FLAG | i8042.TRANSLATE


class LegacyDevices(NamedTuple):
    """What was placed."""

    serial: Serial
    keyboard: Ps2Keyboard
    mouse: Ps2Mouse
    controller: I8042
    cmos: Cmos
    post: PostPort


def add_legacy_devices(machine: Machine) -> LegacyDevices:
    """Place them: COM1 as the console, clock with the memory's size, keyboard and mouse, A20 and POST ports."""
    ports, lines = machine.ports, machine.lines
    base, irq = COM_PORTS[0]
    serial = machine.add_console(base, irq, polled=machine.config.firmware is not None)
    keyboard, mouse, post = Ps2Keyboard(), Ps2Mouse(), PostPort()
    machine.keyboard, machine.mouse = keyboard, mouse
    controller = I8042(
        machine.reset, keyboard, mouse, keyboard_irq=lines.source(KEYBOARD_IRQ), mouse_irq=lines.source(MOUSE_IRQ)
    )
    ports.place(I8042_DATA, 1, Part(controller, 0), "i8042-data")
    ports.place(I8042_DATA + 4, 1, Part(controller, 4), "i8042-command")
    cmos = Cmos(irq=lines.source(RTC_IRQ), call_later=machine.loop.call_later)
    memory = machine.memory
    cmos.store_memory_size(memory.low_end, memory.size - memory.low_end)
    cmos.store(CMOS_PROCESSORS, bytes((machine.config.cpus - 1,)))
    for register, value in bootorder.cmos_registers(machine.config.boot.order).items():
        cmos.store(register, bytes((value,)))
    ports.place(RTC, 2, cmos, "cmos")
    machine.port_cell(RTC, 1, INDEX_READ)
    ports.place(POST, 1, post, "post")
    ports.place(PVPANIC, 1, Pvpanic(machine.panicked), "pvpanic")
    ports.place(FAST_A20, 1, Port92(machine.reset, machine.port_cell(FAST_A20, 1, mask=A20_GATE)), "port92")
    return LegacyDevices(serial, keyboard, mouse, controller, cmos, post)


def prepare_legacy_devices(devices: LegacyDevices) -> None:
    """What firmware does to them."""
    devices.controller.write(4, 1, i8042.WRITE_COMMAND_BYTE)
    devices.controller.write(0, 1, COMMAND_BYTE)


def describe_legacy_devices(serial_ports: Sequence[int]) -> bytes:
    """Their AML, to stand inside the ISA bridge's device."""
    return b"".join(
        (
            dsdt.plain_device("RTC", "PNP0B00", aml.io(RTC, 8), aml.irq(RTC_IRQ)),
            dsdt.plain_device(
                "KBD", "PNP0303", aml.io(I8042_DATA, 1), aml.io(I8042_DATA + 4, 1), aml.irq(KEYBOARD_IRQ)
            ),
            dsdt.plain_device("MOU", "PNP0F13", aml.irq(MOUSE_IRQ)),
            dsdt.plain_device("PEVT", "QEMU0001", aml.io(PVPANIC, 1)),
            *(dsdt.serial_port(number, *COM_PORTS[number - 1]) for number in sorted(serial_ports)),
        )
    )
