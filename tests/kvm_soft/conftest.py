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
