"""Physical processors: a pool that vCPUs are scheduled in and out of, with hotplug, reboot and suspend.

A vCPU goes back to the processor whose TLB and translations are warm (sticky). What a vCPU leaves in a processor stays
there until the vCPU moves or another one needs the processor: then it is stored, as the kernel does with a VMCS.

    sched_in ──► running ──► sched_out ──► still held ──► sched_in (nothing to load)
                    ▲                          └──► stored, when another takes the processor or it goes offline

Source: kernel/cpu.c (cpuhp_setup_state, cpu_up, cpu_down), kernel/reboot.c, drivers/base/syscore.c.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

from vmonty.cpu import models
from vmonty.cpu.core import Cpu
from vmonty.kvm.soft.cpuid import OFFERED
from vmonty.kvm.soft.seats import Seat, Seats

# How long a vCPU keeps its processor when others wait for one: the tick of a kernel with HZ=250.
TICK_S = 0.004
TICK_NS = 4_000_000
# What the silicon has, of which guests see less.
MODEL = "max"


class Context(Protocol):
    """What a physical processor can hold: the vendor's part of a vCPU."""

    @property
    def pcpu(self) -> PhysicalCpu | None:
        """The processor that holds it."""

    def load(self, pcpu: PhysicalCpu) -> None:
        """Put the vCPU's registers into *pcpu*, which holds nobody's, and note it in ``pcpu``."""

    def store(self) -> None:
        """Take them out again: nothing of the vCPU stays in the processor; ``pcpu`` becomes None."""

    def destroy(self) -> None:
        """The vCPU is gone, or never came to be."""

    def kick(self) -> None:
        """Out of guest mode, soon. Any thread."""

    def preempt(self) -> None:
        """Out of guest mode, and let another vCPU have the processor. Any thread."""


class PhysicalCpu(Seat):
    """Processor *number*: the silicon, what the vendor module keeps there, and whose registers it holds.

    Who evicts its holder, or takes it over, has claimed it before: else the holder may come back at any moment.
    """

    def __init__(self, number: int, pool: Seats) -> None:
        super().__init__(pool)
        self.number = number
        self.cpu = Cpu()
        models.install(self.cpu, models.parse(OFFERED))
        # This silicon has both extensions, though a model of CPUID shows one.
        self.features = models.parse(MODEL).features | {"vmx", "svm"}
        # The vendor module's, from hardware_enable to hardware_disable.
        self.virtualization: Any = None
        self.holder: Context | None = None
        self.since_ns = 0

    def evict(self) -> None:
        """Store what it holds."""
        if self.holder is not None:
            self.holder.store()
            self.holder = None


class HotplugState(NamedTuple):
    """What must be done on each processor that comes up, and undone before it goes down."""

    name: str
    startup: Callable[[PhysicalCpu], None]
    teardown: Callable[[PhysicalCpu], None]


class SyscoreOps(NamedTuple):
    """What is done last before the host sleeps, and first when it wakes up."""

    suspend: Callable[[], None]
    resume: Callable[[], None]


class PhysicalCpus(Seats):
    """All processors. *limit*: how many there can be; below it one more comes up whenever a vCPU finds none free."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._cpus: dict[int, PhysicalCpu] = {}
        self._lock = threading.RLock()
        self._free = threading.Condition(self._lock)
        self._frozen = False
        self._slept: list[int] = []
        # Those that wait for a processor, first the next one.
        self._queue: deque[Context] = deque()
        self.hotplug_states: list[HotplugState] = []
        self.reboot_notifiers: list[Callable[[], None]] = []
        self.syscore_ops: list[SyscoreOps] = []

    def __iter__(self) -> Iterator[PhysicalCpu]:
        """The processors that are online, by number."""
        return iter([self._cpus[number] for number in sorted(self._cpus)])

    def __len__(self) -> int:
        return len(self._cpus)

    # ---- hotplug ----------------------------------------------------------------------------------------------

    def online(self, number: int) -> PhysicalCpu:
        """cpu_up(): a processor comes up. Raises OSError: EINVAL beyond the limit, or what a start-up raised."""
        with self._lock:
            if not 0 <= number < self.limit:
                raise OSError(errno.EINVAL, f"there is no processor {number}: the pool has {self.limit}")
            if number in self._cpus:
                return self._cpus[number]
            pcpu = PhysicalCpu(number, self)
            done: list[HotplugState] = []
            try:
                for state in self.hotplug_states:
                    state.startup(pcpu)
                    done.append(state)
            except BaseException:
                for state in reversed(done):
                    state.teardown(pcpu)
                raise
            self._cpus[number] = pcpu
            self._free.notify_all()
            return pcpu

    def offline(self, number: int) -> None:
        """cpu_down(): its vCPU moves elsewhere. Raises OSError: EINVAL when it is not online, EBUSY for the last."""
        with self._lock:
            pcpu = self._cpus.get(number)
            if pcpu is None:
                raise OSError(errno.EINVAL, f"processor {number} is not online")
            if len(self._cpus) == 1:
                raise OSError(errno.EBUSY, "the last processor cannot go offline")
            self._down(pcpu)

    def _down(self, pcpu: PhysicalCpu) -> None:
        pcpu.online = False
        self._quiesce(pcpu)
        for state in reversed(self.hotplug_states):
            state.teardown(pcpu)
        del self._cpus[pcpu.number]

    def _quiesce(self, pcpu: PhysicalCpu) -> None:
        """Wait until no vCPU runs there, and store what it holds."""
        while not pcpu.claim():
            if pcpu.holder is not None:
                pcpu.holder.preempt()
            self._free.wait(TICK_S)
        pcpu.evict()
        pcpu.running = False

    @contextmanager
    def cpuhp_state(self, state: HotplugState) -> Iterator[None]:
        """cpuhp_setup_state_nocalls() … cpuhp_remove_state_nocalls(): be told of processors that come and go."""
        with self._lock:
            self.hotplug_states.append(state)
        try:
            yield
        finally:
            with self._lock:
                self.hotplug_states.remove(state)

    def quiesce(self) -> None:
        """Store every vCPU. The caller sees to it that none comes back."""
        with self._lock:
            for pcpu in self:
                self._quiesce(pcpu)

    def trim(self) -> None:
        """Give up processors that hold nothing, but for as many as the host has."""
        with self._lock:
            idle = [pcpu for pcpu in self if pcpu.holder is None and not pcpu.running]
            for pcpu in idle[os.cpu_count() or 1 :]:
                self._down(pcpu)

    # ---- reboot, suspend --------------------------------------------------------------------------------------

    def reboot(self) -> None:
        """kernel_restart_prepare(): every notifier is called; no vCPU runs any more until ``thaw``."""
        with self._lock:
            self._frozen = True
            self._count_waiting()
            self.quiesce()
            for notify in self.reboot_notifiers:
                notify()

    def suspend(self) -> None:
        """suspend_enter(): vCPUs freeze, all processors but the first go down, then syscore_suspend()."""
        with self._lock:
            self._frozen = True
            self._count_waiting()
            self.quiesce()
            self._slept = [pcpu.number for pcpu in self][1:]
            for number in reversed(self._slept):
                self._down(self._cpus[number])
            for ops in reversed(self.syscore_ops):
                ops.suspend()

    def resume(self) -> None:
        """The way back: syscore_resume() on the first processor, then the others, then the vCPUs.

        What does not wake up keeps nothing else asleep. Raises its OSError when all the rest is done: a processor on
        which virtualization stayed off runs no guest (KVM_RUN: EIO), one that could not be started is offline.
        """
        failed: OSError | None = None
        with self._lock:
            wake: list[Callable[[], object]] = [ops.resume for ops in self.syscore_ops]
            wake += [partial(self.online, number) for number in self._slept]
            for step in wake:
                try:
                    step()
                except OSError as error:
                    failed = failed or error
            self._slept = []
            self.thaw()
        if failed is not None:
            raise failed

    def thaw(self) -> None:
        """Let vCPUs run again."""
        with self._lock:
            self._frozen = False
            self._count_waiting()
            self._free.notify_all()

    # ---- the scheduler ----------------------------------------------------------------------------------------

    @contextmanager
    def creation(self, context: Context) -> Iterator[None]:
        """A processor for a new vCPU, on which its registers are set up; it is destroyed when that fails."""
        try:
            self.sched_in(context, brief=True)
            try:
                yield
            finally:
                self.sched_out(context)
        except BaseException:
            context.destroy()
            raise

    def sched_in(self, context: Context, brief: bool = False) -> None:
        """Give *context* a processor, its own if that is still warm; wait for one when all are busy.

        *brief*: not to run a guest, only to look at registers: another vCPU gives way at once.
        """
        with self._lock:
            pcpu = context.pcpu
            if self._queue or pcpu is None or not pcpu.online or self._frozen or not pcpu.claim():
                pcpu = self._wait_for_one(context, brief)
                try:
                    self._switch(pcpu, context)
                except BaseException:
                    pcpu.running = False
                    raise
                pcpu.since_ns = time.monotonic_ns()

    def sched_out(self, context: Context) -> None:
        """*context* does not need its processor for now."""
        with self._lock:
            pcpu = context.pcpu
            assert pcpu is not None
            pcpu.running = False
            if self._queue or not pcpu.online:
                self._free.notify_all()

    def seat_is_free(self) -> None:
        """A processor was given back without sched_out() while somebody waited for one."""
        with self._lock:
            self._free.notify_all()

    def _count_waiting(self) -> None:
        self.contended = self._frozen or bool(self._queue)

    def forget(self, context: Context) -> None:
        """*context*, which does not run, is about to be destroyed."""
        with self._lock:
            if context.pcpu is not None:
                context.pcpu.evict()
            self.trim()

    def _wait_for_one(self, context: Context, brief: bool) -> PhysicalCpu:
        """In turn: a vCPU that has just made room does not get ahead of those that wait for it."""
        if brief:
            self._queue.appendleft(context)
        else:
            self._queue.append(context)
        self._count_waiting()
        try:
            while True:
                if self._queue[0] is context and not self._frozen and (chosen := self._choose(context)) is not None:
                    return chosen
                if self._queue[0] is context:
                    self._tick(0 if brief else TICK_NS)
                self._free.wait(TICK_S)
        finally:
            self._queue.remove(context)
            self._count_waiting()
            if self._queue:
                self._free.notify_all()

    def _choose(self, context: Context) -> PhysicalCpu | None:
        """select_task_rq(), and claim it: the one that is warm, else one that is empty, else a new one, else any."""
        own = context.pcpu
        if own is not None and own.online and own.claim():
            return own
        idle = [pcpu for pcpu in self._cpus.values() if not pcpu.running and pcpu.online]
        for pcpu in idle:
            if pcpu.holder is None and pcpu.claim():
                return pcpu
        if len(self._cpus) < self.limit and (new := self._one_more()) is not None and new.claim():
            return new
        return next((pcpu for pcpu in sorted(idle, key=lambda pcpu: pcpu.since_ns) if pcpu.claim()), None)

    def _one_more(self) -> PhysicalCpu | None:
        """The next processor comes up; None if it cannot, and there are others."""
        try:
            return self.online(next(number for number in range(self.limit) if number not in self._cpus))
        except OSError:
            if not self._cpus:
                raise
            return None

    def _tick(self, share_ns: int) -> None:
        """The vCPU that runs longest makes room, if it has had its share."""
        if self._frozen:
            return
        busy = [pcpu for pcpu in self._cpus.values() if pcpu.running and pcpu.holder is not None]
        longest = min(busy, key=lambda pcpu: pcpu.since_ns, default=None)
        if longest is None or longest.holder is None or time.monotonic_ns() - longest.since_ns < share_ns:
            return
        longest.holder.preempt()

    @staticmethod
    def _switch(pcpu: PhysicalCpu, context: Context) -> None:
        if pcpu.holder is context:
            return
        if context.pcpu is not None:
            context.pcpu.evict()
        pcpu.evict()
        context.load(pcpu)
        pcpu.holder = context


# As many as vCPUs can be, so that by default each has one of its own.
POOL = PhysicalCpus(limit=1024)
