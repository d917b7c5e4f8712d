"""Eight vCPUs on two processors or eight, with everything going on at once: no lost interrupt, no lost write, no leak.

`make stress` runs for minutes (VMONTY_STRESS_S); VMONTY_STRESS_SEED takes another seed.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.base.ram import Ram
from vmonty.kvm.api import Vcpu, Vm
from vmonty.kvm.soft import modules, pcpu
from vmonty.kvm.uapi import Exit, flags
from vmonty.testing.guests import Mode, load

SECONDS = float(os.environ.get("VMONTY_STRESS_S", "3"))
SEED = int(os.environ.get("VMONTY_STRESS_SEED", "1"))
WAIT_S = 60
VCPUS = 8
# vCPUs start one after the other, while all the rest goes on already.
START_S = 0.01
RAM_SIZE = 1 << 20
# Words of 64 bytes each, per vCPU: IPIs received, MSIs received, rounds.
RECEIVED, MSIS, ROUNDS = 0x4000, 0x4400, 0x4800
# How many vCPUs have their APIC on: before that, IPIs and MSIs are rightly dropped.
READY = 0x4C00
# A page per vCPU that is logged, and one that comes and goes.
LOGGED, COMING, PAGE = 0x20_0000, 0x30_0000, 4096
IPI, MSI = 0x62, 0x70
X2APIC_ICR, X2APIC_EOI = 0x830, 0x80B

PROGRAM = """
    mov ecx, 0x1b
    rdmsr
    or eax, 0xc00
    wrmsr
    mov ecx, 0x80f
    mov eax, 0x1ff
    xor edx, edx
    wrmsr
    xor r15d, r15d
    mov r8d, {own}
    shl r8d, 6
    out 0x10, al
    sti
    lock inc dword [abs {ready}]
others:
    pause
    cmp dword [abs {ready}], {count}
    jb others
again:
    inc r15d
    mov ecx, 0x830
    mov eax, {ipi}
    mov edx, {next}
    wrmsr
until:
    inc dword [abs {logged}]
    mov eax, [abs {coming}]
    pause
    cmp [abs {next_received}], r15d
    jb until
    mov [abs {rounds}], r15d
    test r15d, 63
    jnz again
    out 0x11, al
    jmp again
"""
HANDLER = """
    push rax
    push rcx
    push rdx
    lock inc dword [r8 + {counter}]
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    pop rax
    iretq
"""


@pytest.fixture(params=[2, VCPUS], ids=["two-processors", "eight-processors"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[pcpu.PhysicalCpus]:
    monkeypatch.setattr(modules, "_loaded", None)
    made = pcpu.PhysicalCpus(limit=request.param)
    made.online(0)
    monkeypatch.setattr(pcpu, "POOL", made)
    yield made
    if (module := modules.loaded()) is not None:
        modules.unload(module.name)


class Stressed:
    """The VM, its threads, and what is done to it."""

    def __init__(self, vm: Vm, seed: int) -> None:
        self.vm = vm
        self.random = random.Random(seed)
        self.ram, self.logged, self.coming = Ram(RAM_SIZE), Ram(VCPUS * PAGE), Ram(VCPUS * PAGE)
        vm.create_irqchip()
        vm.set_user_memory_region(0, 0, self.ram)
        self._log(True)
        self.is_there = False
        self.vcpus = [vm.create_vcpu(number) for number in range(VCPUS)]
        for number, vcpu in enumerate(self.vcpus):
            self._load(vcpu, number)
        self.stop = False
        self.failed: list[str] = []
        self.interrupted = self.mmio = 0
        self.threads = [threading.Thread(target=self._run, args=(vcpu,)) for vcpu in self.vcpus]
        self.seen: list[int] | None = None
        self.sent_msis = [0] * VCPUS

    def _load(self, vcpu: Vcpu, number: int) -> None:
        after = (number + 1) % VCPUS
        source = PROGRAM.format(
            own=number, next=after, ipi=IPI, logged=LOGGED + number * PAGE, coming=COMING + number * PAGE,
            next_received=RECEIVED + 64 * after, rounds=ROUNDS + 64 * number, ready=READY, count=VCPUS,
        )  # fmt: skip
        handlers = {IPI: HANDLER.format(counter=RECEIVED), MSI: HANDLER.format(counter=MSIS)}
        vcpu.set_cpuid2(self.vm_cpuid)
        load(
            vcpu, self.ram, Mode.LONG, source, handlers, code=0x60000 + 0x1000 * number, stack=0x50000 + 0x800 * number
        )
        vcpu.set_mp_state(flags.KVM_MP_STATE_RUNNABLE)

    vm_cpuid: list[kvm.api.CpuidEntry]

    def _run(self, vcpu: Vcpu) -> None:
        try:
            time.sleep(vcpu.id * START_S)
            while not self.stop:
                reason = vcpu.run()
                if reason is Exit.MMIO:
                    self.mmio += 1
                elif reason is Exit.INTR:
                    self.interrupted += 1
                elif reason is not Exit.IO:
                    self.failed.append(f"vCPU {vcpu.id}: {reason!r} at {vcpu.get_regs().rip:#x}")
                    return
        except BaseException as error:
            self.failed.append(f"vCPU {vcpu.id}: {error!r}")

    # ---- what is done to it ------------------------------------------------------------------------------------

    def _log(self, on: bool) -> None:
        self.vm.set_user_memory_region(1, LOGGED, self.logged, flags=flags.KVM_MEM_LOG_DIRTY_PAGES if on else 0)
        self.seen = None

    def toggle_logging(self) -> None:
        self._log(False)
        self._log(True)

    def toggle_slot(self) -> None:
        if self.is_there:
            self.vm.set_user_memory_region(2, COMING, None)
        else:
            self.vm.set_user_memory_region(2, COMING, self.coming)
        self.is_there = not self.is_there

    def counters(self) -> list[int]:
        return [self.logged.read_u32(PAGE * number) for number in range(VCPUS)]

    def check_log(self) -> None:
        """What was written since the last log, and before this one, is in this one."""
        before = self.counters()
        bits = int.from_bytes(self.vm.get_dirty_log(1, VCPUS), "little")
        if self.seen is not None:
            for number in range(VCPUS):
                if before[number] != self.seen[number] and not bits >> number & 1:
                    self.failed.append(f"page {number} was written and is not in the log")
        self.seen = self.counters()

    def kick(self) -> None:
        self.random.choice(self.vcpus).kick()

    def msi(self) -> None:
        """One that cannot coalesce: the last one was taken, and the APIC is on."""
        target = self.random.randrange(VCPUS)
        if self.ram.read_u32(READY) < VCPUS or self.ram.read_u32(MSIS + 64 * target) != self.sent_msis[target]:
            return
        self.sent_msis[target] += 1
        if (taken := self.vm.signal_msi(0xFEE00000 | target << 12, MSI)) != 1:
            self.failed.append(f"{taken} APICs took the MSI for vCPU {target}")

    def shrink(self) -> None:
        if (module := modules.loaded()) is not None:
            module.shrink(1)

    def go_on(self, seconds: float) -> None:
        """Do all of it at random for *seconds*, and see that every vCPU gets on."""
        for thread in self.threads:
            thread.start()
        todo = [self.toggle_logging, self.toggle_slot, self.check_log, self.check_log, self.kick, self.msi, self.shrink]
        end = time.monotonic() + seconds
        progress, since = self.rounds(), time.monotonic()
        try:
            while (time.monotonic() < end or 0 in self.rounds()) and not self.failed:
                self.random.choice(todo)()
                time.sleep(0.001)
                if (now := self.rounds()) != progress:
                    progress, since = now, time.monotonic()
                if time.monotonic() - since > WAIT_S:
                    self.failed.append(f"nothing goes on: rounds {progress}, received {self.received()}")
            self._wait_for_msis()
        finally:
            self.end()

    def rounds(self) -> list[int]:
        return [self.ram.read_u32(ROUNDS + 64 * number) for number in range(VCPUS)]

    def received(self) -> list[int]:
        return [self.ram.read_u32(RECEIVED + 64 * number) for number in range(VCPUS)]

    def msis(self) -> list[int]:
        return [self.ram.read_u32(MSIS + 64 * number) for number in range(VCPUS)]

    def _wait_for_msis(self) -> None:
        end = time.monotonic() + WAIT_S
        while self.msis() != self.sent_msis:
            if self.failed or time.monotonic() > end:
                self.failed.append(f"an MSI was lost: {self.sent_msis} sent, {self.msis()} received")
                return
            time.sleep(0.01)

    def end(self) -> None:
        self.stop = True
        for vcpu, thread in zip(self.vcpus, self.threads, strict=True):
            while thread.is_alive():
                vcpu.kick()
                thread.join(0.02)
            vcpu.close()


def footprint() -> dict[str, int]:
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "mappings": maps.count("vmonty-") + maps.count("kvm-"),
        "threads": threading.active_count(),
    }


def one_round(seconds: float, seed: int) -> Stressed:
    with kvm.open("soft") as system, system.create_vm() as vm:
        Stressed.vm_cpuid = system.supported_cpuid()
        stressed = Stressed(vm, seed)
        stressed.go_on(seconds)
    return stressed


def test_all_at_once(pool: pcpu.PhysicalCpus) -> None:
    one_round(0.1, 0)  # what stays for the process's life is there from here on
    before = footprint()
    stressed = one_round(SECONDS, SEED)
    assert not stressed.failed
    assert stressed.interrupted
    assert min(stressed.rounds()) > 0
    total = sum(stressed.rounds())
    del stressed
    after = footprint()
    assert after == before, f"after {total} IPIs"
