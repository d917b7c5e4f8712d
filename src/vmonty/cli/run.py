"""``vmonty run``: boot a guest with its serial console on this terminal."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from vmonty.base.errors import UsageError
from vmonty.base.record import Record
from vmonty.cli.observe import Observation, SessionControl
from vmonty.cli.sizes import Size
from vmonty.cli.terminal import MOST_BACKLOG, Console
from vmonty.vm.build import Build
from vmonty.vm.plan import Plan, usual_firmware
from vmonty.vmm import accel, catalogue
from vmonty.vmm import cpu as cpu_model
from vmonty.vmm.firmware import BootOptions
from vmonty.vmm.machine import Machine
from vmonty.vmm.memory import check_size
from vmonty.vmm.optionrom import OptionRom
from vmonty.vmm.outcome import Ending, Outcome
from vmonty.vmm.peripherals import Cdrom, Disk, Network
from vmonty.vmm.tracing import Tracers

if TYPE_CHECKING:
    from vmonty.cli.monitor import Monitor
    from vmonty.cli.tracefile import TraceFile
    from vmonty.guests.progress import Progress

STATUS_TIMEOUT, STATUS_FAILED, FIRST_SIGNAL_STATUS = 124, 1, 128
MOST_SECONDS = 10**9  # Python's timers end somewhat above
STATUS = {
    Ending.POWER_OFF: 0, Ending.RESET: 0, Ending.STOPPED: 0, Ending.SHUTDOWN: 1, Ending.HALTED: 1, Ending.ERROR: 1,
    Ending.PANICKED: 1,
}  # fmt: skip


@click.command(
    epilog="Example:  vmonty run --kernel vmlinuz --initrd initrd.img --append 'console=ttyS0 quiet' --memory 1G"
)
@click.argument("name", required=False)
@click.option("--kernel", type=click.Path(path_type=Path), help="A Linux bzImage.")
@click.option("--initrd", type=click.Path(path_type=Path), help="Its initial RAM disk.")
@click.option("--append", "command_line", metavar="LINE", help="Its command line.  [default: console=ttyS0]")
@click.option(
    "--firmware",
    metavar="bios|uefi|FILE",
    help="Start firmware in place of a kernel: SeaBIOS, OVMF, or the ROM in FILE.",
)
@click.option(
    "--nvram", type=click.Path(path_type=Path), metavar="FILE",
    help="Where a UEFI firmware keeps its variables; made when it is not there.",
)  # fmt: skip
@click.option(
    "--boot",
    "boot",
    metavar="order=LETTERS,menu=on,…",
    default="",
    help="What firmware starts from (c disk, d CD-ROM, n network; once= for the first start, strict=on), its menu, "
    "and how long that waits for a key: order=dc,menu=on,wait=3000.",
)
@click.option("--memory", "-m", type=Size(), default="512M", show_default=True, help="Guest RAM, such as 512M or 2G.")
@click.option("--cpus", type=click.IntRange(min=1), default=1, show_default=True, help="Number of vCPUs.")
@click.option(
    "--accel", "accelerator", default="auto", show_default=True,
    help="What runs the vCPUs: kvm, soft, auto, or several in order, such as kvm:soft.",
)  # fmt: skip
@click.option(
    "--machine", "board", default="pc", show_default=True,
    help="The board, with properties: pc, q35 or microvm; 'help' lists all.",
)  # fmt: skip
@click.option(
    "--cpu", default=cpu_model.DEFAULT, show_default=True,
    help="The CPU model, with flags, such as Haswell,-pcid; 'help' lists all.",
)  # fmt: skip
@click.option(
    "--device", "devices", multiple=True, metavar="NAME[,PROPERTY=VALUE…]", help="Add a device; 'help' lists all."
)
@click.option(
    "--disk", "disk_options", multiple=True, metavar="FILE[,format=raw|qcow2][,ro][,snapshot][,if=ide|sata]",
    help="Add a virtio, IDE or SATA disk; with snapshot the file stays as it is. Firmware tries bootindex=0 first. "
    "bps=, iops= and, for one direction, bps_rd=, iops_wr= are limits a second.",
)  # fmt: skip
@click.option(
    "--cdrom", "cdroms", multiple=True, metavar="FILE[,bootindex=N]", help="An ISO in a CD-ROM drive.",
)  # fmt: skip
@click.option(
    "--option-rom", "option_roms", multiple=True, metavar="FILE[,bootindex=N]",
    help="An option ROM of no card, for the firmware to run.",
)  # fmt: skip
@click.option(
    "--net",
    "networks",
    multiple=True,
    metavar="user|tap|none[,OPTION=VALUE…]",
    help="Add a network card: user,hostfwd=tcp::2222-:22 or tap,ifname=tap0; both take mac=, pcap=FILE, bootindex=N "
    "and romfile=FILE, and user also tftp=DIR,bootfile=NAME to start from.",
)
@click.option(
    "--grace", type=float, default=10.0, show_default=True, metavar="SECONDS",
    help="How long after SIGTERM, which presses the guest's power button, the guest is stopped.",
)  # fmt: skip
@click.option(
    "--config", "file", type=click.Path(path_type=Path),
    help="A TOML or YAML file with settings; what is given here as an option goes before it.",
)  # fmt: skip
@click.option(
    "--vnc", metavar="[HOST]:DISPLAY[,OPTION=VALUE…]",
    help="Show the screen to VNC viewers, such as :0 or :0,websocket=5700,password-file=F.",
)  # fmt: skip
@click.option("--no-reboot", is_flag=True, help="End when the guest reboots.")
@click.option("--timeout", type=float, metavar="SECONDS", help="End after this time, with status 124.")
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE",
    help="Write each VM exit, with soft: a Chrome trace to FILE.json, JSON lines to others; - is standard error.",
)  # fmt: skip
@click.option(
    "--control", metavar="NAME|PATH",
    help="Listen at a control socket, for `vmonty trace` and `stat`: a path, or a name without a slash.",
)  # fmt: skip
@click.option("--trace-only", multiple=True, metavar="NAME", help="Only exits of this name, such as EPT_VIOLATION.")
def run(
    name: str | None,
    kernel: Path | None,
    initrd: Path | None,
    command_line: str | None,
    firmware: str | None,
    nvram: Path | None,
    boot: str,
    memory: int,
    cpus: int,
    accelerator: str,
    board: str,
    cpu: str,
    devices: tuple[str, ...],
    disk_options: tuple[str, ...],
    cdroms: tuple[str, ...],
    option_roms: tuple[str, ...],
    networks: tuple[str, ...],
    file: Path | None,
    grace: float,
    vnc: str | None,
    no_reboot: bool,
    timeout: float | None,
    trace: Path | None,
    control: str | None,
    trace_only: tuple[str, ...],
) -> int:
    """Boot a guest; its serial console is this terminal.

    NAME is a guest that `vmonty guest build` knows (busybox, which is also the default, or debian); or give --kernel.
    What debian writes is kept, and without --net its sshd is reached through a port of this host.
    Leave with Ctrl-A x; Ctrl-A c is a monitor. The status is 0 after a power-off, 1 when the guest or KVM failed, 2 for
    bad arguments, 124 after --timeout. SIGTERM presses the guest's power button.
    """
    if (listing := asked_for_help(board, cpu, devices)) is not None:
        click.echo(listing)
        return 0
    if name not in (None, "busybox", "debian"):
        raise UsageError(f"unknown guest {name!r}; there are: busybox, debian")
    if initrd is not None and kernel is None:
        raise UsageError("--initrd needs --kernel")
    if kernel is not None and name is not None:
        raise UsageError("give either NAME or --kernel")
    if firmware is not None and (kernel is not None or name is not None):
        raise UsageError("--firmware boots what is on the disks: give no NAME and no --kernel with it")
    if firmware is None and file is None:
        firmware = usual_firmware(name is not None or kernel is not None, cdroms)
    for option, given_too in (("--boot", boot), ("--nvram", nvram)):
        if given_too and firmware is None:
            raise UsageError(f"{option} needs --firmware")
    if timeout is not None and not 0 < timeout <= MOST_SECONDS:
        raise UsageError(f"--timeout needs a number of seconds above 0, {MOST_SECONDS} at most")
    if not 0 <= grace <= MOST_SECONDS:
        raise UsageError(f"--grace needs a number of seconds from 0 to {MOST_SECONDS}")
    given: dict[str, Any] = {
        "guest": name, "kernel": kernel, "initrd": initrd, "append": command_line,
        "firmware": firmware, "nvram": nvram, "boot": boot, "memory": memory, "cpus": cpus,
        "accel": accelerator, "machine": board, "cpu": cpu, "devices": devices, "disks": disk_options,
        "cdroms": cdroms, "vnc": vnc, "option_roms": option_roms,
        "net": [network for network in networks if network != "none"], "reboot": not no_reboot, "timeout": timeout,
    }  # fmt: skip
    if file is None:
        # Bad input first: it is cheaper to refuse than to open an accelerator.
        check_size(memory)
        catalogue.check(board, devices)
        cpu_model.check(cpu)
        BootOptions.parse(boot)
        plan = Plan(
            kernel, initrd, command_line, memory, cpus, board, cpu, devices, accelerator,
            tuple(map(Disk.parse, disk_options)), tuple(map(Network.parse, networks)), not no_reboot, timeout,
            firmware, boot, tuple(map(Cdrom.parse, cdroms)), nvram, vnc, tuple(map(OptionRom.parse, option_roms)),
            name,
        )  # fmt: skip
    else:
        plan = planned(file, only_given(given))
    if plan.guest == "debian":
        plan = debian_guest(plan)
    with contextlib.closing(Build(plan)) as build:
        choice = accel.choose(plan.accel)
        with choice.system:
            build.fetch(progress_bars)
            session = Session(choice, build, not plan.reboot, grace)
            outcome = Watch(trace, trace_only, control).run(session, plan.timeout)
    return report(session, outcome)


class Watch(Record):
    """How a session is watched: exits of *names* (none: all) written to *trace*, a *control* socket."""

    trace: Path | None
    names: tuple[str, ...]
    control: str | None

    def run(self, session: Session, timeout: float | None) -> Outcome:
        """Run the session so."""
        with contextlib.ExitStack() as stack:
            if self.trace is not None:
                from vmonty.cli.tracefile import TraceFile

                trace = TraceFile(self.trace, frozenset(self.names), sys.stderr)
                session.tracers.add(trace)
                stack.callback(self._end, trace)
            if self.control is not None:
                from vmonty.vmm.control import ControlSocket  # a plain start should not wait for it

                stack.enter_context(ControlSocket(self.control, session.control))
            return session.run(timeout)

    @staticmethod
    def _end(trace: TraceFile) -> None:
        trace.close()
        if trace.dropped:
            click.echo(f"vmonty: {trace.dropped} exits came faster than they could be written", err=True)


def report(session: Session, outcome: Outcome) -> int:
    """Say how it ended, unless well; the exit status."""
    if session.failure is not None:
        click.echo(f"vmonty: {session.failure}", err=True)
        return STATUS_FAILED
    if outcome.status is not None and session.status is None:
        return outcome.status
    if outcome.ending not in (Ending.POWER_OFF, Ending.STOPPED, Ending.RESET):
        click.echo(f"vmonty: {outcome.detail}", err=True)
        if dump := outcome.register_dump():
            click.echo(dump, err=True)
    return session.status if session.status is not None else STATUS[outcome.ending]


# Settings by another name than the option's parameter.
PARAMETERS = {
    "guest": "name", "append": "command_line", "accel": "accelerator", "machine": "board", "disks": "disk_options",
    "net": "networks", "reboot": "no_reboot",
}  # fmt: skip


def only_given(values: dict[str, Any]) -> dict[str, Any]:
    """Those that the user wrote on the command line: a file's settings go before defaults."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {
        name: value
        for name, value in values.items()
        if context.get_parameter_source(PARAMETERS.get(name, name)) is not default
    }


def planned(file: Path, given: dict[str, Any]) -> Plan:
    """What *file* describes, with *given* in place of its settings, as ``vmonty.VM.from_file`` does."""
    # Not for everybody: checking settings needs code that a plain start should not wait for.
    from vmonty.vm.settings import read_file, settings

    return settings({**read_file(file), **given}).plan()


def progress_bars() -> AbstractContextManager[Progress]:
    """For the build of a guest that is not in the cache."""
    from vmonty.cli.progress import terminal_progress

    return terminal_progress()


def asked_for_help(board: str, cpu: str, devices: tuple[str, ...]) -> str | None:
    """The list that a value of ``help`` asks for, None when there is none."""
    if cpu == "help":
        return cpu_model.models()
    if board == "help":
        return catalogue.TYPES.describe("machine")
    return catalogue.TYPES.describe("device") if "help" in devices else None


def debian_guest(plan: Plan) -> Plan:
    """The plan with the Debian guest and its disk, built when they are not there; says how ssh reaches it."""
    from vmonty.vm import debian

    with progress_bars() as progress:
        plan, ssh = debian.planned(plan, progress)
    if ssh:
        click.echo(f"vmonty: {' '.join(ssh)}", err=True)
    return plan


class Session:
    """Runs one machine after another (a reset makes a new one) until something other than a reset ends it."""

    def __init__(
        self,
        choice: accel.Choice,
        build: Build,
        no_reboot: bool,
        grace: float,
    ) -> None:
        self.tracers = Tracers()
        self.choice = choice
        self.media = build
        self._make = partial(build.machine, choice.system)
        self._no_reboot = no_reboot
        self._grace = grace
        self._deadline: threading.Timer | None = None
        self.machine: Machine | None = None
        self.observation: Observation | None = None
        self._stopping = threading.Event()
        self._console: Console | None = None
        self.control = SessionControl(self)
        self.status: int | None = None
        self.failure: str | None = None

    def stop(self, status: int | None = None) -> None:
        """End the session from any thread; *status* is the exit status, None for that of the outcome."""
        if not self._stopping.is_set():
            self.status = status
            self._stopping.set()
        if console := self._console:
            # A vCPU that waits for a reader of its output could not end otherwise.
            console.release()
        if machine := self.machine:
            machine.stop()

    def power_down(self, status: int) -> None:
        """Press the guest's power button; when it does not end in time, or at the second call, stop with *status*."""
        machine = self.machine  # a reset may take it away meanwhile
        if self._deadline is not None or not self._grace or machine is None:
            self.stop(status)
            return
        self._deadline = threading.Timer(self._grace, self.stop, (status,))
        self._deadline.daemon = True
        self._deadline.start()
        self._no_reboot = True
        machine.press_power_button()

    def _receive(self, data: bytes) -> None:
        if machine := self.machine:
            machine.terminal.receive(data)

    def _monitor(self, write: Callable[[bytes], None]) -> Monitor:
        from vmonty.cli.monitor import Monitor, Worker  # nobody waits for it who does not ask

        return Monitor(self.control, write, Worker())

    def _backlog(self) -> int:
        # Between two machines input stays where it is.
        return machine.terminal.backlog() if (machine := self.machine) else MOST_BACKLOG

    def run(self, timeout: float | None) -> Outcome:
        """Boot and wait for the end."""

        # Not in the handler: it may interrupt this thread while that holds a lock that an ending takes.
        signals: SimpleQueue[int | None] = SimpleQueue()

        def on_signal(number: int, frame: FrameType | None) -> None:
            signals.put(number)

        def obey() -> None:
            while (number := signals.get()) is not None:
                (self.power_down if number == signal.SIGTERM else self.stop)(FIRST_SIGNAL_STATUS + number)

        listener = threading.Thread(target=obey, name="signals", daemon=True)
        console = Console(self._receive, self.stop, self._backlog, self._monitor)
        # Built before the terminal changes: what it refuses is told on a terminal in order.
        self.machine = self._make(console.write)
        click.echo(f"vmonty: {self.choice.reason}", err=True)
        previous = {
            number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        clock = threading.Timer(timeout, self.stop, (STATUS_TIMEOUT,)) if timeout else None
        try:
            listener.start()
            if console.interactive:
                click.echo("vmonty: booting; leave with Ctrl-A x, help with Ctrl-A h", err=True)
            with console:
                self._console = console
                if clock:
                    clock.start()
                try:
                    return self._loop(console)
                finally:
                    self.media.over()
                    # Nobody may release a console that is closing.
                    for timer in filter(None, (clock, self._deadline)):
                        timer.cancel()
                        timer.join()
                    self._console = None
        finally:
            self.failure = console.failure
            for number, handler in previous.items():
                # By a signal it ends with that status: one more during the rest would only change the status.
                by_signal = self.status is not None and self.status > FIRST_SIGNAL_STATUS
                signal.signal(number, signal.SIG_IGN if by_signal else handler)
            signals.put(None)
            listener.join()

    def _loop(self, console: Console) -> Outcome:
        while True:
            assert self.machine is not None
            machine = self.machine
            try:
                with Observation(machine, self.tracers) as self.observation:
                    machine.start()
                    gc.freeze()  # see cli.main
                    gc.enable()
                    if self._stopping.is_set():
                        machine.stop()
                    # A wait with a time limit lets Python run signal handlers between two.
                    while (outcome := machine.wait(0.2)) is None:
                        continue
            finally:
                self.media.end(machine)
            if outcome.ending is not Ending.RESET or self._no_reboot or self._stopping.is_set():
                return machine.last(outcome)
            # A machine refers to itself through its devices: without this its RAM would stay beside the next one's.
            self.machine = None
            del machine
            gc.unfreeze()
            gc.collect()
            self.machine = self._make(console.write)
