"""The display adapter's place in a PC."""

from __future__ import annotations

from vmonty.base.errors import UsageError
from vmonty.vmm import shadow
from vmonty.vmm.boards.pci_host import PciMachine
from vmonty.vmm.display.screen import Screen
from vmonty.vmm.hw import vmmouse
from vmonty.vmm.hw.vga import aperture, dispi, registers, textmode
from vmonty.vmm.hw.vga.card import VgaCard
from vmonty.vmm.memory import DeviceMemory

# Of KVM: the frame buffer, the video BIOS, the window at 0xA0000.
FIRST_SLOT = shadow.NEXT_FREE_SLOT


def add_vga(machine: PciMachine, rom: bytes) -> VgaCard:
    """Plug it in, with its video BIOS *rom*; the machine has a screen then. Raises UsageError for a second one."""
    if machine.screen is not None:
        raise UsageError("a machine has one display adapter")
    slots = {True: DeviceMemory(machine.vm, FIRST_SLOT), False: DeviceMemory(machine.vm, FIRST_SLOT + 1)}
    window = DeviceMemory(machine.vm, FIRST_SLOT + 2)
    card = VgaCard(
        lambda ram, address, *, writable=True: slots[writable].place(ram, address, writable),
        lambda ram, address, start, size: window.place(ram, address, start=start, size=size), rom,
    )  # fmt: skip
    machine.add_device(card)
    machine.shadow_ram.on_screen_memory = card.aperture.cover
    machine.ports.place(registers.FIRST_PORT, registers.PORTS, card.registers, "vga")
    machine.ports.place(dispi.INDEX_PORT, dispi.PORTS, card.dispi, "vga-dispi")
    machine.mmio.place(aperture.WINDOW, aperture.WINDOW_SIZE, card.window, "vga-window")
    machine.screen = Screen(card.mode, card.memory)
    if machine.mouse is not None:
        machine.pointer = vmmouse.VmMouse(machine.exiting_vcpu, machine.mouse)
        machine.ports.place(vmmouse.PORT, vmmouse.PORT_SIZE, machine.pointer, "vmmouse")
    machine.prepare_screen = lambda: textmode.set_text_mode(card.registers, card.memory, rom)
    return card
