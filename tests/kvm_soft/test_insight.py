"""What a KVM in software shows beyond the ABI."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from vmonty import kvm
from vmonty.base.errors import KvmUnsupported
from vmonty.base.ram import Ram
from vmonty.kvm.api.provider import insight
from vmonty.kvm.linux import LinuxKvm
from vmonty.kvm.soft import modules
from vmonty.kvm.soft.insight import ExitRecord
from vmonty.testing.guests import CODE, DATA, PML4, RAM_SIZE, Mode, TinyGuest


@pytest.fixture(params=["kvm_intel", "kvm_amd", "kvm_intel ept=0", "kvm_amd npt=0"])
def line(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def guest(line: str) -> Iterator[TinyGuest]:
    name, parameters = modules.parse(line)
    with modules.only(name, **parameters), kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            made = TinyGuest(vm, vcpu, ram)
            yield made.load(Mode.LONG, f"mov al, [abs {DATA}]\n cpuid\n out 0x10, al\n jmp $")


def test_a_control_block_by_field_names(guest: TinyGuest, line: str) -> None:
    guest.out()
    if line.startswith("kvm_amd"):
        fields = guest.vcpu.dump_vmcb()
        assert (fields["EXITCODE"], fields["EXITINFO1"] >> 16) == (0x7B, 0x10)
        assert (fields["CR3"] == PML4) == ("npt=0" not in line)
        assert CODE <= fields["RIP"] < CODE + 64
        return
    fields = guest.vcpu.dump_vmcs()
    assert fields["VM_EXIT_REASON"] == 30
    assert (fields["GUEST_CR3"] == PML4) == ("ept=0" not in line)
    assert fields["GUEST_CS_AR_BYTES"] >> 13 & 1 == 1
    assert fields["EXIT_QUALIFICATION"] >> 16 == 0x10


def test_every_step_of_an_address(guest: TinyGuest, line: str) -> None:
    guest.out()
    told = guest.vm.translate(DATA + 5, guest.vcpu)
    assert (told.gpa, told.hva) == (DATA + 5, guest.ram.address + DATA + 5)
    assert told.hpa == told.hva, "in the software's machine memory is where the process has it"
    tables = [step.table for step in told.steps]
    ours = "shadow" if line.endswith("=0") else "host"
    assert tables.count(ours) == 4
    assert tables.index("guest") < tables.index("slot") < tables.index(ours)
    assert told.steps[0].address == PML4
    # Each entry names the table that the next one is in.
    for kind in ("guest", ours):
        steps = [step for step in told.steps if step.table == kind]
        for step, following in itertools.pairwise(steps):
            assert step.value & 0xF_FFFF_FFFF_F000 == following.address & ~0xFFF
            assert step.level == following.level + 1


def test_an_address_in_real_mode(line: str) -> None:
    """There is no table of the guest; the processor walks ours, in either way of paging."""
    name, parameters = modules.parse(line)
    with modules.only(name, **parameters), kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            TinyGuest(vm, vcpu, ram).load(Mode.REAL, "out 0x10, al\n jmp $").out()
            told = vm.translate(CODE, vcpu)
            assert (told.gpa, told.hpa) == (CODE, ram.address + CODE)
            assert {step.table for step in told.steps} == {"slot", "host"}


def test_an_address_that_is_not_mapped(guest: TinyGuest) -> None:
    guest.out()
    told = guest.vm.translate(1 << 46, guest.vcpu)
    assert (told.gpa, told.hva, told.hpa) == (None, None, None)
    assert told.steps[-1].value & 1 == 0


def test_each_exit_is_traced_until_it_is_switched_off(guest: TinyGuest, line: str) -> None:
    seen: list[ExitRecord] = []
    guest.vm.trace(seen.append)
    guest.out()
    guest.vm.trace(None)
    names = [record.name for record in seen]
    assert names[-2:] == ["CPUID", "IOIO" if line.startswith("kvm_amd") else "IO_INSTRUCTION"]
    assert CODE <= seen[-1].rip < CODE + 64
    assert seen[-1].qualification >> 16 == 0x10
    assert all(record.entered_ns <= record.left_ns for record in seen)


def test_linux_cannot_show_it() -> None:
    with pytest.raises(KvmUnsupported, match="--accel soft"):
        insight(LinuxKvm(), "trace")
