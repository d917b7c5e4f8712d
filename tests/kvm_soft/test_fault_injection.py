"""Whatever fails while something is made, nothing of it is left behind: modules, processors, VMs, vCPUs.

Each way to get something from the host (descriptors, memory, mappings) and each step of the vendor module is a failure
point. An operation is done again and again, and its first point fails, then its second, until none is left to fail.
"""

from __future__ import annotations

import errno
import gc
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kvm_soft.conftest import own_pool

from vmonty import kvm
from vmonty.base.errors import KvmError
from vmonty.base.ram import Ram
from vmonty.kvm.api import Vm
from vmonty.kvm.soft import modules, pcpu
from vmonty.kvm.soft.kvm_main import Kvm
from vmonty.kvm.soft.mmu.shadow import ShadowMmu
from vmonty.kvm.uapi import Cap, Requests
from vmonty.testing.guests import RAM_SIZE, Mode, TinyGuest

LINES = ["kvm_intel", "kvm_amd", "kvm_intel ept=0", "kvm_amd npt=0"]
HOST = ((os, "memfd_create"), (os, "ftruncate"), (os, "dup"), (mmap, "mmap"))
VENDOR = ("hardware_setup", "check_processor_compatibility", "hardware_enable", "mmu_create", "vcpu_create")


class Injector:
    """Has the failure point with number *failing* fail, of those that are passed; *passed* names them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._thread = threading.get_ident()
        self.failing = -1
        self.passed: list[str] = []
        where, attribute = modules.VENDORS[name]
        vendor = getattr(__import__(where, fromlist=[attribute]), attribute)
        for holder, function in (*HOST, *((vendor, step) for step in VENDOR)):
            monkeypatch.setattr(holder, function, self._point(function, getattr(holder, function)))

    def _point(self, name: str, good: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            if threading.get_ident() == self._thread and self.failing >= 0:
                self.passed.append(name)
                if len(self.passed) > self.failing:
                    raise OSError(errno.ENOMEM, f"injected into {name}")
            return good(*args, **named)

        return call

    def each_fails(self, operation: Callable[[], Any], left: Callable[[], Any]) -> tuple[Any, list[str]]:
        """What *operation* gives in the end, and its points; *left* tells what must be the same after each failure."""
        before = left()
        for number in itertools.count():
            self.failing, self.passed = number, []
            try:
                made = operation()
            except KvmError as error:
                code = error.errno
            else:
                return made, self.passed
            finally:
                self.failing = -1
            # Behind the handler: an exception holds what its frames held.
            assert (code, left()) == (errno.ENOMEM, before), f"after point {number}: {self.passed[-1]}"
        raise AssertionError


@pytest.fixture(params=LINES)
def line(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[pcpu.PhysicalCpus]:
    """Two processors of three that there can be, and no module."""
    with own_pool(monkeypatch, limit=3, online=2) as made:
        yield made


@pytest.fixture
def injector(pool: pcpu.PhysicalCpus, line: str, monkeypatch: pytest.MonkeyPatch) -> Injector:
    return Injector(monkeypatch, line.split()[0])


def footprint(pool: pcpu.PhysicalCpus) -> dict[str, Any]:
    """All that could be left behind, in the process and in the module."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    found: dict[str, Any] = {
        "files": len(os.listdir("/proc/self/fd")),
        "mappings": maps.count("vmonty-") + maps.count("kvm"),
        "threads": threading.active_count(),
        "processors": [(one.number, one.virtualization is None, one.holder, one.running) for one in pool],
        "waiting": pool.contended,
        "notifiers": (len(pool.hotplug_states), len(pool.reboot_notifiers), len(pool.syscore_ops)),
    }
    if (module := modules.loaded()) is not None:
        ops: Any = module.ops
        found |= {"references": module.references, "VMs": [vm_footprint(vm) for vm in module.vm_list]}
        if module.name == "kvm_intel":
            found["VPIDs"] = ops._next_vpid - len(ops._free_vpids)
    return found


def vm_footprint(vm: Kvm) -> dict[str, Any]:
    return {
        "users": vm.users_count,
        "vCPUs": (vm.created_vcpus, list(vm.vcpus)),
        "APICs": len(vm.irqs.apics),
        "tables": vm.mmu.tables.used if isinstance(vm.mmu, ShadowMmu) else vm.mmu.pages,
    }


def load(line: str) -> modules.Module:
    name, parameters = modules.parse(line)
    return modules.load(name, **parameters)


def works(vm: Vm, ram: Ram) -> None:
    """A vCPU of it runs."""
    with vm.create_vcpu(0) as vcpu:
        assert TinyGuest(vm, vcpu, ram).load(Mode.LONG, "mov al, 42\n out 0x10, al").out() == (0x10, 42)


def test_loading(injector: Injector, pool: pcpu.PhysicalCpus, line: str) -> None:
    _, points = injector.each_fails(lambda: load(line), lambda: footprint(pool))
    assert points.count("check_processor_compatibility") == points.count("hardware_enable") == 2
    assert {"hardware_setup", "memfd_create", "mmap"} <= set(points)
    modules.unload(line.split()[0])
    assert [processor.virtualization for processor in pool] == [None, None]


def test_a_processor_that_comes_up(injector: Injector, pool: pcpu.PhysicalCpus, line: str) -> None:
    load(line)

    def online() -> None:
        try:
            pool.online(2)
        except OSError as error:
            raise KvmError(error.errno or 0, "online", "") from error

    _, points = injector.each_fails(online, lambda: footprint(pool))
    assert {"check_processor_compatibility", "hardware_enable"} <= set(points)
    assert all(processor.virtualization for processor in pool)
    assert len(pool) == 3


def test_the_device_a_vm_and_vcpus(injector: Injector, pool: pcpu.PhysicalCpus, line: str) -> None:
    load(line)
    system, points = injector.each_fails(lambda: kvm.open("soft"), lambda: footprint(pool))
    assert "memfd_create" in points
    vm, points = injector.each_fails(system.create_vm, lambda: footprint(pool))
    assert {"mmu_create", "memfd_create", "mmap"} <= set(points)
    ram = Ram(RAM_SIZE)
    vm.set_user_memory_region(0, 0, ram)
    vm.create_irqchip()
    vm.enable_cap(Cap.DIRTY_LOG_RING, 4096)
    # The ioctl alone: what user space does with the vCPU is its own.
    vcpu, points = injector.each_fails(lambda: vm.ioctl(Requests.KVM_CREATE_VCPU, 1), lambda: footprint(pool))
    assert {"vcpu_create", "memfd_create", "ftruncate", "mmap"} <= set(points)
    works(vm, ram)
    vm.provider.close(vcpu)
    vm.close()
    system.close()
    assert footprint(pool)["references"] == 0


def test_a_wake_up_that_fails(pool: pcpu.PhysicalCpus, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host goes on with what did wake up, and says what did not; guests run nowhere else."""
    load(line)
    name = line.split()[0]
    with kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            guest = TinyGuest(vm, vcpu, ram).load(Mode.LONG, "again: out 0x10, al\n inc al\n jmp again")
            guest.out()
            pool.suspend()
            with monkeypatch.context() as patch:
                Injector(patch, name).failing = 0
                with pytest.raises(OSError, match="injected"):
                    pool.resume()
            assert [processor.number for processor in pool] == [0]
            assert next(iter(pool)).virtualization is None
            with pytest.raises(KvmError) as caught:
                vcpu.run()
            assert caught.value.errno == errno.EIO
            pool.online(1)
            pool.offline(0)
            assert guest.out() == (0x10, 1)
            pool.online(0)


def test_one_that_cannot_start_is_not_waited_for(
    pool: pcpu.PhysicalCpus, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processors hold a vCPU, the third does not start: the third vCPU takes one of the two."""
    module = load(line)
    good = type(module.ops).hardware_enable

    def refuse(self: Any, processor: pcpu.PhysicalCpu) -> None:
        if processor.number == 2:
            raise OSError(errno.EIO, "injected")
        good(self, processor)

    monkeypatch.setattr(type(module.ops), "hardware_enable", refuse)
    with kvm.open("soft") as system, system.create_vm() as vm:
        ram = Ram(RAM_SIZE)
        vm.set_user_memory_region(0, 0, ram)
        for number in range(3):
            with vm.create_vcpu(number) as vcpu:
                assert TinyGuest(vm, vcpu, ram).load(Mode.LONG, f"mov al, {number}\n out 0x10, al").out()[1] == number
    assert len(pool) == 2
