"""Module life: order, parameters, and that whatever fails leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmonty import kvm
from vmonty.base.errors import KvmError, KvmUnavailable, UsageError
from vmonty.base.ram import Ram
from vmonty.kvm.soft import modules, pcpu
from vmonty.kvm.soft.vmx.main import KvmIntel
from vmonty.testing.guests import RAM_SIZE, Mode, TinyGuest

from .conftest import own_pool

CPUS = 3


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[pcpu.PhysicalCpus]:
    """A pool of three processors, and no module."""
    with own_pool(monkeypatch, CPUS, CPUS) as made:
        yield made


def footprint(pool: pcpu.PhysicalCpus) -> dict[str, Any]:
    """All that a module could leave behind."""
    gc.collect()
    return {
        "loaded": modules.loaded(),
        "virtualization": [processor.virtualization for processor in pool],
        "held": [processor.holder for processor in pool],
        "hotplug": list(pool.hotplug_states),
        "reboot": list(pool.reboot_notifiers),
        "syscore": list(pool.syscore_ops),
        "files": len(os.listdir("/proc/self/fd")),
        "mappings": Path("/proc/self/maps").read_text().count("vmonty-"),
    }


def test_loading_turns_virtualization_on_everywhere_and_unloading_off(pool: pcpu.PhysicalCpus) -> None:
    before = footprint(pool)
    module = modules.load("kvm_intel", vpid=False)
    assert all(processor.virtualization for processor in pool)
    assert module.parameters["vpid"] is False
    modules.unload("kvm_intel")
    del module
    assert footprint(pool) == before


def test_steps_are_left_in_exactly_the_reverse_order(monkeypatch: pytest.MonkeyPatch) -> None:
    trail: list[str] = []

    def traced(step: modules.Step) -> modules.Step:
        @contextmanager
        def around(module: modules.Module) -> Iterator[None]:
            with step(module):
                trail.append(step.__name__)
                yield
            trail.append(f"-{step.__name__}")

        return around

    names = [step.__name__ for step in modules.STEPS]
    monkeypatch.setattr(modules, "STEPS", tuple(map(traced, modules.STEPS)))
    modules.load("kvm_intel")
    modules.unload("kvm_intel")
    assert trail == [*names, *(f"-{name}" for name in reversed(names))]


@pytest.mark.parametrize("failing", range(len(modules.STEPS)), ids=[step.__name__ for step in modules.STEPS])
def test_a_step_that_fails_leaves_nothing_behind(
    failing: int, pool: pcpu.PhysicalCpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def broken(module: modules.Module) -> Iterator[None]:
        raise OSError(errno.ENOMEM, "injected")
        yield

    before = footprint(pool)
    steps = modules.STEPS
    monkeypatch.setattr(modules, "STEPS", (*steps[:failing], broken, *steps[failing + 1 :]))
    with pytest.raises(KvmUnavailable, match="injected"):
        modules.load("kvm_intel")
    assert footprint(pool) == before
    monkeypatch.setattr(modules, "STEPS", steps)
    modules.load("kvm_intel")


@pytest.mark.parametrize("operation", ["check_processor_compatibility", "hardware_enable"])
@pytest.mark.parametrize("failing", range(CPUS))
def test_a_processor_that_refuses_leaves_the_others_as_they_were(
    operation: str, failing: int, pool: pcpu.PhysicalCpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = getattr(KvmIntel, operation)

    def refuses(self: KvmIntel, processor: pcpu.PhysicalCpu) -> None:
        if processor.number == failing:
            raise OSError(errno.EIO, "injected")
        good(self, processor)

    before = footprint(pool)
    monkeypatch.setattr(KvmIntel, operation, refuses)
    with pytest.raises(KvmUnavailable, match="injected") as caught:
        modules.load("kvm_intel")
    assert caught.value.errno == errno.EIO
    assert footprint(pool) == before


def test_only_one_vendor_at_a_time() -> None:
    modules.load("kvm_intel")
    with pytest.raises(KvmError, match="unload it first") as caught:
        modules.load("kvm_intel")
    assert caught.value.errno == errno.EEXIST


def test_a_module_in_use_is_not_unloaded() -> None:
    with kvm.open("soft") as system, system.create_vm() as vm:
        vcpu = vm.create_vcpu()
        system.close()
        with pytest.raises(KvmError, match="1 VMs use it") as caught:
            modules.unload("kvm_intel")
        assert caught.value.errno == errno.EBUSY
    # The vCPU's descriptor is still open, so the VM lives.
    with pytest.raises(KvmError):
        modules.unload("kvm_intel")
    vcpu.close()
    modules.unload("kvm_intel")


@pytest.mark.parametrize("feature", ["vmx"])
def test_firmware_can_disable_it(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules.FIRMWARE, feature, False)
    with pytest.raises(KvmUnavailable, match="disabled by the firmware"):
        modules.load("kvm_intel")


def test_a_processor_without_the_extension(pool: pcpu.PhysicalCpus) -> None:
    next(iter(pool)).features = frozenset()
    with pytest.raises(KvmUnavailable, match="has no VMX"):
        modules.load("kvm_intel")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [({"nonsense": 1}, "there are: .*ept"), ({"vpid": 2}, "yes or no"), ({"halt_poll_ns": -1}, "a number")],
)
def test_bad_parameters_are_told(parameters: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        modules.load("kvm_intel", **parameters)
    assert modules.loaded() is None


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("kvm_intel", ("kvm_intel", {})),
        ("kvm-intel ept=0 vpid=Y nested", ("kvm_intel", {"ept": 0, "vpid": 1, "nested": 1})),
        ("kvm_intel halt_poll_ns=0x100", ("kvm_intel", {"halt_poll_ns": 256})),
    ],
)
def test_lines_as_modprobe_takes_them(line: str, parsed: tuple[str, dict[str, int]]) -> None:
    assert modules.parse(line) == parsed


def test_what_the_processor_lacks_is_turned_off() -> None:
    assert modules.load("kvm_intel", enable_apicv=True).parameters["enable_apicv"] is False


def test_opening_the_device_loads_the_default() -> None:
    with kvm.open("soft"):
        module = modules.loaded()
        assert module is not None
        assert module.name == "kvm_intel"


def test_debugfs_sums_over_all_vms() -> None:
    with kvm.open("soft") as system:
        module = modules.loaded()
        assert module is not None
        for _ in range(2):
            with system.create_vm() as vm:
                ram = Ram(RAM_SIZE)
                vm.set_user_memory_region(0, 0, ram)
                with vm.create_vcpu() as vcpu:
                    before = module.debugfs["exits"]()
                    guest = TinyGuest(vm, vcpu, ram)
                    guest.load(Mode.LONG, "out 0x10, al")
                    guest.out()
                    assert module.debugfs["exits"]() > before
