"""What all machines are: a VM with its RAM, buses, interrupt chips and vCPUs, and how its run ends.

A board (``vmonty.vmm.boards``) is a subclass that says in ``build`` what stands where.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from vmonty.base.closing import Closing
from vmonty.base.errors import UsageError
from vmonty.base.record import Record, made
from vmonty.kvm.api import CpuidEntry, PortCell, System, Vcpu
from vmonty.kvm.uapi import Cap, flags
from vmonty.kvm.uapi.irq import kvm_irq_routing_entry
from vmonty.vmm import cpu
from vmonty.vmm.boot import acpi, loader
from vmonty.vmm.bootorder import BootOrder
from vmonty.vmm.bus import Bus, BusDevice, PlainCell
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.firmware import BootOptions, Firmware
from vmonty.vmm.hw.serial import Serial
from vmonty.vmm.irq import InterruptLines, Line
from vmonty.vmm.memory import LOW_RAM_LIMIT, GuestMemory, check_size
from vmonty.vmm.messages import Messages
from vmonty.vmm.optionrom import OptionRom
from vmonty.vmm.outcome import Ending, Outcome
from vmonty.vmm.panicwatch import PanicWatch
from vmonty.vmm.removable import Removable
from vmonty.vmm.transmitter import Transmitter
from vmonty.vmm.vcpu import VcpuThread

if TYPE_CHECKING:
    from vmonty.vmm.display.screen import Screen
    from vmonty.vmm.hw.pci import PciDevice
    from vmonty.vmm.hw.ps2 import Ps2Keyboard, Ps2Mouse
    from vmonty.vmm.hw.vmmouse import VmMouse
    from vmonty.vmm.net.backend import NetBackend
    from vmonty.vmm.virtio.balloon import Balloon

# An xAPIC's ID is a byte, and 0xFF is everybody.
MOST_VCPUS = 255

# Three pages for kvm-intel's real mode and one for its identity map, out of the way of any RAM and ROM.
TSS_ADDRESS, IDENTITY_MAP_ADDRESS = 0xFEFF_D000, 0xFEFF_C000

MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS = 0x1A0, 1
APIC_LVT_LINT0, APIC_LVT_LINT1 = 0x350, 0x360
# The I/O APIC's pins come before.
FIRST_MESSAGE_GSI = 24
DELIVERY_NMI, DELIVERY_EXTINT = 4 << 8, 7 << 8


def pc_routing() -> list[kvm_irq_routing_entry]:
    """GSI → pins of a PC: 0 to 15 reach the PICs and the I/O APIC, 16 to 23 the I/O APIC; 0 is its pin 2."""

    def entry(gsi: int, chip: int, pin: int) -> kvm_irq_routing_entry:
        made = kvm_irq_routing_entry(gsi=gsi, type=flags.KVM_IRQ_ROUTING_IRQCHIP)
        made.u.irqchip.irqchip, made.u.irqchip.pin = chip, pin
        return made

    pics = [
        entry(gsi, flags.KVM_IRQCHIP_PIC_MASTER if gsi < 8 else flags.KVM_IRQCHIP_PIC_SLAVE, gsi % 8)
        for gsi in range(16)
        if gsi != 2  # the cascade
    ]
    pins = [entry(gsi, flags.KVM_IRQCHIP_IOAPIC, 2 if gsi == 0 else gsi) for gsi in range(24) if gsi != 2]
    return pics + pins


class Terminal(Protocol):
    """What the user's terminal is connected to: a serial port, or a virtio console. From any thread."""

    def receive(self, data: bytes) -> None:
        """Queue *data* for the guest."""
        ...

    def backlog(self) -> int:
        """How many bytes wait for the guest to take them."""
        ...


class MmioSlot(NamedTuple):
    """A place for one virtio-mmio device: where its registers stand, and its interrupt line (level-triggered)."""

    base: int
    size: int
    gsi: int
    line: Line


class Config(Record):
    """What a machine is made of; sizes in bytes. Raises UsageError and its kin for what no machine can have.

    It enters *kernel* directly, or starts *firmware*, which looks for something to boot as *boot* says. *machine* is a
    board with properties (``q35,root-ports=2``), *cpu* a model with flags (``Haswell,-pcid``), *devices* are devices by
    name (``isa-debug-exit,iobase=0xf4``): see ``vmonty.vmm.catalogue``. *option_roms* belong to no device: firmware
    runs them. *begun* are the files that devices have written to: machines that follow one another by resets share
    it, and append to them.
    """

    kernel: bytes | None = None
    initrd: bytes | None = None
    command_line: str = "console=ttyS0"
    memory: int = 512 << 20
    cpus: int = 1
    machine: str = "pc"
    cpu: str = cpu.DEFAULT
    devices: tuple[str, ...] = ()
    option_roms: tuple[OptionRom, ...] = ()
    firmware: Firmware | None = None
    boot: BootOptions = made(factory=BootOptions)
    begun: set[Path] = made(factory=set)

    def __post_init__(self) -> None:
        check_size(self.memory)
        if not 1 <= self.cpus <= MOST_VCPUS:
            raise UsageError(f"{self.cpus} vCPUs: a machine has 1 to {MOST_VCPUS}")
        cpu.check(self.cpu)
        if (self.kernel is None) == (self.firmware is None):
            raise UsageError("a machine boots a kernel, or what its firmware finds: give one of the two")
        if self.kernel is not None:
            loader.check(self.kernel, self.initrd, self.command_line, min(self.memory, LOW_RAM_LIMIT))


EMPTY: Mapping[str, Any] = MappingProxyType({})


class Machine(Closing, ABC):
    """A virtual machine on *system*. Add devices, then start it; use it with ``with``.

    *properties* are the board's, by name. *console* takes the serial output, on a vCPU's thread; devices do their
    work on ``loop``, the event loop's thread. Raises UsageError and its kin for a bad configuration, KvmError when
    KVM refuses something.
    """

    name: ClassVar[str]
    low_ram_limit: ClassVar[int] = LOW_RAM_LIMIT
    pit: ClassVar[bool] = True
    has_pci: ClassVar[bool] = False
    isa_hole: ClassVar[bool] = False  # is there none of the RAM from 0xA0000 to 0xFFFFF but what the board puts there?
    serial: Serial

    def __init__(
        self, system: System, config: Config, console: Callable[[bytes], None], properties: Mapping[str, Any] = EMPTY
    ) -> None:
        limit = system.check_extension(Cap.MAX_VCPUS) or system.check_extension(Cap.NR_VCPUS)
        if config.cpus > limit:
            raise UsageError(f"{config.cpus} vCPUs: this KVM takes 1 to {limit}")
        self.memory = GuestMemory(config.memory, self.low_ram_limit)
        cpuid = cpu.table_maker(system, config.cpu, config.cpus, self.highest_address)
        self._cpuid = cpuid(0)
        self.config = config
        self.properties = properties
        self._output = console
        self.screen: Screen | None = None
        self.keyboard: Ps2Keyboard | None = None
        self.mouse: Ps2Mouse | None = None
        self.pointer: VmMouse | None = None
        self.balloon: Balloon | None = None
        self._transmitter: Transmitter | None = None
        self._cells: list[PortCell] = []
        self._sees_all_ports = False
        self._done = threading.Event()
        self._outcome: Outcome | None = None
        self._outcome_lock = threading.Lock()
        self.vcpus: list[VcpuThread] = []
        self.panic = PanicWatch(self.vcpus, self._panicked)
        self.networks: list[NetBackend] = []  # what its cards are connected to
        self.boot_order = BootOrder()
        self.removable: dict[str, Removable] = {}  # drives whose media can be changed, by name
        self.serial_ports = [1]  # numbers of the COM ports
        self.loop = EventLoop("io")
        self.resources = contextlib.ExitStack()  # closed when the vCPUs have ended, before the loop does
        self.vm = system.create_vm()
        try:
            self._create_chips()
            self.memory.attach(self.vm, isa_hole=self.isa_hole)
            self.ports = Bus("the port space", 0x1_0000)
            self.mmio = Bus("the memory space", 1 << 52)
            self.lines = InterruptLines(self.vm)
            self.build()
            self.terminal: Terminal = self.serial
            for index in range(config.cpus):
                vcpu = self._create_vcpu(index, cpuid(index))
                self.vcpus.append(VcpuThread(vcpu, self.ports, self.mmio, self._end))
        except BaseException:
            self.close()
            raise

    # ---- what a board says -----------------------------------------------------------------------------------

    @property
    def highest_address(self) -> int:
        """The last guest-physical address that anything may have."""
        return max(block.base + block.size for block in self.memory.blocks) - 1

    @abstractmethod
    def build(self) -> None:
        """Place every chip: the board's build order."""

    @abstractmethod
    def platform(self) -> acpi.Platform:
        """What the ACPI tables tell of this board and the devices on it."""

    @abstractmethod
    def prepare(self) -> None:
        """Do to the chips what firmware would have done before a kernel starts."""

    def publish(self) -> None:
        """Tell firmware, before it starts, what there is. Raises UsageError on a board that cannot have any."""
        raise UsageError(f"a {self.name} has no firmware: give it a kernel, or take pc or q35")

    @abstractmethod
    def press_power_button(self) -> None:
        """Ask the guest to shut down. From any thread."""

    def add_device(self, device: PciDevice, slot: int | None = None) -> int:
        """Plug *device* into a PCI slot, the first free one unless *slot* is given; returns the slot.

        Before start(). Raises UsageError when the slot is taken, or the board has no PCI.
        """
        raise UsageError(f"{device.name}: a {self.name} has no PCI; choose the virtio-mmio form of the device")

    def plugging(self) -> AbstractContextManager[list[int]]:
        """What is added in this block may be removed while the machine runs, where the board can; gives its slots."""
        return contextlib.nullcontext([])

    def add_removable(self, drive: Removable) -> None:
        """A drive for CDs: the next name is its."""
        self.removable[f"cd{len(self.removable)}"] = drive

    def add_mmio_device(self, make: Callable[[MmioSlot], BusDevice]) -> BusDevice:
        """Let *make* build a device for the next free virtio-mmio slot, and place it; returns the device.

        Before start(). Raises UsageError when all slots are taken, or the board has none.
        """
        raise UsageError(f"a {self.name} has no virtio-mmio slots; choose the PCI form of the device")

    # ---- building ---------------------------------------------------------------------------------------------

    def _create_chips(self) -> None:
        vm = self.vm
        vm.set_identity_map_addr(IDENTITY_MAP_ADDRESS)
        vm.set_tss_addr(TSS_ADDRESS)
        vm.create_irqchip()
        # As a PC wires them: the PIT's line, GSI 0, is pin 2 of the I/O APIC.
        self.messages = Messages(vm, pc_routing(), FIRST_MESSAGE_GSI)
        self.resources.callback(self.messages.close)
        if self.pit:
            # Without port 0x61 in KVM a guest that calibrates by the PIT exits for each poll.
            vm.create_pit2(flags.KVM_PIT_SPEAKER_DUMMY)

    def send_msi(self, address: int, data: int) -> None:
        """Deliver a message-signalled interrupt. From any thread."""
        self.messages.send(address, data)

    def _create_vcpu(self, index: int, cpuid: Sequence[CpuidEntry]) -> Vcpu:
        vcpu = self.vm.create_vcpu(index)
        try:
            self._configure(vcpu, cpuid)
        except BaseException:
            vcpu.close()
            raise
        return vcpu

    def add_console(self, base: int, irq: int, *, polled: bool = False) -> Serial:
        """Place the UART whose output is the console; where KVM can answer for it, most bytes cost no exit."""
        output, window = self.new_console(), self.vm.port_window(base)
        if window is not None:
            self._transmitter = Transmitter(window, output, self._console_failed, "serial")
            self.resources.callback(self._transmitter.close)
            output = self._transmitter.send
        serial = Serial(self.lines.source(irq), output, polled=polled, window=window)
        self.ports.place(base, 8, serial, "serial")
        return serial

    def port_cell(self, port: int, size: int, value: int = 0, mask: int = 0) -> PortCell:
        """What holds *value* for the device at *port*; where KVM can answer for it, plain accesses cost no exit."""
        cell = self.vm.port_cell(port, size, value, mask) or PlainCell(value)
        if self._sees_all_ports:
            cell.hide()
        self._cells.append(cell)
        return cell

    def see_all_ports(self) -> None:
        """From now on every access to a port is an exit, also those that KVM could answer. From any thread."""
        self._sees_all_ports = True
        self.serial.hide()
        for cell in self._cells:
            cell.hide()

    def _console_failed(self, error: Exception) -> None:
        detail = f"internal error at the console: {type(error).__name__}: {error}"
        self._end(Outcome(Ending.ERROR, detail))

    def flush_console(self) -> None:
        """Hand on what the guest has sent up to now, as far as it does not run. From any thread."""
        if self._transmitter is not None:
            self._transmitter.flush()

    def cpu_identity(self) -> tuple[int, int]:
        """EAX and EDX of CPUID leaf 1: signature and features, as SMBIOS tells them."""
        return next(((entry.eax, entry.edx) for entry in self._cpuid if entry.function == 1), (0, 0))

    @staticmethod
    def _configure(vcpu: Vcpu, cpuid: Sequence[CpuidEntry]) -> None:
        vcpu.set_cpuid2(cpuid)
        vcpu.set_msrs({MSR_MISC_ENABLE: MISC_ENABLE_FAST_STRINGS})
        # As firmware leaves it: the PIC on LINT0, NMI on LINT1.
        lapic = vcpu.get_lapic()
        registers = memoryview(lapic.regs).cast("B")
        for offset, mode in ((APIC_LVT_LINT0, DELIVERY_EXTINT), (APIC_LVT_LINT1, DELIVERY_NMI)):
            registers[offset : offset + 4] = mode.to_bytes(4, "little")
        vcpu.set_lapic(lapic)

    def power_off(self) -> None:
        """The guest powered off. From any thread."""
        self._end(Outcome(Ending.POWER_OFF, "the guest powered off"))

    def reset(self) -> None:
        """The guest asked for a reset. From any thread."""
        self._end(Outcome(Ending.RESET, "the guest asked for a reset"))

    def exiting_vcpu(self) -> Vcpu | None:
        """The vCPU whose exit is handled on this thread: for devices that answer in its registers."""
        return next((thread.vcpu for thread in self.vcpus if thread.on_thread()), None)

    def press_reset_button(self) -> None:
        """Reset it from outside: no panic asks for that. From any thread."""
        self.panic.seen = False
        self.reset()

    def debug_exit(self, status: int) -> None:
        """The guest ends the machine with an exit status of its own."""
        self._end(Outcome(Ending.DEBUG_EXIT, f"the guest ended with status {status}", status=status))

    def new_console(self) -> Callable[[bytes], None]:
        """What one console prints goes this way: from any thread, but one at a time; as long as its reader takes."""
        read = self.panic.reader()

        def output(data: bytes) -> None:
            self._output(data)
            read(data)

        return output

    def panicked(self) -> None:
        """The guest's kernel reported its panic; on the thread of the vCPU that did."""
        self.flush_console()
        self._panicked(next((thread.registers() for thread in self.vcpus if thread.on_thread()), {}))

    def _panicked(self, registers: Mapping[str, int]) -> None:
        self._end(Outcome(Ending.PANICKED, self._panic_detail(), registers))

    def _panic_detail(self) -> str:
        reason = f": {self.panic.reason}" if self.panic.reason else ""
        return f"the guest's kernel panicked{reason}"

    def last(self, outcome: Outcome) -> Outcome:
        """*outcome*, when no machine comes after this one: a reset that a panic asked for is that panic."""
        if outcome.ending is Ending.RESET and self.panic.seen:
            return Outcome(Ending.PANICKED, f"{self._panic_detail()}; it asked for a reset")
        return outcome

    def _boot(self) -> None:
        """Let the firmware start; or do what it would do, and enter the kernel."""
        config = self.config
        if config.kernel is None:
            self.publish()
            return
        self.prepare()
        entry = loader.load(self.memory, config.kernel, config.initrd, config.command_line, self.platform())
        entry.enter(self.vcpus[0].vcpu)

    def _end(self, outcome: Outcome) -> None:
        if any(thread.on_thread() for thread in self.vcpus):
            # What the guest said before it ended. Others who end it do not wait for a slow reader.
            self.flush_console()
        with self._outcome_lock:
            if self._outcome is not None:
                return
            self._outcome = outcome
        for thread in self.vcpus:
            thread.stop()
        self._done.set()

    def start(self) -> None:
        """Load what is booted, and start all vCPUs. Call it once. Raises BootImageError, KvmError."""
        self._boot()
        self.loop.start()
        for thread in self.vcpus:
            thread.start()

    def stop(self, detail: str = "stopped") -> None:
        """End the run with Ending.STOPPED, unless it has ended. From any thread."""
        self._end(Outcome(Ending.STOPPED, detail))

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait *timeout* seconds for the end; None when it has not come."""
        return self._outcome if self._done.wait(timeout) else None

    def close(self) -> None:
        """Stop and join the vCPUs, and close everything. A second call does nothing."""
        self.stop()
        self.panic.close()
        for thread in self.vcpus:
            thread.join()
            thread.vcpu.close()
        try:
            self.resources.close()
        finally:
            self.loop.stop()
            self.vm.close()
