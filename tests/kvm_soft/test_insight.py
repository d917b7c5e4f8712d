"""What a KVM in software shows beyond the ABI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vmonty import kvm
from vmonty.base.errors import KvmUnsupported
from vmonty.base.ram import Ram
from vmonty.kvm.api.provider import insight
from vmonty.kvm.linux import LinuxKvm
from vmonty.kvm.soft.insight import ExitRecord
from vmonty.testing.guests import CODE, DATA, PML4, RAM_SIZE, Mode, TinyGuest


@pytest.fixture
def guest() -> Iterator[TinyGuest]:
    with kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            made = TinyGuest(vm, vcpu, ram)
            yield made.load(Mode.LONG, f"mov al, [abs {DATA}]\n cpuid\n out 0x10, al\n jmp $")


def test_a_control_block_by_field_names(guest: TinyGuest) -> None:
    guest.out()
    fields = guest.vcpu.dump_vmcs()
    assert fields["VM_EXIT_REASON"] == 30
    assert fields["GUEST_CR3"] == PML4
    assert fields["GUEST_CS_AR_BYTES"] >> 13 & 1 == 1
    assert fields["EXIT_QUALIFICATION"] >> 16 == 0x10


def test_every_step_of_an_address(guest: TinyGuest) -> None:
    guest.out()
    told = guest.vm.translate(DATA + 5, guest.vcpu)
    assert (told.gpa, told.hva) == (DATA + 5, guest.ram.address + DATA + 5)
    assert told.hpa == told.hva, "in the software's machine memory is where the process has it"
    tables = [step.table for step in told.steps]
    assert tables.count("host") == 4
    assert tables.index("guest") < tables.index("slot") < tables.index("host")
    assert told.steps[0].address == PML4


def test_an_address_that_is_not_mapped(guest: TinyGuest) -> None:
    guest.out()
    told = guest.vm.translate(1 << 46, guest.vcpu)
    assert (told.gpa, told.hva, told.hpa) == (None, None, None)
    assert told.steps[-1].value & 1 == 0


def test_each_exit_is_traced_until_it_is_switched_off(guest: TinyGuest) -> None:
    seen: list[ExitRecord] = []
    guest.vm.trace(seen.append)
    guest.out()
    guest.vm.trace(None)
    names = [record.name for record in seen]
    assert names[-2:] == ["CPUID", "IO_INSTRUCTION"]
    assert CODE <= seen[-1].rip < CODE + 64
    assert seen[-1].qualification >> 16 == 0x10
    assert all(record.entered_ns <= record.left_ns for record in seen)


def test_linux_cannot_show_it() -> None:
    with pytest.raises(KvmUnsupported, match="--accel soft"):
        insight(LinuxKvm(), "trace")
