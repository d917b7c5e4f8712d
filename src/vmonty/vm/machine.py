"""``vmonty.VM``: a virtual machine from Python."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vmonty.base.closing import Closing
from vmonty.base.errors import UsageError
from vmonty.base.sizes import parse_size
from vmonty.guests.progress import Progress, silent
from vmonty.kvm.api import Vcpu
from vmonty.kvm.uapi import Exit
from vmonty.vm.build import Build
from vmonty.vm.console import ConsoleSession
from vmonty.vmm import accel, inspection
from vmonty.vmm.commands import balloon_of
from vmonty.vmm.control import ControlSocket
from vmonty.vmm.display.console import screen_of, type_text
from vmonty.vmm.display.screen import Screen
from vmonty.vmm.hotplug import UNPLUG_SECONDS, plug, slots_of
from vmonty.vmm.inspection import CONTROL_REGISTERS, GENERAL_REGISTERS, Counters, StateError
from vmonty.vmm.machine import Machine
from vmonty.vmm.outcome import Ending, Outcome
from vmonty.vmm.tracing import Tracers

if TYPE_CHECKING:
    from vmonty.vm.settings import Settings

ExitHook = Callable[[Vcpu, "Exit | int"], None]


class State(Enum):
    """Where a VM is in its life."""

    NEW = "new"
    READY = "ready"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


class Event(Enum):
    """What a VM tells of; in parentheses what the callback gets."""

    STARTED = "started"  # ()
    PAUSED = "paused"  # ()
    RESUMED = "resumed"  # ()
    RESET = "reset"  # (Outcome)
    PANIC = "panic"  # (the line of the guest's kernel)
    ENDED = "ended"  # (Outcome)


class VM(Closing):
    """One virtual machine, which lives as long as the ``with`` block.

    *fields* are those of ``Settings``. *output* also gets what the guest prints, on a vCPU's thread. Raises UsageError,
    naming the field, for a bad setting; entering the block raises what the files and KVM refuse.
    """

    def __init__(
        self,
        ready: Settings | None = None,
        /,
        *,
        output: Callable[[bytes], None] | None = None,
        progress: Progress = silent,
        **fields: Any,
    ) -> None:
        if ready is not None and fields:
            raise UsageError("give either Settings or their fields")
        from vmonty.vm.settings import settings

        self.settings: Settings = ready if ready is not None else settings(fields)
        self.state = State.NEW
        self.outcome: Outcome | None = None
        self._output, self._progress = output, progress
        self._lock = threading.RLock()
        self._callbacks: dict[Event, list[Callable[..., object]]] = {event: [] for event in Event}
        self._hooks: list[ExitHook] = []
        self._machine: Machine | None = None
        # Not _lock, which is held while a machine ends, and its output is waited for: who reads it may answer.
        self._input = threading.Lock()
        self._unsent = bytearray()
        self._reader: Machine | None = None  # who takes input now
        self._ended = threading.Event()
        self._stopping: str | None = None
        self._supervisor: threading.Thread | None = None
        self._timer: threading.Timer | None = None
        self._console: ConsoleSession | None = None
        self._build: Build | None = None
        self._choice: accel.Choice | None = None
        self._control: ControlSocket | None = None
        self.tracers = Tracers()
        self.ssh: list[str] = []  # the command that reaches the Debian guest's sshd, when it has the usual network

    @classmethod
    def from_file(cls, path: str | Path, **others: Any) -> VM:
        """A VM as a TOML or YAML file describes it; fields among *others* replace the file's. Raises UsageError."""
        from vmonty.vm.settings import read_file

        return cls(**{**read_file(Path(path)), **others})

    # ---- life -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Choose the accelerator and build the machine; nothing runs yet. ``with`` does it."""
        if self.state is not State.NEW:
            raise StateError("a VM is opened once; make another one")
        # Bad input first: it is cheaper to refuse than to open an accelerator.
        plan = self.settings.plan()
        if plan.guest == "debian":
            from vmonty.vm import debian

            plan, self.ssh = debian.planned(plan, self._progress)
        self._build = Build(plan)
        try:
            self._choice = accel.choose(self.settings.accel)
            self._build.fetch(lambda: contextlib.nullcontext(self._progress))
            self._console = ConsoleSession(self._send, self._output, self.settings.console_log)
            self._machine = self._build.machine(self._choice.system, self._console.feed)
        except BaseException:
            self.close()
            raise
        self.state = State.READY

    def close(self) -> None:
        """Stop it, and give everything back. A second call does nothing."""
        self.stop()
        if self._control is not None:
            self._control.close()
        if self._supervisor is not None and self._supervisor is not threading.current_thread():
            self._supervisor.join()
        if self._timer is not None:
            self._timer.cancel()
        if self._machine is not None:
            assert self._build is not None
            self._build.end(self._machine)
            self._machine = None
        for part in (self._build, self._console, self._choice.system if self._choice is not None else None):
            if part is not None:
                part.close()
        self._choice = None
        self.state = State.ENDED

    def __enter__(self) -> Self:
        self.open()
        return self

    @property
    def accelerator(self) -> str:
        """What runs the vCPUs and why, in one line."""
        return self._choice.reason if self._choice is not None else ""

    @property
    def console(self) -> ConsoleSession:
        """The serial console."""
        if self._console is None:
            raise StateError("the VM has no console before it is opened")
        return self._console

    @property
    def forwarded_ports(self) -> tuple[int, ...]:
        """The host's ports of all ``hostfwd``, in order; tells those that were given as 0."""
        networks = self._machine.networks if self._machine is not None else []
        return tuple(forward.port for network in networks for forward in network.forwards)

    # ---- control ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the guest run. Raises StateError unless the VM is ready."""
        with self._lock:
            if self.state is not State.READY:
                raise StateError(f"the VM is {self.state.value}: it is started once, after it was opened")
            self._start_machine()
            self.state = State.RUNNING
            if self.settings.timeout is not None:
                self._timer = threading.Timer(self.settings.timeout, self.stop, ("the time is over",))
                self._timer.daemon = True
                self._timer.start()
            self._supervisor = threading.Thread(target=self._supervise, name="VM", daemon=True)
            self._supervisor.start()
        self._tell(Event.STARTED)

    def pause(self) -> None:
        """Stop all vCPUs between two instructions. Raises StateError unless it runs."""
        with self._lock:
            machine = self._running(State.RUNNING)
            inspection.pause(machine)
            self.state = State.PAUSED
        self._tell(Event.PAUSED)

    def resume(self) -> None:
        """Go on after pause(). Raises StateError unless it is paused."""
        with self._lock:
            inspection.resume(self._running(State.PAUSED))
            self.state = State.RUNNING
        self._tell(Event.RESUMED)

    def reset(self) -> None:
        """Press the reset button: a new machine on the same disks starts, unless ``reboot`` is off."""
        self._running(State.RUNNING, State.PAUSED).press_reset_button()

    def power_off(self) -> None:
        """Press the power button (ACPI): the guest shuts itself down, if it listens."""
        self._running(State.RUNNING).press_power_button()

    def stop(self, detail: str = "stopped") -> None:
        """Pull the plug. From any thread, also when nothing runs."""
        if self._stopping is None:
            self._stopping = detail
        if machine := self._machine:
            machine.stop(detail)

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait *timeout* seconds for the end, over resets; how it ended, or None when it has not."""
        return self.outcome if self._ended.wait(timeout) else None

    def _running(self, *states: State) -> Machine:
        machine = self._machine
        if machine is None and self.state is State.RUNNING:
            # A reset is making the next one; no thread that this one waits for comes here meanwhile.
            with self._lock:
                machine = self._machine
        if self.state not in states or machine is None:
            wanted = " or ".join(state.value for state in states)
            raise StateError(f"the VM is {self.state.value}; for this it must be {wanted}")
        return machine

    def _start_machine(self) -> None:
        machine = self._machine
        assert machine is not None
        machine.panic.told = self._panicked
        for thread in machine.vcpus:
            thread.hook = self._exit if self._hooks else None
        if self._hooks:
            machine.see_all_ports()
        self.tracers.attach(machine.vm)
        with self._input:
            if self._unsent:
                machine.terminal.receive(bytes(self._unsent))
                self._unsent.clear()
            self._reader = machine
        machine.start()
        if self._stopping is not None:
            machine.stop(self._stopping)

    def _supervise(self) -> None:
        try:
            outcome = self._outcome_over_resets()
        except Exception as error:  # nobody else would notice this thread's death
            outcome = Outcome(Ending.ERROR, f"internal error: {type(error).__name__}: {error}")
            if (machine := self._machine) is not None:
                machine.stop()
        assert self._build is not None
        self._build.over()
        self.outcome = outcome
        self.state = State.ENDED
        self.console.ended()
        try:
            self._tell(Event.ENDED, outcome)
        finally:
            self._ended.set()

    def _outcome_over_resets(self) -> Outcome:
        while True:
            assert self._machine is not None
            outcome = self._machine.wait()
            assert outcome is not None
            with self._lock:
                self.tracers.detach()
                with self._input:
                    self._reader = None
                assert self._build is not None
                self._build.end(self._machine)
                again = outcome.ending is Ending.RESET and self.settings.reboot and self._stopping is None
                if not again:
                    outcome = self._machine.last(outcome)
                if again:
                    try:
                        self._again()
                    except Exception as error:  # nobody else would notice this thread's death
                        outcome = Outcome(Ending.ERROR, f"no new machine after a reset: {error}")
                        again = False
            if not again:
                return outcome
            self._tell(Event.RESET, outcome)

    def _again(self) -> None:
        assert self._build is not None
        assert self._choice is not None
        # A machine refers to itself through its devices: without this its RAM would stay beside the next one's.
        self._machine = None
        gc.collect()
        self._machine = self._build.machine(self._choice.system, self.console.feed)
        self._start_machine()
        self.state = State.RUNNING

    # ---- console ----------------------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        with self._input:
            # Before the start, and between two machines, input waits.
            if (machine := self._reader) is None:
                self._unsent += data
                return
        machine.terminal.receive(data)

    def backlog(self) -> int:
        """How many bytes of input the guest has yet to take. From any thread."""
        machine = self._reader
        return len(self._unsent) + (machine.terminal.backlog() if machine is not None else 0)

    def _panicked(self, line: str) -> None:
        # Not on the vCPU's thread, which prints: the callback may pause the VM.
        threading.Thread(target=self._tell, args=(Event.PANIC, line), name="VM event", daemon=True).start()

    # ---- screen, keyboard -----------------------------------------------------------------------------------

    @property
    def screen(self) -> Screen:
        """What it shows: ``text()``, ``save(path)``, ``frame()``. Raises UsageError when it has no display adapter.

        ``vnc=":0"`` or ``devices="VGA"`` adds one. A reset makes another screen: ask for it again.
        """
        return screen_of(self._running(State.READY, State.RUNNING, State.PAUSED))

    def type(self, text: str) -> None:
        """Write *text* on the keyboard, as fast as the guest reads it; a line's end is Enter.

        Raises UsageError for what a US keyboard lacks, and for a guest that reads nothing for seconds.
        """
        type_text(self._running(State.RUNNING), text)

    # ---- devices that come and go -----------------------------------------------------------------------------

    def devices(self) -> dict[int, str]:
        """Slot → name of each device that may be removed while it runs."""
        return slots_of(self._running(State.READY, State.RUNNING, State.PAUSED)).devices()

    def plug(self, *, disk: str | None = None, net: str | None = None, device: str | None = None) -> int:
        """Add a virtio device, described as on the command line, while it runs; gives its slot.

        Raises UsageError and its kin for what cannot be added, StateError when the guest resets meanwhile.
        """
        given = [(kind, text) for kind, text in (("disk", disk), ("net", net), ("device", device)) if text is not None]
        if len(given) != 1:
            raise UsageError("plug takes one of disk, net and device")
        return plug(self._running(State.RUNNING, State.PAUSED), *given[0])

    def unplug(self, slot: int, timeout: float = UNPLUG_SECONDS) -> None:
        """Ask the guest for the device in *slot*, and wait *timeout* seconds until it lets go. Raises VmontyError."""
        slots_of(self._running(State.RUNNING)).remove(slot, timeout)

    def balloon(self, size: int | str | None = None) -> dict[str, Any]:
        """Ask the guest to get along with *size* of its memory; bytes: ``memory``, ``target``, ``actual``, statistics.

        The guest takes its time. Raises UsageError without a virtio-balloon, and for more than the memory.
        """
        balloon = balloon_of(self._running(State.RUNNING))
        if size is not None:
            balloon.set_target(parse_size(size) if isinstance(size, str) else size)
        return balloon.state()

    # ---- media --------------------------------------------------------------------------------------------

    def change_medium(self, drive: str, path: str | Path | None, *, force: bool = False) -> None:
        """Put the disc in *path* into *drive* (``cd0`` is the first), None for nothing; the guest is told.

        Raises UsageError for an unknown drive, and while the guest has locked it, which is told to give its disc up:
        try again, or *force* it. Raises DiskImageError for what is no disc.
        """
        self._running(State.READY, State.RUNNING, State.PAUSED)
        assert self._build is not None
        self._build.change_medium(drive, Path(path) if path is not None else None, force=force)

    @property
    def media(self) -> dict[str, str | None]:
        """Drives for media, and the files in them; None: nothing that the guest can read."""
        return self._build.media() if self._build is not None else {}

    # ---- events and exits ---------------------------------------------------------------------------------

    def on(self, event: Event | str, callback: Callable[..., object]) -> None:
        """Call *callback* at each *event*, on a thread of the VM's; see Event for what it gets."""
        self._callbacks[Event(event)].append(callback)

    def _tell(self, event: Event, *details: object) -> None:
        for callback in self._callbacks[event]:
            try:
                callback(*details)
            except Exception:
                if threading.current_thread() is not self._supervisor:
                    raise
                # The VM goes on: nobody else looks after it.
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))

    def on_exit(self, hook: ExitHook) -> None:
        """Call *hook* with (vcpu, reason) at each exit of each vCPU, on its thread, before it is handled.

        The vCPU's ``kvm_run`` and state may be read there. Before start(); it makes every exit slower.
        """
        if self.state not in (State.NEW, State.READY):
            raise StateError("exit hooks are set before the VM starts")
        self._hooks.append(hook)

    def _exit(self, vcpu: Vcpu, reason: Exit | int) -> None:
        for hook in self._hooks:
            hook(vcpu, reason)

    # ---- inspection ---------------------------------------------------------------------------------------

    def read_memory(self, address: int, size: int) -> bytes:
        """*size* bytes of guest RAM at guest-physical *address*. Raises GuestMemoryError outside of RAM."""
        return self._running(State.READY, State.RUNNING, State.PAUSED).memory.read(address, size)

    def write_memory(self, address: int, data: bytes) -> None:
        """Write guest RAM at guest-physical *address*. Raises GuestMemoryError outside of RAM."""
        self._running(State.READY, State.RUNNING, State.PAUSED).memory.write(address, data)

    def _vcpu(self, cpu: int) -> Vcpu:
        return inspection.vcpu_of(self._running(State.PAUSED), cpu)

    def registers(self, cpu: int = 0) -> dict[str, int]:
        """General and control registers of a vCPU by name. Raises StateError unless the VM is paused."""
        with self._lock:
            return inspection.registers(self._vcpu(cpu))

    def set_registers(self, cpu: int = 0, **values: int) -> None:
        """Set registers of a vCPU by name. Raises StateError unless the VM is paused, UsageError for unknown names."""
        for name, value in values.items():
            if name not in GENERAL_REGISTERS + CONTROL_REGISTERS:
                raise UsageError(f"there is no register {name!r}")
            if not 0 <= value < 1 << 64:
                raise UsageError(f"{name}: {value:#x} is no value of 64 bits")
        with self._lock:
            vcpu = self._vcpu(cpu)
            regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
            for name, value in values.items():
                setattr(regs if name in GENERAL_REGISTERS else sregs, name, value)
            if values.keys() & set(CONTROL_REGISTERS):
                vcpu.set_sregs(sregs)
            if values.keys() & set(GENERAL_REGISTERS):
                vcpu.set_regs(regs)

    # ---- control socket -------------------------------------------------------------------------------------

    def listen(self, name: str | Path) -> Path:
        """Open a control socket, for `vmonty trace` and `stat` and whoever speaks its JSON; gives its path.

        *name* is a path, or a name without a slash: a socket in $XDG_RUNTIME_DIR/vmonty. Raises UsageError.
        """
        if self._control is not None:
            raise StateError(f"the VM listens at {self._control.path} already")
        self._control = ControlSocket(name, _Remote(self))
        return self._control.path

    def trace(self, sink: Callable[[Any], None]) -> Callable[[], None]:
        """Have *sink* called with each exit, on the vCPU's thread; gives what ends it. Raises KvmUnsupported.

        The record has vcpu, entered_ns, left_ns, reason, name, qualification and rip.
        """
        self.tracers.add(sink)
        return lambda: self.tracers.remove(sink)


class _Remote:
    """A VM as its control socket has it."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        self.tracers = vm.tracers
        self.pause, self.resume, self.reset = vm.pause, vm.resume, vm.reset
        self.power_down, self.quit = vm.power_off, vm.stop
        self.change_medium = vm.change_medium

    def media(self) -> dict[str, str | None]:
        return self._vm.media

    def status(self) -> dict[str, Any]:
        machine = self._vm._machine
        config = {} if machine is None else inspection.description(machine)
        return {"state": self._vm.state.value, "accelerator": self._vm.accelerator, **config}

    def machine(self) -> Machine:
        return self._vm._running(State.READY, State.RUNNING, State.PAUSED)

    def counters(self) -> dict[str, dict[str, int]]:
        counters = Counters(self._vm._running(State.RUNNING, State.PAUSED))
        try:
            return counters.read()
        finally:
            counters.close()

    def registers(self, cpu: int) -> dict[str, int]:
        with self._vm._lock:
            was_running = self._vm.state is State.RUNNING
            if was_running:
                self._vm.pause()
            try:
                return self._vm.registers(cpu)
            finally:
                if was_running:
                    self._vm.resume()
