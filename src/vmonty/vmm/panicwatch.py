"""A guest's kernel that panicked and stays there: noticed by its last line and by what its processors do then.

Linux tells it by pvpanic where it has that driver. Without it, and without ``panic=``, the kernel prints its last line
and spins for ever. The line alone may be an old log that somebody reads; so the vCPUs are looked at, too: those of a
dead kernel are halted with interrupts off, or spin in one place with one stack. Source: Linux's panic().
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from vmonty.base.errors import VmontyError
from vmonty.kvm.uapi.flags import KVM_MP_STATE_HALTED
from vmonty.vmm.vcpu import VcpuThread

# The beginning of a kernel's line: its time, and who printed it.
TIME = re.compile(rb"(?:\[ *\d+\.\d+\](?:\[ *\w+\])? )?")
PANIC = b"Kernel panic - not syncing"
# Nothing comes after it.
LAST_LINE = b"---[ end " + PANIC
# A reboot that somebody asked for says so; one that a panic does (``panic=-1``) does not.
REBOOT = b"reboot: "
LONGEST_LINE = 512
# Alike this often in a row, this far apart, is dead; a look that sees life ends the watch.
LOOKS, APART_S, MOST_LOOKS = 10, 0.1, 100
PAUSE_S = 1.0
SAME_PLACE = 256  # bytes of code: udelay()'s loop
INTERRUPTS_ON = 1 << 9


class Stand(NamedTuple):
    """Where a vCPU stands."""

    user: bool
    halted: bool
    interrupts: bool
    rip: int
    rsp: int

    @property
    def alive(self) -> bool:
        """It runs a program, or waits for something to do."""
        return self.user or (self.halted and self.interrupts)

    def like(self, other: Stand) -> bool:
        """Neither has gone anywhere from where the other stands."""
        return self.halted == other.halted and self.rsp == other.rsp and abs(self.rip - other.rip) < SAME_PLACE


class PanicWatch:
    """Reads what the guest prints; *dead* is called with registers when *vcpus* will never go on.

    ``told`` is called with the line of the first panic, on the thread that prints, which must not wait. ``reason`` is
    what the last one said, ``seen`` that there was one, and no ordinary reboot after it.
    """

    def __init__(self, vcpus: Sequence[VcpuThread], dead: Callable[[Mapping[str, int]], None]) -> None:
        self._vcpus, self._dead = vcpus, dead
        self._closed = threading.Event()
        self._lock = threading.Lock()  # guards the next two
        self._has_told = False
        self._thread: threading.Thread | None = None
        self.told: Callable[[str], None] = lambda line: None
        self.seen, self.reason = False, ""

    def reader(self) -> Callable[[bytes], None]:
        """For one console, by whose thread it is called: the guest printed this there."""
        kept = b""

        def feed(data: bytes) -> None:
            nonlocal kept
            *lines, rest = data.split(b"\n")
            if lines:
                lines[0] = kept + lines[0]
                for line in lines:
                    self._read(line[:LONGEST_LINE])
                kept = b""
            kept = (kept + rest)[:LONGEST_LINE]

        return feed

    def _read(self, line: bytes) -> None:
        begin = TIME.match(line)
        said = line[begin.end() if begin else 0 :]
        if said.startswith(REBOOT):
            self.seen, self.reason = False, ""
        elif said.startswith(LAST_LINE):
            self._panicked(said)
            self._begin()
        elif said.startswith(PANIC):
            self._panicked(said)
            with self._lock:
                tell, self._has_told = not self._has_told, True
            if tell:
                self.told(said.decode(errors="replace").strip())

    def _panicked(self, said: bytes) -> None:
        why = said.partition(PANIC)[2].strip().removesuffix(b"]---").lstrip(b":").strip()
        self.seen, self.reason = True, why.decode(errors="replace")

    def _begin(self) -> None:
        with self._lock:
            if self._closed.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._watch, name="panic", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End a watch."""
        with self._lock:
            self._closed.set()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _watch(self) -> None:
        before: list[Stand] = []
        alike = looks = 0
        while looks < MOST_LOOKS and not self._closed.wait(APART_S):
            try:
                with self._stopped() as alone:
                    if not alone:
                        before = []  # somebody else stands in its way
                        continue
                    stands = [_stand(thread) for thread in self._vcpus]
                    if any(stand.alive for stand in stands):
                        return
                    looks += 1
                    alike = alike + 1 if before and all(map(Stand.like, stands, before)) else 0
                    before = stands
                    if alike == LOOKS:
                        # The one that spins is the one that panicked.
                        spinning = (one for one, stand in zip(self._vcpus, stands, strict=True) if not stand.halted)
                        self._dead(next(spinning, self._vcpus[0]).registers())
                        return
            except VmontyError:
                return  # a vCPU ends meanwhile, or is held by who reads the console

    @contextlib.contextmanager
    def _stopped(self) -> Iterator[bool]:
        """The vCPUs stand; whether nobody but this watch wants them to, since when is not known."""
        alone = True
        for thread in self._vcpus:
            alone = thread.pause() and alone
        try:
            if not all(thread.wait_paused(PAUSE_S) for thread in self._vcpus):
                raise VmontyError("a vCPU cannot be stopped")
            yield alone
        finally:
            for thread in self._vcpus:
                thread.resume()


def _stand(thread: VcpuThread) -> Stand:
    vcpu = thread.vcpu
    regs = vcpu.get_regs()
    return Stand(
        user=vcpu.get_sregs().cs.selector & 3 == 3,
        halted=vcpu.get_mp_state() == KVM_MP_STATE_HALTED,
        interrupts=bool(regs.rflags & INTERRUPTS_ON),
        rip=regs.rip,
        rsp=regs.rsp,
    )
