"""What a machine that runs can be asked for by name: the commands of its control socket and of its monitor."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vmonty.base.errors import UsageError
from vmonty.vmm.display.console import screen_of, type_text
from vmonty.vmm.hotplug import UNPLUG_SECONDS, plug, slots_of
from vmonty.vmm.tracing import Tracers

if TYPE_CHECKING:
    from vmonty.vmm.machine import Machine
    from vmonty.vmm.virtio.balloon import Balloon


class Controlled(Protocol):
    """What is asked. Methods raise VmontyError; any thread calls them."""

    tracers: Tracers

    def status(self) -> dict[str, Any]:
        """What it is and does, for people and programs."""
        ...

    def counters(self) -> dict[str, dict[str, int]]:
        """The KVM's counters by id: the VM, each vCPU."""
        ...

    def registers(self, cpu: int) -> dict[str, int]:
        """General and control registers of a vCPU; a machine that runs is paused meanwhile."""
        ...

    def machine(self) -> Machine:
        """The machine that runs. Raises StateError between two."""
        ...

    def media(self) -> dict[str, str | None]:
        """Drives for media, and what is in them."""
        ...

    def change_medium(self, drive: str, path: Path | None, *, force: bool = False) -> None:
        """Put another disc, or none, into *drive*."""
        ...

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def reset(self) -> None: ...
    def power_down(self) -> None: ...
    def quit(self) -> None: ...


class Command(NamedTuple):
    """A command: its arguments by name, which may be left out, and what carries it out with those that are there."""

    arguments: Mapping[str, type]
    run: Callable[..., Any]


def _registers(target: Controlled, cpu: int = 0) -> dict[str, str]:
    return {key: f"{value:#x}" for key, value in target.registers(cpu).items()}


def _screen(target: Controlled, text: bool = False) -> dict[str, str]:
    screen = screen_of(target.machine())
    return {"text": screen.text()} if text else {"png": base64.b64encode(screen.png()).decode()}


def _devices(target: Controlled) -> dict[str, str]:
    return {str(slot): device for slot, device in slots_of(target.machine()).devices().items()}


def _change(target: Controlled, drive: str = "cd0", file: str = "", force: bool = False) -> None:
    if not file:
        raise UsageError("change: which file? To take the disc out there is eject")
    target.change_medium(drive, Path(file), force=force)


def _eject(target: Controlled, drive: str = "cd0", force: bool = False) -> None:
    target.change_medium(drive, None, force=force)


def balloon_of(machine: Machine) -> Balloon:
    """The machine's balloon. Raises UsageError when it has none."""
    if machine.balloon is None:
        raise UsageError("this machine has no balloon; start it with --device virtio-balloon, or add that device")
    return machine.balloon


def _balloon(target: Controlled, size: int | None = None) -> dict[str, Any]:
    balloon = balloon_of(target.machine())
    if size is not None:
        balloon.set_target(size)
    return balloon.state()


def _plain(method: str) -> Command:
    return Command(NOTHING, lambda target: getattr(target, method)())


NOTHING: Mapping[str, type] = MappingProxyType({})
COMMANDS: Mapping[str, Command] = {
    "status": _plain("status"),
    "stat": _plain("counters"),
    "pause": _plain("pause"),
    "resume": _plain("resume"),
    "reset": _plain("reset"),
    "powerdown": _plain("power_down"),
    "quit": _plain("quit"),
    "media": _plain("media"),
    "registers": Command({"cpu": int}, _registers),
    "screen": Command({"text": bool}, _screen),
    "type": Command({"text": str}, lambda target, text="": type_text(target.machine(), text)),
    "devices": Command(NOTHING, _devices),
    "plug": Command(
        {"kind": str, "options": str},
        lambda target, kind="", options="": {"slot": plug(target.machine(), kind, options)},
    ),
    "unplug": Command(
        {"slot": int, "seconds": int},
        lambda target, slot=0, seconds=UNPLUG_SECONDS: slots_of(target.machine()).remove(slot, seconds),
    ),
    "change": Command({"drive": str, "file": str, "force": bool}, _change),
    "eject": Command({"drive": str, "force": bool}, _eject),
    "balloon": Command({"size": int}, _balloon),
}


def execute(target: Controlled, request: dict[str, Any], more: Mapping[str, Command] = MappingProxyType({})) -> Any:
    """Do what *request* says: ``command`` and its arguments; *more* are commands of the caller's own.

    Raises UsageError for what is no command, and what the command raises.
    """
    known = {**COMMANDS, **more}
    arguments = dict(request)
    name = arguments.pop("command", None)
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"there is no command {name!r}; there are: {', '.join(sorted(known))}")
    command = known[name]
    for key, value in arguments.items():
        if key not in command.arguments or type(value) is not command.arguments[key]:
            wanted = ", ".join(f"{key} ({kind.__name__})" for key, kind in command.arguments.items())
            raise UsageError(f"{name}: {key}={value!r} is wrong; arguments are: {wanted or 'none'}")
    answer = command.run(target, **arguments)
    return {} if answer is None else answer
