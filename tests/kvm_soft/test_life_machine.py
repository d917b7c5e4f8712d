"""Life of VMs in any order: hypothesis makes, changes, runs and closes them, and finds the shortest way to what breaks.

Beside the fuzz of ioctls (which gives every request random arguments) this gives sound requests in every order. What
always holds: an error is one that api.rst lists, a guest that runs computes the right thing, and in the end no file,
mapping or thread is left, and nothing holds the vendor module. `make stress` tries many more.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from vmonty import kvm
from vmonty.base.errors import KvmError
from vmonty.base.ram import Ram
from vmonty.kvm.api import Vcpu, Vm
from vmonty.kvm.soft import modules
from vmonty.kvm.uapi import Exit, flags
from vmonty.kvm.uapi.irq import kvm_irq_routing_entry
from vmonty.kvm.uapi.vcpu import kvm_sregs
from vmonty.testing.guests import RAM_SIZE, Mode, load

from .test_stress import footprint

SECONDS = float(os.environ.get("VMONTY_STRESS_S", "0"))
PAGE = 4096
# Where slots beyond the guest's RAM may lie; some of the places overlap.
PLACES = (0x10_0000, 0x10_1000, 0x10_4000, 0xFEE0_0000, 1 << 32)
PROGRAM = """
    mov eax, {value}
    out 0x10, eax
    mov ebx, [abs 0x100000]
    mov ecx, {value}
sum: add eax, ecx
    dec ecx
    jnz sum
    out 0x11, eax
"""
MODES = st.sampled_from([Mode.REAL, Mode.PROTECTED, Mode.LONG])


@contextmanager
def may_refuse(*listed: int) -> Iterator[None]:
    """Errors that the request's description lists."""
    try:
        yield
    except KvmError as error:
        if error.errno not in listed:
            raise


class Machine:
    """A VM of the model, with what belongs to it."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.ram, self.extra = Ram(RAM_SIZE), Ram(4 * PAGE)
        vm.set_user_memory_region(0, 0, self.ram)
        self.irqfds: list[int] = []
        self.vcpus: dict[int, Vcpu] = {}
        self.fresh: dict[int, kvm_sregs] = {}

    def add(self, number: int) -> None:
        self.vcpus[number] = self.vm.create_vcpu(number)
        self.fresh[number] = self.vcpus[number].get_sregs()

    def close(self) -> None:
        self.vm.close()
        while self.irqfds:
            os.close(self.irqfds.pop())


class Lives(RuleBasedStateMachine):
    """The rules. Closed things stay in the model only as long as something else of theirs is open."""

    machines = Bundle("machines")
    vcpus = Bundle("vcpus")

    def __init__(self) -> None:
        super().__init__()
        self.system = kvm.open("soft")
        self.all: list[Machine] = []

    @initialize(target=vcpus, chips=st.booleans())
    def begin(self, chips: bool) -> tuple[Machine, int]:
        """A VM that can run."""
        machine = self.create_vm()
        if chips:
            machine.vm.create_irqchip()
        machine.add(0)
        return machine, 0

    @rule(target=machines)
    def create_vm(self) -> Machine:
        self.all.append(Machine(self.system.create_vm()))
        return self.all[-1]

    @rule(target=vcpus, machine=machines, number=st.integers(0, 3))
    def create_vcpu(self, machine: Machine, number: int) -> tuple[Machine, int]:
        if not machine.vm.closed:
            taken = number in machine.vcpus
            with may_refuse(errno.EEXIST):
                machine.add(number)
                assert not taken
        return machine, number

    def _open(self, machine: Machine) -> bool:
        return not machine.vm.closed

    @rule(machine=machines)
    def create_irqchip(self, machine: Machine) -> None:
        if self._open(machine):
            with may_refuse(errno.EEXIST, errno.EINVAL):
                machine.vm.create_irqchip()

    @rule(machine=machines)
    def create_pit(self, machine: Machine) -> None:
        if self._open(machine):
            with may_refuse(errno.EEXIST, errno.ENOENT):
                machine.vm.create_pit2()

    @rule(
        machine=machines, slot=st.integers(1, 3), place=st.sampled_from(PLACES), pages=st.integers(0, 4),
        how=st.sampled_from([0, flags.KVM_MEM_LOG_DIRTY_PAGES, flags.KVM_MEM_READONLY]),
    )  # fmt: skip
    def set_slot(self, machine: Machine, slot: int, place: int, pages: int, how: int) -> None:
        if self._open(machine):
            with may_refuse(errno.EEXIST, errno.EINVAL):
                if pages:
                    machine.vm.set_user_memory_region(slot, place, machine.extra, size=pages * PAGE, flags=how)
                else:
                    machine.vm.set_user_memory_region(slot, place, None)

    @rule(machine=machines, slot=st.integers(0, 3))
    def dirty_log(self, machine: Machine, slot: int) -> None:
        if self._open(machine):
            with may_refuse(errno.ENOENT):
                machine.vm.get_dirty_log(slot, 4)

    @rule(machine=machines, gsi=st.integers(0, 30), pin=st.integers(0, 25))
    def route(self, machine: Machine, gsi: int, pin: int) -> None:
        if self._open(machine):
            entry = kvm_irq_routing_entry(gsi=gsi, type=flags.KVM_IRQ_ROUTING_IRQCHIP)
            entry.u.irqchip.irqchip, entry.u.irqchip.pin = flags.KVM_IRQCHIP_IOAPIC, pin
            with may_refuse(errno.EINVAL):
                machine.vm.set_gsi_routing([entry])

    @rule(machine=machines, gsi=st.integers(0, 30), own=st.booleans())
    def irqfd(self, machine: Machine, gsi: int, own: bool) -> None:
        if not self._open(machine):
            return
        if own or not machine.irqfds:
            machine.irqfds.append(os.eventfd(0, os.EFD_CLOEXEC))
        with may_refuse(errno.EINVAL, errno.EBUSY):
            machine.vm.irqfd(machine.irqfds[-1], gsi)
        os.eventfd_write(machine.irqfds[-1], 1)

    @rule(machine=machines, gsi=st.integers(0, 30))
    def deassign_irqfd(self, machine: Machine, gsi: int) -> None:
        if self._open(machine) and machine.irqfds:
            machine.vm.irqfd(machine.irqfds[-1], gsi, deassign=True)

    @rule(machine=machines, gsi=st.integers(0, 30), level=st.integers(0, 1))
    def irq_line(self, machine: Machine, gsi: int, level: int) -> None:
        if self._open(machine):
            with may_refuse(errno.ENXIO):
                machine.vm.irq_line(gsi, level)

    @rule(machine=machines, apic=st.integers(0, 4), vector=st.integers(0, 255))
    def msi(self, machine: Machine, apic: int, vector: int) -> None:
        if self._open(machine):
            with may_refuse(errno.EINVAL, errno.EPERM):
                machine.vm.signal_msi(0xFEE0_0000 | apic << 12, vector)

    @rule(which=vcpus, mode=MODES)
    def run_again(self, which: tuple[Machine, int], mode: Mode) -> None:
        for value in (7, 8):
            self.run_guest(which, value, mode)

    @rule(which=vcpus, value=st.integers(1, 200), mode=MODES)
    def run_guest(self, which: tuple[Machine, int], value: int, mode: Mode) -> None:
        """Also when the VM's own file is closed; interrupts are off."""
        machine, number = which
        vcpu = machine.vcpus.get(number)
        if vcpu is None or vcpu.closed:
            return
        with may_refuse(errno.EINVAL):  # without a local APIC it is RUNNABLE anyway
            vcpu.set_mp_state(flags.KVM_MP_STATE_RUNNABLE)
        source = PROGRAM.format(value=value)
        if mode is Mode.REAL:
            source = source.replace("abs 0x100000", "0x4000")
        vcpu.set_sregs(machine.fresh[number])  # out of the mode of the last program
        load(vcpu, machine.ram, mode, source)
        told = []
        while len(told) < 2:
            reason = vcpu.run()
            if reason is Exit.MMIO:
                continue  # no slot is there at present: it reads what it reads
            assert reason is Exit.IO, reason
            told.append((vcpu.kvm_run.u.io.port, int.from_bytes(vcpu.io_data(), "little")))
        assert told == [(0x10, value), (0x11, value + value * (value + 1) // 2)]
        assert vcpu.get_regs().rcx & 0xFFFF_FFFF == 0

    @rule(which=consumes(vcpus))
    def close_vcpu(self, which: tuple[Machine, int]) -> None:
        machine, number = which
        if (vcpu := machine.vcpus.get(number)) is not None:
            vcpu.close()

    @rule(machine=consumes(machines))
    def close_vm(self, machine: Machine) -> None:
        machine.close()

    @rule()
    def reopen_system(self) -> None:
        """VMs do not need the file by which they were made."""
        self.system.close()
        self.system = kvm.open("soft")

    @invariant()
    def the_module_counts(self) -> None:
        """What is alive is what has an open file."""
        module = modules.loaded()
        assert module is not None
        alive = [
            machine
            for machine in self.all
            if not machine.vm.closed or any(not vcpu.closed for vcpu in machine.vcpus.values())
        ]
        assert len(module.vm_list) == len(alive)

    def teardown(self) -> None:
        for machine in self.all:
            for vcpu in machine.vcpus.values():
                vcpu.close()
            machine.close()
        self.system.close()
        module = modules.loaded()
        assert module is not None
        assert not module.references


def live(examples: int, steps: int) -> None:
    """That many lives, of that many steps each."""
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=not SECONDS,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_lives_in_any_order() -> None:
    live(16, 40)  # what stays for the process's life is there from here on
    before = footprint()
    live(16 + int(SECONDS) * 4, 40 + min(int(SECONDS), 120))
    assert footprint() == before
