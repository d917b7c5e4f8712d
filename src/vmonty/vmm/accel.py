"""Accelerators by name: what can run a machine's vCPUs, which one ``auto`` chooses, and why."""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import NamedTuple

from vmonty import kvm
from vmonty.base.errors import KvmError, KvmUnavailable, UsageError
from vmonty.kvm.api import System
from vmonty.kvm.uapi import Exit
from vmonty.vmm.boot import longmode
from vmonty.vmm.memory import GuestMemory

# Accelerator → provider of KVM, in the order in which auto tries them; soft is there always.
ACCELERATORS = {"kvm": "linux", "soft": "soft"}

# Below this a KVM emulates CPL 0 code instruction by instruction, and Linux would boot for minutes.
# Hardware makes thousands of millions; the emulator of kvm-pvm about one.
LEAST_MIPS = 50
MEASURE_SECONDS = 0.02

_LOOP = bytes.fromhex("48ffc1 ebfb")  # again: inc rcx; jmp again
_LOOP_INSTRUCTIONS = 2
_CODE, _TABLES = 0x1000, 0x10000


def measure_cpl0(system: System, seconds: float = MEASURE_SECONDS) -> float:
    """Millions of CPL 0 instructions a second that *system* runs, by a loop of about *seconds*."""
    memory = GuestMemory(1 << 20)
    memory.write(_CODE, _LOOP)
    longmode.write_tables(memory, _TABLES)
    with system.create_vm() as vm:
        memory.attach(vm)
        with vm.create_vcpu() as vcpu:
            longmode.enter(vcpu, _TABLES)
            regs = vcpu.get_regs()
            regs.rip, regs.rflags, regs.rcx = _CODE, 2, 0
            vcpu.set_regs(regs)
            over = threading.Event()

            def end() -> None:
                over.set()
                vcpu.kick()

            timer = threading.Timer(seconds, end)
            begin = time.perf_counter()
            timer.start()
            try:
                while not over.is_set():
                    if (reason := vcpu.run()) is not Exit.INTR:
                        raise KvmUnavailable(errno.EIO, "KVM_RUN", f"a plain loop at CPL 0 ended with {reason!r}")
                elapsed = time.perf_counter() - begin
            finally:
                timer.cancel()
                timer.join()
            return vcpu.get_regs().rcx * _LOOP_INSTRUCTIONS / elapsed / 1e6


class Choice(NamedTuple):
    """An opened accelerator and the one line that says why it was taken."""

    name: str
    system: System
    reason: str


def choose(request: str) -> Choice:
    """Open the first of *request* that works: a name, several joined by ``:``, or ``auto``.

    ``auto`` takes a KVM only when it runs CPL 0 code at speed; a name takes it as it is. Raises UsageError
    for an unknown name, KvmUnavailable (with every reason) when none works.
    """
    names = request.split(":")
    known = [*ACCELERATORS, "auto"]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown accelerator {name!r}; there are: {', '.join(known)}")
    refusals: list[KvmUnavailable] = []
    for name in names:
        candidates = list(ACCELERATORS) if name == "auto" else [name]
        for candidate in candidates:
            try:
                choice = _open(candidate, measured=name == "auto" and candidate != "soft")
                if refusals:
                    return choice._replace(reason=f"using {candidate}: {_brief(refusals[-1])}")
                return choice
            except KvmUnavailable as refusal:
                refusals.append(refusal)
    if len(refusals) == 1:
        raise refusals[0]
    raise KvmUnavailable(refusals[0].errno or 0, request, "; ".join(f"{r.call}: {r.remedy}" for r in refusals))


def _brief(refusal: KvmUnavailable) -> str:
    """Why something was not taken, without the remedy."""
    if isinstance(refusal, KvmTooSlow):
        return f"this host's {refusal.name} emulates kernel code, at {refusal.mips:.1f} MIPS"
    return f"{refusal.call}: {os.strerror(refusal.errno or errno.EIO)}"


def _open(name: str, measured: bool) -> Choice:
    system = kvm.open(ACCELERATORS[name])
    if not measured:
        return Choice(name, system, f"using {name}, as asked")
    try:
        mips = measure_cpl0(system)
    except KvmUnavailable:
        system.close()
        raise
    except KvmError as error:
        system.close()
        raise KvmUnavailable(error.errno or 0, error.call, error.remedy) from error
    if mips < LEAST_MIPS:
        system.close()
        raise KvmTooSlow(name, mips)
    return Choice(name, system, f"using {name}: it runs kernel code at {mips:,.0f} MIPS")


class KvmTooSlow(KvmUnavailable):
    """A KVM is there, but it emulates CPL 0 code."""

    def __init__(self, name: str, mips: float) -> None:
        self.name = name
        self.mips = mips
        super().__init__(
            errno.EOPNOTSUPP,
            f"accelerator {name}",
            f"this host's {name} runs kernel code (CPL 0) at {mips:.1f} MIPS, by emulation: too slow to boot an"
            f" operating system; --accel {name} uses it all the same",
        )

    def __str__(self) -> str:
        return f"no accelerator to choose: {self.remedy}"
