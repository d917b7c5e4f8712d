"""The monitor behind Ctrl-A c: lines typed on the guest's terminal that ask for something of its machine.

The words are those of QEMU's monitor, for what people type there daily; the commands behind them are the control
socket's (``vmm.commands``).
"""

from __future__ import annotations

import base64
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from vmonty.base.errors import UsageError, VmontyError
from vmonty.base.sizes import parse_size
from vmonty.cli import balloon
from vmonty.vmm.commands import Controlled, execute

PROMPT = b"(vmonty) "
UNPLUG_SECONDS = 5  # the lines behind it wait meanwhile
LONGEST_LINE = 4096
ENTER, ERASE, KILL, ESCAPE = b"\r\n", b"\x08\x7f", 0x15, 0x1B
# What a key that is more than a character may begin with; [[ is that of F1 to F5 on Linux's own console.
INTRODUCERS = (b"\x1b", b"\x1b[", b"\x1bO", b"\x1b[[")
CLEAR_LINE = b"\r\x1b[K"

Job = Callable[[], None]


class Word(NamedTuple):
    """A command: what stands behind it, what it does, and how to do it with those words."""

    arguments: str
    help: str
    run: Callable[[Controlled, Sequence[str]], str]


def _ask(command: str) -> Callable[[Controlled, Sequence[str]], str]:
    """What needs no argument and has nothing to tell."""

    def run(target: Controlled, words: Sequence[str]) -> str:
        if words:
            raise UsageError(f"{words[0]!r} is too much: it takes no argument")
        execute(target, {"command": command})
        return ""

    return run


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(f"{name:<20} {value}" for name, value in rows.items()) or "nothing"


def _registers(target: Controlled) -> str:
    return "\n".join(
        f"CPU {cpu}\n" + _table(execute(target, {"command": "registers", "cpu": cpu}))
        for cpu in range(execute(target, {"command": "status"})["cpus"])
    )


def _balloon_state(target: Controlled) -> str:
    return balloon.table(execute(target, {"command": "balloon"}))


def _media(target: Controlled) -> str:
    return _table({name: there or "empty" for name, there in execute(target, {"command": "media"}).items()})


INFO: dict[str, Callable[[Controlled], str]] = {
    "status": lambda target: _table(execute(target, {"command": "status"})),
    "registers": _registers,
    "media": _media,
    "devices": lambda target: _table(execute(target, {"command": "devices"})),
    "balloon": _balloon_state,
}


def _info(target: Controlled, words: Sequence[str]) -> str:
    if len(words) != 1 or words[0] not in INFO:
        raise UsageError(f"info: there are {', '.join(INFO)}")
    return INFO[words[0]](target)


def _exactly(words: Sequence[str], *names: str) -> Sequence[str]:
    """*words*, one for each of *names*; raises UsageError otherwise."""
    if len(words) != len(names):
        raise UsageError(f"it takes {' '.join(names)}")
    return words


def _eject(target: Controlled, words: Sequence[str]) -> str:
    force = "-f" in words
    (drive,) = _exactly([word for word in words if word != "-f"], "DRIVE")
    execute(target, {"command": "eject", "drive": drive, "force": force})
    return ""


def _change(target: Controlled, words: Sequence[str]) -> str:
    drive, file = _exactly(words, "DRIVE", "FILE")
    execute(target, {"command": "change", "drive": drive, "file": file})
    return ""


def _plug(target: Controlled, words: Sequence[str]) -> str:
    kind, options = _exactly(words, "disk|net|device", "OPTIONS")
    return f"slot {execute(target, {'command': 'plug', 'kind': kind, 'options': options})['slot']}"


def _unplug(target: Controlled, words: Sequence[str]) -> str:
    (slot,) = _exactly(words, "SLOT")
    if not slot.isdecimal():
        raise UsageError(f"{slot!r} is no slot: see info devices")
    execute(target, {"command": "unplug", "slot": int(slot), "seconds": UNPLUG_SECONDS})
    return ""


def _balloon(target: Controlled, words: Sequence[str]) -> str:
    (size,) = _exactly(words, "SIZE")
    # As in QEMU's, MiB: as bytes, everywhere else's unit, a habit would take all memory from the guest.
    unit = "M" if size.strip().isdecimal() else ""
    execute(target, {"command": "balloon", "size": parse_size(size.strip() + unit)})
    return ""


def _screendump(target: Controlled, words: Sequence[str]) -> str:
    (file,) = _exactly(words, "FILE")
    picture = base64.b64decode(execute(target, {"command": "screen"})["png"])
    try:
        Path(file).write_bytes(picture)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from error
    return ""


def _help(target: Controlled, words: Sequence[str]) -> str:
    return "\n".join(f"{f'{name} {word.arguments}':<32} {word.help}" for name, word in sorted(WORDS.items()))


WORDS = {
    "help": Word("", "this list", _help),
    "info": Word("|".join(INFO), "what it is and does", _info),
    "stop": Word("", "pause the guest", _ask("pause")),
    "cont": Word("", "let it go on; also c", _ask("resume")),
    "system_reset": Word("", "the reset button", _ask("reset")),
    "system_powerdown": Word("", "the power button", _ask("powerdown")),
    "quit": Word("", "end the virtual machine; also q", _ask("quit")),
    "change": Word("DRIVE FILE", "put another disc in", _change),
    "eject": Word("[-f] DRIVE", "take the disc out", _eject),
    "device_add": Word("disk|net|device OPTIONS", "add a virtio device", _plug),
    "device_del": Word("SLOT", "remove it", _unplug),
    "balloon": Word("SIZE", "what the guest gets along with: MiB, or with K, M, G or T", _balloon),
    "screendump": Word("FILE", "write the screen as PNG", _screendump),
}
# QEMU's, which win over the beginnings.
ALIASES = {"c": "cont", "q": "quit"}


def answer(target: Controlled, line: str) -> str:
    """Carry out *line*; what it says, also when it cannot."""
    try:
        name, *words = shlex.split(line) or [""]
        if not name:
            return ""
        # A convenience that QEMU's does not have: a beginning that fits one command is that command.
        name = ALIASES.get(name, name)
        fits = [word for word in WORDS if word == name] or [word for word in WORDS if word.startswith(name)]
        if len(fits) != 1:
            raise UsageError(f"there is no command {name!r}; see help")
        return WORDS[fits[0]].run(target, words)
    except ValueError as error:  # of shlex, and errors of ours that are one, too
        return f"error: {error}"
    except VmontyError as error:
        return f"error: {error}"
    except Exception as error:  # the terminal must not be lost by what is asked
        return f"internal error: {type(error).__name__}: {error}"


class Worker:
    """Does one job after the other on a thread that starts with the first. Nobody waits for it, also at the end."""

    def __init__(self) -> None:
        self._jobs = SimpleQueue[Job]()
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)

    def __call__(self, job: Job) -> None:
        """Do *job* after those before. From one thread."""
        self._jobs.put(job)
        if not self._thread.is_alive():
            self._thread.start()

    def _work(self) -> None:
        while True:
            self._jobs.get()()


class Monitor:
    """Reads keys and answers lines; *write* shows something on a raw terminal.

    *run* is given what carries out a line: it does so at once, or is a ``Worker``, so that keys are read meanwhile.
    """

    def __init__(
        self, target: Controlled, write: Callable[[bytes], None], run: Callable[[Job], None] = lambda job: job()
    ) -> None:
        self._target, self._write, self._run = target, write, run
        self._lock = threading.RLock()  # of what follows, and of what is shown of it
        self._line = bytearray()
        self._skipping = b""  # what came of a key that is more than a character, such as an arrow
        self._unanswered = 0  # lines
        self._hidden = False

    def show(self) -> None:
        """The terminal is this monitor's from now on."""
        with self._lock:
            self._hidden = False
            self._write(b"\r\n" + self._bottom())

    def hide(self) -> None:
        """It is the guest's again; what a command says that is under way is shown all the same."""
        with self._lock:
            self._hidden = True
            self._write(b"\r\n")

    def keys(self, data: bytes) -> None:
        """Somebody typed *data*."""
        with self._lock:
            for byte in data:
                self._key(byte)

    def _key(self, byte: int) -> None:
        if self._skipping or byte == ESCAPE:
            self._skipping += bytes((byte,))
            # ESC [ …, to a letter or ~; or ESC and one character.
            if self._skipping not in INTRODUCERS and (self._skipping[1] not in b"[O" or byte >= 0x40):
                self._skipping = b""
        elif byte in ENTER:
            self._enter()
        elif byte in ERASE:
            if self._line:
                self._erase()
        elif byte == KILL:
            self._line.clear()
            self._write(CLEAR_LINE + self._bottom())
        elif byte >= 0x20 and len(self._line) < LONGEST_LINE:
            self._line.append(byte)
            self._write(bytes((byte,)))

    def _bottom(self) -> bytes:
        """The line that is being typed; its prompt comes when all those before are answered."""
        return (b"" if self._unanswered else PROMPT) + self._line

    def _erase(self) -> None:
        """The last character, all of its bytes in UTF-8."""
        while self._line and self._line.pop() & 0xC0 == 0x80:
            continue
        self._write(b"\x08 \x08")

    def _enter(self) -> None:
        line = os.fsdecode(bytes(self._line))  # any file can be named
        self._line.clear()
        self._write(b"\r\n")
        self._unanswered += 1
        self._run(lambda: self._carry_out(line))

    def _carry_out(self, line: str) -> None:
        text = answer(self._target, line)
        said = text.replace("\n", "\r\n").encode(errors="backslashreplace") + b"\r\n" if text else b""
        with self._lock:
            self._unanswered -= 1
            if not self._hidden:
                said = (CLEAR_LINE if self._line else b"") + said + self._bottom()
            self._write(said)
