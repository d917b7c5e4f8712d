"""INIT and start-up IPIs. SDM, "Processor State After Reset", "Multiple-Processor Initialization"."""

from __future__ import annotations

import threading
import time

import pytest
from tests.cpu import svm_guest, vmx_guest
from tests.cpu.machine import CODE, Machine

from vmonty.base.ram import Ram
from vmonty.cpu.core import Cpu
from vmonty.cpu.svm import Svm
from vmonty.cpu.vmcb import ExitCode
from vmonty.cpu.vmcs import REVISION, Field
from vmonty.cpu.vmx import Vmx

AP, BSP = 0xFEE00800, 0xFEE00900
REASON_INIT, REASON_SIPI = 3, 4
HLT, WAIT_FOR_SIPI = 1, 3
R_INIT, SX = 2, 30
WHERE_AM_I = b"\x8c\xc8\x0f\x20\xc3\xf4"  # mov ax, cs; mov ebx, cr0; hlt


@pytest.fixture
def machine() -> Machine:
    """In 64-bit mode; LSTAR and DR0 hold something."""
    machine = Machine().long_mode()
    machine["apic_base"], machine["lstar"], machine["dr0"], machine["rax"] = AP, 0x1234, 0x5678, 0x9ABC
    return machine


def test_init_then_a_startup_ipi(machine: Machine) -> None:
    machine["cr0"] |= 0x40000000  # CD stays, NW is 0
    machine.cpu.init()
    assert machine.run(b"\xeb\xfe") == "halt"
    assert machine["activity"] == WAIT_FOR_SIPI
    assert [machine[name] for name in ("cr0", "cr3", "cr4", "efer")] == [0x40000010, 0, 0, 0]
    assert (machine["rflags"], machine["rip"]) == (2, 0xFFF0)
    assert [machine[name] for name in ("rax", "rdx", "dr0", "dr7", "lstar")] == [0, 0x600, 0, 0x400, 0x1234]
    assert machine.segment("cs").base == 0xFFFF0000
    assert machine.segment("tr").limit == 0xFFFF
    machine.ram.write(0x7000, WHERE_AM_I)
    assert machine.cpu.run() == "halt"  # it waits
    assert machine["rip"] == 0xFFF0
    machine.cpu.startup(7)
    assert machine.cpu.run() == "halt"
    assert (machine["rax"], machine["rbx"], machine["rip"]) == (0x700, 0x40000010, 6)
    assert machine["activity"] == HLT


def test_from_another_thread(machine: Machine) -> None:
    """A processor in a loop, as another one's INIT and SIPI reach it."""
    machine.ram.write(0x7000, WHERE_AM_I)

    def send() -> None:
        time.sleep(0.05)
        machine.cpu.init()
        while machine["activity"] != WAIT_FOR_SIPI:
            time.sleep(0.001)
        machine.cpu.startup(7)

    sender = threading.Thread(target=send)
    sender.start()
    assert machine.run(b"\xeb\xfe") == "halt"
    sender.join()
    assert machine.cpu.run() == "halt"
    assert machine["rax"] == 0x700


def test_the_boot_processor_begins_at_the_reset_vector(machine: Machine) -> None:
    rom = Ram(0x10000)
    rom.write(0xFFF0, b"\xb8\x34\x12\xf4")
    machine.cpu.add_region(0xFFFF0000, rom.view(0, 0x10000))
    machine["apic_base"] = BSP
    machine.cpu.init()
    assert machine.run(b"\xeb\xfe") == "halt"
    assert (machine["rax"], machine["rip"]) == (0x1234, 0xFFF4)


def test_a_startup_ipi_is_for_those_that_wait(machine: Machine) -> None:
    machine.cpu.startup(7)
    assert machine.run(b"\x90\xf4") == "halt"
    assert machine["rip"] == CODE + 2
    assert machine["mode"] == Machine().long_mode()["mode"]


def test_vmx_root_operation_blocks_init(machine: Machine) -> None:
    region = Ram(4096)
    region.write_u32(0, REVISION)
    vmx = Vmx(machine.cpu)
    vmx.vmxon(region.address)
    machine.cpu.init()
    assert machine.run(b"\x90\xf4") == "halt"
    assert machine["rip"] == CODE + 2
    vmx.vmxoff()
    assert machine.run(b"\x90\xf4") == "halt"
    assert machine["activity"] == WAIT_FOR_SIPI


@pytest.mark.parametrize("activity", [0, HLT, 2])
def test_init_leaves_a_vmx_guest(activity: int) -> None:
    guest = vmx_guest.Guest()
    guest[Field.GUEST_ACTIVITY_STATE] = activity
    guest.cpu.init()
    assert guest.run("ebfe") == REASON_INIT
    assert guest[Field.GUEST_ACTIVITY_STATE] == activity


def test_a_vmx_guest_that_waits_for_sipi() -> None:
    """INIT is blocked there; the SIPI's vector is the qualification."""
    guest = vmx_guest.Guest()
    guest[Field.GUEST_ACTIVITY_STATE] = WAIT_FOR_SIPI
    guest.cpu.init()
    guest.cpu.startup(0x9A)
    assert guest.run("f4") == REASON_SIPI
    assert guest.qualification == 0x9A
    guest[Field.GUEST_ACTIVITY_STATE] = 0
    assert guest.run("f4") == REASON_INIT  # it has waited


def test_init_leaves_an_svm_guest_that_intercepts_it() -> None:
    guest = svm_guest.Guest()
    guest.vmcb.intercept(ExitCode.INIT)
    guest.cpu.init()
    assert guest.run("f4") == ExitCode.INIT
    assert guest.run("f4") == ExitCode.INIT  # it goes on waiting


def test_redirected_init_is_a_security_exception(machine: Machine) -> None:
    """APM, "INIT Support": with VM_CR.R_INIT it raises #SX with an error code of 1."""
    Svm(machine.cpu)
    wrmsr = bytes.fromhex("b9140101c0b80200000031d20f30")  # mov ecx, VM_CR; mov eax, R_INIT; xor edx, edx; wrmsr
    assert machine.run(wrmsr + b"\xf4") == "halt"
    machine.cpu.init()
    assert machine.run(b"\xeb\xfe") == "halt"
    assert machine.handler == SX
    assert machine.stack(2) == [1, CODE]


def test_nmi(machine: Machine) -> None:
    machine.cpu.nmi()
    assert machine.run(b"\xeb\xfe") == "halt"
    assert machine.handler == 2


def test_a_processor_begins_as_after_reset() -> None:
    cpu = Cpu(1 << 20)
    assert (cpu["rip"], cpu["rdx"], cpu["rflags"]) == (0xFFF0, 0x600, 2)
