"""A guest is told of the flaws that its processor does not have, and of no others."""

from __future__ import annotations

import pytest

from vmonty import kvm
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules
from vmonty.kvm.soft.arch_capabilities import BITS, capabilities
from vmonty.testing.guests import RAM_SIZE, Mode, TinyGuest

MSR, CPUID_BIT = 0x10A, 1 << 29


def test_what_the_host_has_or_does_not_know_is_not_denied() -> None:
    assert capabilities(lambda name: "Mitigation: PTI") == 0
    assert capabilities(lambda name: "") == 0
    assert capabilities({**dict.fromkeys(BITS, "Vulnerable"), "mds": "Not affected"}.__getitem__) == 1 << 5
    assert capabilities(lambda name: "Not affected") == 0x400000000C00E179


@pytest.mark.parametrize("module", ["kvm_intel", "kvm_amd"])
def test_guest_reads_it(module: str) -> None:
    with modules.only(module), kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            leaf = next(leaf for leaf in system.supported_cpuid() if (leaf.function, leaf.index) == (7, 0))
            assert leaf.edx & CPUID_BIT
            code = f"mov ecx, {MSR}\n rdmsr\n out 0x10, eax\n mov eax, edx\n out 0x10, eax"
            low, high = TinyGuest(vm, vcpu, ram).load(Mode.LONG, code).outs(2)
            assert low | high << 32 == capabilities()
            assert vcpu.get_msrs([MSR]) == {MSR: capabilities()}
