"""A vCPU on a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmonty.kvm.api import Vcpu
from vmonty.kvm.uapi import Exit

# Longer than the watchdog of KVM_RUN, so that its message is the one to be seen.
WAIT_S = 40.0


class Runner:
    """Runs *vcpu* on a thread until a test ends it, or KVM refuses.

    An exit by OUT is passed to the test as (port, value) and the guest goes on; any other exit, or an
    exception, is passed on and the thread ends.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self._results: queue.Queue[tuple[int, int] | Exit | int | BaseException] = queue.Queue()
        self.thread = threading.Thread(target=self._work, name=f"vCPU {vcpu.id}")
        self.thread.start()

    def _work(self) -> None:
        try:
            while True:
                reason = self.vcpu.run()
                io = self.vcpu.kvm_run.u.io
                if reason is not Exit.IO or not io.direction:
                    self._results.put(reason)
                    return
                self._results.put((io.port, int.from_bytes(self.vcpu.io_data(), "little")))
        except BaseException as error:
            self._results.put(error)

    def next(self) -> tuple[int, int] | Exit | int | BaseException:
        """The next OUT, or what ended the run."""
        try:
            return self._results.get(timeout=WAIT_S)
        except queue.Empty:
            raise AssertionError(f"vCPU {self.vcpu.id} gave nothing for {WAIT_S:g} s") from None

    def nothing_yet(self) -> bool:
        """Whether nothing has come so far."""
        return self._results.empty()

    def join(self) -> None:
        """Wait for the thread's end."""
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive(), f"vCPU {self.vcpu.id} still runs"

    def end(self) -> None:
        """Kick the vCPU out, unless it is closed or has ended, and wait for the thread."""
        while self.thread.is_alive():
            if not self.vcpu.closed:
                self.vcpu.kick()
            self.thread.join(0.1)


@contextmanager
def runners() -> Iterator[Callable[[Vcpu], Runner]]:
    """A factory of threads that run vCPUs; whatever still runs at the end is kicked out."""
    started: list[Runner] = []

    def start(vcpu: Vcpu) -> Runner:
        started.append(Runner(vcpu))
        return started[-1]

    yield start
    for thread in started:
        thread.end()
