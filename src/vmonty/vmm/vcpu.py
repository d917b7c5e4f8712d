"""One vCPU of a machine: its thread and its exits."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmonty.base.errors import HandleClosed, KvmError
from vmonty.kvm.api import Vcpu
from vmonty.kvm.uapi import Exit
from vmonty.kvm.uapi.flags import KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET
from vmonty.vmm.bus import Bus
from vmonty.vmm.outcome import Ending, Outcome


class VcpuThread:
    """Runs *vcpu* on a thread named ``CPU n/KVM`` and sends its accesses to the buses.

    *ended* is called once, on that thread, when the guest stopped by itself or could not go on.
    """

    def __init__(self, vcpu: Vcpu, ports: Bus, mmio: Bus, ended: Callable[[Outcome], None]) -> None:
        self.vcpu = vcpu
        self._ports = ports
        self._mmio = mmio
        self._ended = ended
        self._stop = threading.Event()
        # Guards the three after it, and tells of changes to them.
        self._change = threading.Condition()
        self._pausing = 0  # how many have asked for it
        self._parked = False
        self._left = False
        # Sees each exit before it is handled, on this thread.
        self.hook: Callable[[Vcpu, Exit | int], None] | None = None
        self._thread = threading.Thread(target=self._main, name=f"CPU {vcpu.id}/KVM", daemon=True)

    def start(self) -> None:
        """Start the thread; call it once."""
        self._thread.start()

    def pause(self) -> bool:
        """Ask the thread to wait outside of the guest, no instruction half done; whether it was the first."""
        with self._change:
            self._pausing += 1
            first = self._pausing == 1
        if not self.vcpu.closed:
            self.vcpu.kick()
        return first

    def wait_paused(self, timeout: float) -> bool:
        """Whether the thread waits, or has ended, within *timeout* seconds. On the thread itself: it does not run."""
        if self._thread is threading.current_thread():
            return True
        with self._change:
            return self._change.wait_for(self._stands_still, timeout)

    def _stands_still(self) -> bool:
        return self._left or (self._parked and bool(self._pausing))

    def resume(self) -> None:
        """Let the thread go on, when all who paused it have said so. From any thread."""
        with self._change:
            self._pausing -= 1
            self._change.notify_all()

    def _park(self) -> None:
        # A resume() and the next pause() may both come before this thread has woken: then it has never gone on.
        with self._change:
            self._parked = True
            self._change.notify_all()
            self._change.wait_for(lambda: not self._pausing or self._stop.is_set())
            self._parked = False

    def stop(self) -> None:
        """Ask the thread to leave; returns at once. From any thread."""
        self._stop.set()
        with self._change:
            self._change.notify_all()
        if not self.vcpu.closed:
            self.vcpu.kick()

    def join(self) -> None:
        """Wait for the thread's end, unless called on it."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _main(self) -> None:
        try:
            self._run()
        finally:
            with self._change:
                self._left = True
                self._change.notify_all()

    def _run(self) -> None:
        try:
            with self.vcpu.runs() as run:
                self._serve(run)
        except HandleClosed:
            return
        except KvmError as error:
            self._ended(Outcome(Ending.ERROR, str(error), self.registers()))
        except Exception as error:  # whatever it is, the machine must end: nobody else would notice this thread's death
            detail = f"internal error on {self._thread.name}: {type(error).__name__}: {error}"
            self._ended(Outcome(Ending.ERROR, detail, self.registers()))

    def _serve(self, run: Callable[[], Exit | int]) -> None:
        """Until it is to stop, or has ended by itself."""
        while not self._stop.is_set():
            reason = run()
            if self.hook is not None:
                self.hook(self.vcpu, reason)
            if self._pausing and reason is Exit.INTR:
                # The kick that came with the wish has completed the last access.
                self._park()
                continue
            if reason is Exit.IO:
                self._io()
                continue
            if reason is Exit.MMIO:
                self._memory_access()
                continue
            outcome = self._handle(reason)
            if outcome is not None:
                self._ended(outcome)
                return

    def _handle(self, reason: Exit | int) -> Outcome | None:
        match reason:
            case Exit.INTR | Exit.IRQ_WINDOW_OPEN:
                pass
            case Exit.SHUTDOWN:
                return Outcome(Ending.SHUTDOWN, "the guest ended in a triple fault", self.registers())
            case Exit.SYSTEM_EVENT:
                return self._system_event()
            case Exit.HLT:
                return Outcome(Ending.HALTED, "the guest halted with nothing that could wake it", self.registers())
            case Exit.FAIL_ENTRY:
                failure = self.vcpu.kvm_run.u.fail_entry.hardware_entry_failure_reason
                return Outcome(
                    Ending.ERROR, f"KVM could not enter the guest (hardware reason {failure:#x})", self.registers()
                )
            case Exit.INTERNAL_ERROR:
                internal = self.vcpu.kvm_run.u.internal
                data = " ".join(f"{word:#x}" for word in internal.data[: min(internal.ndata, 16)])
                return Outcome(
                    Ending.ERROR, f"KVM's internal error {internal.suberror} (data: {data})", self.registers()
                )
            case _:
                return Outcome(
                    Ending.ERROR, f"KVM left with exit reason {reason!r}, which is unexpected", self.registers()
                )
        return None

    def _io(self) -> None:
        reads, size, port, data = self.vcpu.io_access()
        if len(data) > size and self._string_io(reads, port, size, data):
            return
        if reads:
            for at in range(0, len(data), size):
                data[at : at + size] = self._ports.read(port, size).to_bytes(size, "little")
        else:
            for at in range(0, len(data), size):
                self._ports.write(port, size, int.from_bytes(data[at : at + size], "little"))

    def _string_io(self, reads: bool, port: int, size: int, data: memoryview) -> bool:
        """REP INS or OUTS, where the device has a short way for it."""
        found = self._ports.find(port, size)
        if found is None or (many := getattr(found[0], "read_string" if reads else "write_string", None)) is None:
            return False
        many(found[1], size, data)
        return True

    def _memory_access(self) -> None:
        writes, address, data = self.vcpu.mmio_access()
        if writes:
            self._mmio.write(address, len(data), int.from_bytes(data, "little"))
        else:
            data[:] = self._mmio.read(address, len(data)).to_bytes(len(data), "little")

    def _system_event(self) -> Outcome:
        kind = self.vcpu.kvm_run.u.system_event.type
        if kind == KVM_SYSTEM_EVENT_RESET:
            return Outcome(Ending.RESET, "the guest asked for a reset")
        if kind == KVM_SYSTEM_EVENT_CRASH:
            return Outcome(Ending.SHUTDOWN, "the guest reported a crash", self.registers())
        return Outcome(Ending.POWER_OFF, "the guest powered off")

    def on_thread(self) -> bool:
        """Does the caller run on this vCPU's thread, which is where its exits are handled?"""
        return self._thread is threading.current_thread()

    def registers(self) -> dict[str, int]:
        """The general and control registers by name, for a person; empty when they cannot be had. On its thread."""
        try:
            regs, sregs = self.vcpu.get_regs(), self.vcpu.get_sregs()
        except (KvmError, HandleClosed):
            return {}
        shown = {name: getattr(regs, name) for name, *_ in regs._fields_}
        shown |= {name: getattr(sregs, name) for name in ("cr0", "cr2", "cr3", "cr4", "efer")}
        return shown | {"cs": sregs.cs.selector, "cs.base": sregs.cs.base}
