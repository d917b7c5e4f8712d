"""What tests of the software KVM share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vmonty import kvm
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules, pcpu
from vmonty.testing.guests import RAM_SIZE, TinyGuest


@pytest.fixture(params=["kvm_intel", "kvm_amd"])
def guest(request: pytest.FixtureRequest) -> Iterator[TinyGuest]:
    """A guest of each vendor module."""
    with modules.only(request.param), kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            yield TinyGuest(vm, vcpu, ram)


TSC_DEADLINE = 1 << 24  # of CPUID 1's ECX; KVM leaves it to user space to offer


@contextmanager
def with_irqchip(module: str, **parameters: int | bool) -> Iterator[TinyGuest]:
    """A guest of *module*, loaded with *parameters*, that has the KVM's interrupt controllers and TSC deadlines."""
    with modules.only(module, **parameters), kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        vm.create_irqchip()
        with vm.create_vcpu() as vcpu:
            leaves = system.supported_cpuid()
            vcpu.set_cpuid2(
                [leaf._replace(ecx=leaf.ecx | TSC_DEADLINE) if leaf.function == 1 else leaf for leaf in leaves]
            )
            yield TinyGuest(vm, vcpu, ram)


@contextmanager
def own_pool(monkeypatch: pytest.MonkeyPatch, limit: int, online: int) -> Iterator[pcpu.PhysicalCpus]:
    """A pool of a test's own, with *online* of *limit* processors, and no module."""
    monkeypatch.setattr(modules, "_loaded", None)
    made = pcpu.PhysicalCpus(limit=limit)
    for number in range(online):
        made.online(number)
    monkeypatch.setattr(pcpu, "POOL", made)
    yield made
    made.thaw()
    if (module := modules.loaded()) is not None:
        modules.unload(module.name)
