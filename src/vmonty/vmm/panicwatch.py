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

PANIC = re.compile(rb"Kernel panic - not syncing(?:: *([^\r\n]*?))?(?: \]---)?\r?$")
# At the line's beginning, behind its time at most: nothing comes after it.
LAST_LINE = re.compile(rb"(?:\[ *\d+\.\d+\](?:\[ *\w+\])? )?---\[ end Kernel panic - not syncing")
# A reboot that somebody asked for says so; one that a panic does (``panic=-1``) does not.
REBOOT = re.compile(rb"(?:\[ *\d+\.\d+\](?:\[ *\w+\])? )?reboot: ")
LONGEST_LINE = 4096
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
    """Reads what the guest prints (``feed``); *dead* is called with registers when *vcpus* will never go on.

    ``told`` is called with each panic's line, on a thread that may wait. ``reason`` is what the last one said, ``seen``
    that there was one, and no ordinary reboot after it.
    """

    def __init__(self, vcpus: Sequence[VcpuThread], dead: Callable[[Mapping[str, int]], None]) -> None:
        self._vcpus, self._dead = vcpus, dead
        self._line = b""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.told: Callable[[str], None] = lambda line: None
        self.seen, self.reason = False, ""

    def feed(self, data: bytes) -> None:
        """The guest printed *data*."""
        self._line += data
        if b"\n" not in data:
            self._line = self._line[-LONGEST_LINE:]
            return
        *lines, rest = self._line.split(b"\n")
        self._line = rest[-LONGEST_LINE:]
        for line in lines:
            if b"Kernel panic" in line and (found := PANIC.search(line)):
                self._panicked(line, found)
            elif b"reboot: " in line and REBOOT.match(line):
                self.seen, self.reason = False, ""

    def _panicked(self, line: bytes, found: re.Match[bytes]) -> None:
        self.seen = True
        self.reason = (found[1] or b"").decode(errors="replace").strip()
        if not LAST_LINE.match(line):
            self.told(line[found.start() :].decode(errors="replace").strip())
        elif self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._watch, name="panic", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End a watch."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        before: list[Stand] = []
        alike = 0
        for _ in range(MOST_LOOKS):
            if self._closed.wait(APART_S):
                return
            try:
                with self._stopped():
                    stands = [_stand(thread) for thread in self._vcpus]
                    if any(stand.alive for stand in stands):
                        return
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
    def _stopped(self) -> Iterator[None]:
        for thread in self._vcpus:
            thread.pause()
        try:
            if not all(thread.wait_paused(PAUSE_S) for thread in self._vcpus):
                raise VmontyError("a vCPU cannot be stopped")
            yield
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
