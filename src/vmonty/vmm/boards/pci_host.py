"""What ``pc`` and ``q35`` share: a PCI root bus with its windows."""

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from vmonty.base.ram import PAGE_SIZE, Ram
from vmonty.kvm.uapi import flags
from vmonty.vmm import bootorder, shadow
from vmonty.vmm.boards.ports import COM_PORTS
from vmonty.vmm.boot import acpi, aml, dsdt, lowmem, pci_setup, smbios
from vmonty.vmm.boot.dsdt import Window
from vmonty.vmm.boot.smbios import NOT_SET, Identity
from vmonty.vmm.bus import BusDevice
from vmonty.vmm.firmware import Firmware, open_store
from vmonty.vmm.hotplug import SLOTS_PORT, HotPlug
from vmonty.vmm.hw import fw_cfg, hpet
from vmonty.vmm.hw.acpi_pm import AcpiPm
from vmonty.vmm.hw.cmos import Cmos
from vmonty.vmm.hw.debug_ports import DEBUG_CONSOLE
from vmonty.vmm.hw.fw_cfg import FwCfg
from vmonty.vmm.hw.hpet import Hpet
from vmonty.vmm.hw.pci import ADDRESS, ConfigPorts, Decoder, PciBus, PciDevice
from vmonty.vmm.hw.pci.bus import SLOTS
from vmonty.vmm.hw.pci.pam import READ_WRITE, REGISTERS
from vmonty.vmm.hw.pci.rom import add_rom_image
from vmonty.vmm.irq import Line
from vmonty.vmm.machine import Machine
from vmonty.vmm.memory import HIGH_RAM_BASE, DeviceMemory
from vmonty.vmm.shadow import ShadowRam

if TYPE_CHECKING:
    from vmonty.vmm.eventloop import EventLoop
    from vmonty.vmm.hw.ata import PiixIde
    from vmonty.vmm.hw.ata.ahci import Ahci
    from vmonty.vmm.hw.ata.drive import Drive

FLASH_SLOT = shadow.NEXT_FREE_SLOT + 3  # behind the display adapter's
FIRST_ROM_SLOT = FLASH_SLOT + 1
CONFIG_PORTS = 0xCF8
# Command block, control block, ISA interrupt.
IDE_CHANNELS = ((0x1F0, 0x3F6, 14), (0x170, 0x376, 15))
FW_CFG = 0x510
HPET = 0xFED0_0000
IRQ0_OVERRIDE = 0x8002  # fw_cfg's number: the PIT is on pin 2 of the I/O APIC
# Where DMI is looked for: anywhere from 0xF0000 to 0xFFFFF.
SMBIOS_ADDRESS, SMBIOS_ANCHOR_ROOM = 0xF_0000, 0x20
PM_BASE, SCI_IRQ = 0x600, 9
# Above RAM's low part and below the I/O APIC; the other one above all RAM.
LOW_WINDOW = Window(0xC000_0000, 0xFEBF_FFFF)
WINDOW_UNIT = 16 << 20
TABLES_SLACK = 1024
HIGH_WINDOW_SIZE, HIGH_WINDOW_UNIT = 32 << 30, 32 << 30


def describe_fw_cfg() -> bytes:
    """The AML of the firmware configuration device."""
    return dsdt.plain_device("FWCF", "QEMU0002", aml.io(FW_CFG, fw_cfg.SIZE))


class PciMachine(Machine):
    """A machine with a PCI root bus ``pci``, which the board makes in ``build``."""

    has_pci = True
    has_ide = True  # else disks on IDE are on SATA
    isa_hole = True
    pci: PciBus
    acpi_pm: AcpiPm
    prepare_screen: Callable[[], None] = staticmethod(lambda: None)  # what a video BIOS would do
    next_slot: int | None = None  # where the next device goes, if it may choose and that is free
    _tables_size = 0
    _roms = 0  # how many cards have a ROM in a memory slot

    def add_device(self, device: PciDevice, slot: int | None = None) -> int:
        """Plug *device* in; see Machine.add_device."""
        if slot is None and self.next_slot is not None and not self.pci.slot_used(self.next_slot):
            slot = self.next_slot
        return self.pci.add(device, slot)

    def plugging(self) -> AbstractContextManager[list[int]]:
        """See Machine.plugging."""
        return self.hotplug.plugging()

    def sci(self) -> Line:
        """One source's end of ACPI's interrupt line."""
        return self.lines.source(SCI_IRQ)

    def add_option_rom(self, device: PciDevice, data: bytes) -> None:
        """Give *device*, before it is plugged in, the ROM *data*."""
        slot = DeviceMemory(self.vm, FIRST_ROM_SLOT + self._roms)
        self._roms += 1
        add_rom_image(device, data, lambda contents, base: slot.place(contents, base, writable=False))

    def add_boot_device(self, kind: str, device: PciDevice, node: str, unit: str, index: int | None) -> None:
        """Firmware may start from *unit* of *device*: names of Open Firmware; *kind* and *index* as for BootOrder."""
        slot, function = next(place for place, other in self.pci.devices().items() if other is device)
        where = f"{slot:x},{function:x}" if function else f"{slot:x}"
        self.boot_order.add(kind, f"/pci@i0cf8/{node}@{where}/{unit}", index)

    def _add_shadow_ram(self) -> ShadowRam:
        firmware, rom = self.config.firmware, None
        if firmware is not None:
            rom = Ram(len(firmware.code), "vmonty-rom")
            rom.write(0, firmware.code)
            self._add_flash(firmware)
        memory = ShadowRam(self.vm, self.memory, rom)
        self.mmio.place(shadow.BASE, shadow.SIZE, memory, "shadow-ram")
        self.shadow_ram = memory
        return memory

    def _add_flash(self, firmware: Firmware) -> None:
        """The flash chip with the firmware's variables, right below its ROM."""
        if firmware.variables is None:
            return
        from vmonty.vmm.hw.flash import Flash

        contents = open_store(firmware.variables)
        self.resources.callback(contents.close)
        data = contents.read()
        firmware.check_variables(len(data))
        ram = Ram(len(data), "vmonty-flash")
        ram.write(0, data)
        base = HIGH_RAM_BASE - len(firmware.code) - ram.size
        slot, provider = DeviceMemory(self.vm, FLASH_SLOT), self.vm.provider
        chip = Flash(
            ram, contents.fileno(), lambda shown: slot.place(ram, base if shown else None, writable=False),
            lambda offset, size: provider.memory_written(ram.address + offset, size),
        )  # fmt: skip
        self.mmio.place(base, ram.size, chip, "flash")

    def add_ide(self, drives: Sequence[Drive | None]) -> PiixIde:
        """The south bridge's IDE function with its two channels at the ports of a PC."""
        from vmonty.vmm.hw.ata.channel import ControlPort
        from vmonty.vmm.hw.ata.piix_ide import PiixIde

        function = PiixIde(self.memory, drives, [self.lines.source(irq) for _, _, irq in IDE_CHANNELS])
        for number, (command, control, _) in enumerate(IDE_CHANNELS):
            channel = function.channels[number]
            self.ports.place(command, 8, channel, f"ide{number}")
            self.ports.place(control, 1, ControlPort(channel), f"ide{number}-control")
        self._place_ide(function)
        return function

    def _place_ide(self, function: PciDevice) -> None:
        self.pci.add(function)

    def add_ahci(self, drives: Sequence[Drive | None], loops: Sequence[EventLoop]) -> Ahci:
        """A SATA controller with *drives*, whose commands *loops* carry out: one of both for each port."""
        from vmonty.vmm.hw.ata.ahci import Ahci

        function = Ahci(self.memory, drives, loops)
        self._place_ahci(function)
        return function

    def _place_ahci(self, function: PciDevice) -> None:
        self.pci.add(function)

    def _add_hpet(self, cmos: Cmos) -> None:
        """Place the event timer, unless the machine was asked for without."""
        if not self.properties.get("hpet", True):
            return

        def replace(on: bool) -> None:
            # In place of the PIT and the clock: both are cut off their interrupt lines.
            cmos.connected = not on
            state = self.vm.get_pit2()
            legacy = flags.KVM_PIT_FLAGS_HPET_LEGACY
            state.flags = state.flags & ~legacy | (legacy if on else 0)
            self.vm.set_pit2(state)

        lines = [self.lines.source(gsi) for gsi in range(24)]
        self.mmio.place(HPET, hpet.SIZE, Hpet(lines, self.loop.call_later, replace), "hpet")

    @property
    def hpet(self) -> int | None:
        """Where the event timer stands, None when there is none."""
        return HPET if self.properties.get("hpet", True) else None

    def _describe_hpet(self) -> bytes:
        if self.hpet is None:
            return b""
        return dsdt.plain_device("HPET", "PNP0103", aml.fixed_memory(self.hpet, hpet.SIZE))

    def _add_fw_cfg(self) -> FwCfg:
        self.fw_cfg = FwCfg(self.memory)
        self.ports.place(FW_CFG, fw_cfg.SIZE, self.fw_cfg, "fw_cfg")
        return self.fw_cfg

    def publish(self) -> None:
        """The items of the firmware configuration device."""
        if self.ports.find(DEBUG_CONSOLE, 1) is None:
            # Firmware says a line there before it asks whether anybody listens: no exit for each of its characters.
            self.port_cell(DEBUG_CONSOLE, 1, value=0xFF, mask=0xFF)
        config, device = self.config, self.fw_cfg
        cpus = struct.pack("<H", config.cpus)
        device.add(fw_cfg.UUID, self.identity.uuid.bytes if self.identity.uuid else NOT_SET)
        device.add(fw_cfg.RAM_SIZE, struct.pack("<Q", self.memory.size))
        device.add(fw_cfg.CPU_COUNT, cpus)
        device.add(fw_cfg.MAX_CPUS, cpus)
        device.add(IRQ0_OVERRIDE, b"\1\0\0\0")
        device.add(fw_cfg.BOOT_MENU, struct.pack("<H", config.boot.menu))
        for rom in config.option_roms:
            device.add_file(rom.file_name, rom.data)
            self.boot_order.add(bootorder.NETWORK, rom.boot_path, rom.boot_index)
        if order := self.boot_order.file(config.boot.order, strict=config.boot.strict):
            device.add_file("bootorder", order)
        if config.boot.wait_ms is not None:
            device.add_file("etc/boot-menu-wait", struct.pack("<H", config.boot.wait_ms))
        if self.screen is None:
            # The BIOS draws on the serial port, and reads keys there.
            device.add(fw_cfg.NO_GRAPHICS, struct.pack("<H", 1))
            device.add_file("etc/sercon-port", struct.pack("<H", COM_PORTS[0][0]))
        device.add_file("etc/e820", b"".join(struct.pack("<QQI", *block, lowmem.E820_RAM) for block in self._blocks))
        device.add_late_files(self._acpi_files)
        structures, count = self._smbios()
        device.add_file("etc/smbios/smbios-tables", structures)
        device.add_file("etc/smbios/smbios-anchor", smbios.anchor(structures, count, 0))

    def _acpi_files(self) -> dict[str, bytes]:
        files = acpi.firmware_files(self.platform())
        tables = files[acpi.TABLES_FILE]
        # Firmware learns the size before it sets up what the tables tell of: numbers may get longer until then.
        self._tables_size = self._tables_size or -(-(len(tables) + TABLES_SLACK) // PAGE_SIZE) * PAGE_SIZE
        files[acpi.TABLES_FILE] = tables.ljust(self._tables_size, b"\0")
        return files

    @property
    def _blocks(self) -> list[tuple[int, int]]:
        return [(block.base, block.size) for block in self.memory.blocks]

    def _smbios(self) -> tuple[bytes, int]:
        return smbios.tables(self.identity, self.config.cpus, self._blocks, *self.cpu_identity())

    def _prepare_memory(self, bridge: PciDevice, pam: int) -> None:
        """What firmware does to memory: all is RAM, by the PAM registers at *pam* of *bridge*, with SMBIOS in it."""
        for register in range(REGISTERS):
            bridge.config_write(pam + register, 1, READ_WRITE)
        structures, count = self._smbios()
        address = SMBIOS_ADDRESS + SMBIOS_ANCHOR_ROOM
        self.memory.write(SMBIOS_ADDRESS, smbios.anchor(structures, count, address))
        self.memory.write(address, structures)

    @property
    def identity(self) -> Identity:
        """What DMI says of this machine."""
        return Identity(product=self.name, uuid=self.properties.get("uuid"))

    def press_power_button(self) -> None:
        """The fixed power button of ACPI."""
        self.acpi_pm.press_power_button()

    def _add_root_bus(self) -> PciBus:
        self.pci = PciBus("pci.0", Decoder(self.ports, self.mmio), self._intx, self.send_msi)
        address = self.port_cell(CONFIG_PORTS, 4, mask=ADDRESS)
        self.ports.place(CONFIG_PORTS, 8, ConfigPorts(self.pci, self.reset, address), "pci-config")
        self.hotplug = HotPlug(self)
        return self.pci

    def _describe_slots(self) -> bytes:
        chips = self.hotplug.chips()
        return dsdt.hot_plug_slots(SLOTS_PORT, tuple(slot for slot in range(SLOTS) if slot not in chips))

    @abstractmethod
    def _intx(self, slot: int, pin: int, level: int) -> None:
        """A pin of a slot on the root bus changed; the board's south bridge routes it."""

    def _pm_registers(self) -> BusDevice:
        self.acpi_pm = AcpiPm(self.power_off, self.sci())
        return self.acpi_pm

    @property
    def highest_address(self) -> int:
        """That of the high window."""
        return self.high_window.last

    @property
    def high_window(self) -> Window:
        """Where 64-bit BARs go: 32 GiB, aligned so, above RAM."""
        end = max(block.base + block.size for block in self.memory.blocks)
        first = max(1, -(-end // HIGH_WINDOW_UNIT)) * HIGH_WINDOW_UNIT
        return Window(first, first + HIGH_WINDOW_SIZE - 1)

    @property
    def windows(self) -> list[Window]:
        """All memory that the root passes on: what lies before and behind the configuration space, and above RAM."""
        if self.config.firmware is None:
            return [LOW_WINDOW, self.high_window]
        # Each firmware gives out addresses by rules of its own: it may have all that RAM leaves.
        first, hole = -(-self.memory.low_end // WINDOW_UNIT) * WINDOW_UNIT, self.ecam_window
        low = [Window(first, LOW_WINDOW.last)]
        if hole is not None:
            low = [Window(first, hole.first - 1), Window(hole.last + 1, LOW_WINDOW.last)]
        return [window for window in low if window.first < window.last] + [self.high_window]

    @property
    def ecam_window(self) -> Window | None:
        """Where configuration space shows in memory, None on a board where it does not."""
        return None

    def _assign_addresses(self) -> None:
        pci_setup.assign(self.pci, LOW_WINDOW, self.high_window, self._interrupt_line)

    @abstractmethod
    def _interrupt_line(self, slot: int, pin: int) -> int:
        """The ISA interrupt or GSI of a slot's pin, as firmware notes it."""
