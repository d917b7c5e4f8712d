"""Every type that can be named on a command line: machines, accelerators, CPU models, devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmonty.base.cpu_models import MODELS
from vmonty.base.errors import UsageError
from vmonty.kvm.api import System
from vmonty.vmm.accel import ACCELERATORS
from vmonty.vmm.boards import board_class
from vmonty.vmm.boards.ports import COM_PORTS
from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.hw.debug_ports import DEBUG_CONSOLE, DebugConsole, DebugExit
from vmonty.vmm.hw.serial import Serial
from vmonty.vmm.machine import Config, Machine
from vmonty.vmm.peripherals import add_virtio
from vmonty.vmm.qom import Property, TypeInfo, TypeRegistry, boolean, number

# The makers import what they make: a machine without it should not wait for its code.
if TYPE_CHECKING:
    from uuid import UUID

    from vmonty.vmm.hw.pci import PcieRootPort
    from vmonty.vmm.hw.vga.card import VgaCard
    from vmonty.vmm.virtio.device import VirtioDevice


def _uuid(text: str) -> UUID:
    from uuid import UUID  # which looks for the platform first

    try:
        return UUID(text)
    except ValueError:
        raise ValueError("a UUID such as 01234567-89ab-cdef-0123-456789abcdef") from None


def _up_to(most: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not 0 <= (value := number(text)) <= most:
            raise ValueError(f"a number from 0 to {most}")
        return value

    return convert


def _board(name: str) -> Callable[..., Machine]:
    def make(system: System, config: Config, console: Callable[[bytes], None], **properties: Any) -> Machine:
        return board_class(name)(system, config, console, properties)

    return make


HPET = Property("hpet", "the high precision event timer", True, boolean)
MACHINES = (
    TypeInfo("machine", abstract=True, help="a whole computer"),
    TypeInfo(
        "x86-machine", "machine", abstract=True,
        properties=(Property("uuid", "the machine's UUID, which DMI shows", None, _uuid),),
    ),
    TypeInfo("pc", "x86-machine", "i440FX and PIIX3, PCI", properties=(HPET,), make=_board("pc")),
    TypeInfo(
        "q35", "x86-machine", "Q35 and ICH9, PCI Express", make=_board("q35"),
        properties=(HPET, Property("root-ports", "PCI Express root ports", 0, _up_to(16))),
    ),
    TypeInfo("microvm", "x86-machine", "virtio-mmio, no PCI, no legacy: boots fastest", make=_board("microvm")),
)  # fmt: skip

ACCELS = (
    TypeInfo("accel", abstract=True, help="what runs the vCPUs"),
    *(TypeInfo(name, "accel", f"KVM provider {provider}") for name, provider in ACCELERATORS.items()),
)

CPUS = (
    TypeInfo("cpu", abstract=True),
    TypeInfo("x86-cpu", "cpu", abstract=True, class_properties={"width": 64}),
    *(
        TypeInfo(
            name, "x86-cpu", model.brand,
            class_properties={"vendor": model.vendor, "family": model.family, "model": model.model},
        )
        for name, model in MODELS.items()
    ),
)  # fmt: skip


# ---- devices of the boards themselves; virtio's stand in virtio/ --------------------------------------------------


def _file_output(machine: Machine, file: str, what: str) -> Callable[[bytes], None]:
    from vmonty.vmm.outputfile import OutputFile

    path, begun = Path(file), machine.config.begun
    try:
        output = OutputFile(path, what, anew=path not in begun)
    except OSError as error:
        raise UsageError(f"{what}: {file} cannot be written: {error.strerror}") from error
    begun.add(path)
    machine.resources.callback(output.close)
    return output.write


def _debug_console(machine: Machine, iobase: int, file: str | None) -> DebugConsole:
    device = DebugConsole(machine.new_console() if file is None else _file_output(machine, file, "isa-debugcon"))
    machine.ports.place(iobase, 1, device, "isa-debugcon")
    return device


def _debug_exit(machine: Machine, iobase: int, iosize: int) -> DebugExit:
    device = DebugExit(machine.debug_exit)
    machine.ports.place(iobase, iosize, device, "isa-debug-exit")
    return device


def _serial(machine: Machine, index: int, file: str | None) -> Serial:
    if file is None:
        raise UsageError("isa-serial needs file=…, where its output goes")
    base, irq = COM_PORTS[index - 1]
    device = Serial(machine.lines.source(irq), _file_output(machine, file, "isa-serial"))
    machine.ports.place(base, 8, device, f"serial{index}")
    machine.serial_ports.append(index)
    return device


def _com(text: str) -> int:
    if not 2 <= (index := number(text)) <= len(COM_PORTS):
        raise ValueError(f"a number from 2 to {len(COM_PORTS)} (COM1 is the console)")
    return index


def _root_port(machine: Machine, id: str, slot: int | None) -> PcieRootPort:  # noqa: A002  # QEMU's word for it
    from vmonty.vmm.hw.pci import PcieRootPort

    port = PcieRootPort(id, slot or 0)
    machine.add_device(port, slot)
    return port


def _rng(machine: Machine) -> VirtioDevice:
    from vmonty.vmm.virtio.rng import Rng

    return _add(machine, Rng(machine.memory, machine.loop))


def _balloon(machine: Machine, deflate_on_oom: bool) -> VirtioDevice:
    from vmonty.vmm.virtio.balloon import Balloon

    if machine.balloon is not None:
        raise UsageError("virtio-balloon: this machine has one")
    device = Balloon(machine.memory, machine.loop, deflate_on_oom=deflate_on_oom)
    _add(machine, device)
    machine.balloon = device

    def removed() -> None:
        machine.balloon = None

    machine.resources.callback(removed)
    return device


def _port(machine: Machine, name: str, file: str | None) -> VirtioDevice:
    from vmonty.vmm.virtio.console import Console, Port

    if file is None:
        raise UsageError("virtio-serial needs file=…, where the port's output goes")
    port = Port(_file_output(machine, file, "virtio-serial"), name=name)
    return _add(machine, Console(machine.memory, machine.loop, [port]))


def _terminal(machine: Machine) -> VirtioDevice:
    from vmonty.vmm.virtio.console import Console, Port

    # A loop of its own: a terminal that is stopped holds the guest's console up, and nothing else.
    loop = EventLoop("virtio-console")
    loop.start()
    machine.resources.callback(loop.stop)
    machine.terminal = port = Port(machine.new_console(), console=True)
    return _add(machine, Console(machine.memory, loop, [port]))


def _add(machine: Machine, device: VirtioDevice) -> VirtioDevice:
    add_virtio(machine, device)
    return device


def _vga(machine: Machine, romfile: str | None) -> VgaCard:
    from vmonty.vmm.boards.pci_host import PciMachine
    from vmonty.vmm.boards.vga import add_vga

    if not isinstance(machine, PciMachine):
        raise UsageError(f"VGA: a {machine.name} has no PCI; take pc or q35")
    path = Path(romfile) if romfile is not None else VGA_BIOS
    try:
        rom = path.read_bytes()
    except OSError as error:
        if romfile is None and isinstance(error, FileNotFoundError):
            raise UsageError(f"there is no video BIOS at {path}: apt-get install seabios, or give romfile=") from None
        raise UsageError(f"VGA: the video BIOS {path} cannot be read: {error.strerror}") from error
    if not 0 < len(rom) <= MOST_VGA_BIOS:
        raise UsageError(f"VGA: the video BIOS {path} has {len(rom)} bytes; it must have 1 to {MOST_VGA_BIOS}")
    return add_vga(machine, rom)


PORT = _up_to(0xFFFF)
VGA_BIOS, MOST_VGA_BIOS = Path("/usr/share/seabios/vgabios-stdvga.bin"), 1 << 20
DEVICES = (
    TypeInfo("device", abstract=True),
    TypeInfo("isa-device", "device", abstract=True),
    TypeInfo("pci-device", "device", abstract=True),
    TypeInfo("virtio-device", "device", abstract=True),
    TypeInfo(
        "isa-debugcon", "isa-device", "firmware's debug console", make=_debug_console,
        properties=(
            Property("iobase", "its port", DEBUG_CONSOLE, PORT), Property("file", "where it goes; else the console"),
        ),
    ),
    TypeInfo(
        "isa-debug-exit", "isa-device", "ends with an exit status of the guest's", make=_debug_exit,
        properties=(Property("iobase", "its port", 0x501, PORT), Property("iosize", "its ports", 2, _up_to(8))),
    ),
    TypeInfo(
        "isa-serial", "isa-device", "a second to fourth serial port", make=_serial,
        properties=(Property("index", "2 for COM2 to 4 for COM4", 2, _com), Property("file", "where it writes")),
    ),
    TypeInfo(
        "pcie-root-port", "pci-device", "a PCI Express root port", make=_root_port,
        properties=(Property("id", "its name", "root-port"), Property("slot", "where it goes", None, _up_to(31))),
    ),
    TypeInfo(
        "VGA", "pci-device", "the display adapter: VGA, and linear modes", make=_vga,
        properties=(Property("romfile", "its video BIOS; else that of Debian's seabios package"),),
    ),
    TypeInfo("virtio-rng", "virtio-device", "random numbers of the host", make=_rng),
    TypeInfo(
        "virtio-balloon", "virtio-device", "gives memory back to the host", make=_balloon,
        properties=(Property("deflate-on-oom", "the guest takes pages back when it needs them", True, boolean),),
    ),
    TypeInfo("virtio-console", "virtio-device", "hvc0 on this terminal, which then types there", make=_terminal),
    TypeInfo(
        "virtio-serial", "virtio-device", "a named port of the guest's that writes to a file", make=_port,
        properties=(Property("name", "the port's name", "port"), Property("file", "where it writes")),
    ),
)  # fmt: skip

TYPES = TypeRegistry((*MACHINES, *ACCELS, *CPUS, *DEVICES))


def check(machine: str, devices: tuple[str, ...]) -> None:
    """Raise UsageError for a machine, device or property that does not exist, without making anything."""
    TYPES.create(machine, "machine")
    for text in devices:
        TYPES.create(text, "device")
