"""A look at a machine that runs, and a stop: what the Python API and a control socket share."""

from __future__ import annotations

import contextlib
import os

from vmonty.base.errors import HandleClosed, UsageError, VmontyError
from vmonty.kvm.api import Vcpu
from vmonty.kvm.api.stats import Stats
from vmonty.kvm.uapi import Cap
from vmonty.vmm.machine import Machine

PAUSE_SECONDS = 30.0
GENERAL_REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
CONTROL_REGISTERS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


class StateError(VmontyError):
    """The VM cannot do this in the state that it is in; the message says what it needs."""


def pause(machine: Machine) -> None:
    """Stop all vCPUs between two instructions. Raises StateError when one cannot be stopped; then all go on."""
    for thread in machine.vcpus:
        thread.pause()
    if not all(thread.wait_paused(PAUSE_SECONDS) for thread in machine.vcpus):
        resume(machine)
        raise StateError("a vCPU is held by a device or by the reader of the console; it could not be paused")


def resume(machine: Machine) -> None:
    """Go on after pause()."""
    for thread in machine.vcpus:
        thread.resume()


def vcpu_of(machine: Machine, cpu: int) -> Vcpu:
    """vCPU *cpu*. Raises UsageError when there is none."""
    if not 0 <= cpu < len(machine.vcpus):
        raise UsageError(f"cpu {cpu}: this VM has {len(machine.vcpus)}, from 0")
    return machine.vcpus[cpu].vcpu


def registers(vcpu: Vcpu) -> dict[str, int]:
    """General and control registers by name, of a vCPU that is paused."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    found = {name: int(getattr(regs, name)) for name in GENERAL_REGISTERS}
    return found | {name: int(getattr(sregs, name)) for name in CONTROL_REGISTERS}


def description(machine: Machine) -> dict[str, int | str]:
    """What it is made of."""
    config = machine.config
    return {"machine": config.machine, "cpus": config.cpus, "memory": config.memory, "pid": os.getpid()}


class Counters:
    """The statistics of a machine's VM and vCPUs, open while this is: so other processes find them in /proc, too."""

    def __init__(self, machine: Machine) -> None:
        self._stats: list[Stats] = []
        if machine.vm.check_extension(Cap.BINARY_STATS_FD) > 0:
            self._stats.append(machine.vm.stats())
            self._stats += [thread.vcpu.stats() for thread in machine.vcpus]

    def read(self) -> dict[str, dict[str, int]]:
        """By id (kvm-PID, kvm-PID/vcpu-N): the counters that are one number."""
        found: dict[str, dict[str, int]] = {}
        for stats in self._stats:
            with contextlib.suppress(HandleClosed, OSError):  # the machine has just ended
                values = stats.read().items()
                found[stats.id] = {name: value for name, value in values if isinstance(value, int)}
        return found

    def close(self) -> None:
        """Close the files."""
        while self._stats:
            self._stats.pop().close()
