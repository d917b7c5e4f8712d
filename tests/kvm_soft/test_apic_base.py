"""What a guest and user space may do to IA32_APIC_BASE. SDM, "x2APIC State Transitions"."""

from __future__ import annotations

import pytest

from vmonty import kvm
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules
from vmonty.testing.guests import RAM_SIZE, Mode, TinyGuest

MSR, OFF, XAPIC, X2APIC = 0x1B, 0xFEE00100, 0xFEE00900, 0xFEE00D00


@pytest.mark.parametrize("module", ["kvm_intel", "kvm_amd"])
@pytest.mark.parametrize(("old", "new"), [(X2APIC, XAPIC), (OFF, X2APIC)])
def test_transitions_that_fault(module: str, old: int, new: int) -> None:
    """Only by the guest: user space restores whatever it saved."""
    with modules.only(module), kvm.open("soft") as system, system.create_vm() as vm:
        vm.create_irqchip()
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            vcpu.set_cpuid2(system.supported_cpuid())
            code = f"mov ecx, {MSR}\n xor edx, edx\n mov eax, {new}\n wrmsr\n rdmsr\n out 0x10, eax"
            guest = TinyGuest(vm, vcpu, ram).load(Mode.LONG, code, {13: "out 0x11, al"})
            vcpu.set_msrs({MSR: old})
            assert guest.out()[0] == 0x11
            assert vcpu.get_msrs([MSR]) == {MSR: old}
            vcpu.set_msrs({MSR: new})
            assert vcpu.get_msrs([MSR]) == {MSR: new}
