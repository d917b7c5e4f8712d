"""The monitor behind Ctrl-A c: lines typed on the guest's terminal that ask for something of its machine.

The words are those of QEMU's monitor, for what people type there daily; the commands behind them are the control
socket's (``vmm.commands``).
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vmonty.base.errors import UsageError, VmontyError
from vmonty.base.sizes import parse_size
from vmonty.vmm.commands import Controlled, execute

PROMPT = b"(vmonty) "
UNPLUG_SECONDS = 5  # the terminal waits meanwhile
LONGEST_LINE = 4096
ENTER, ERASE, KILL, ESCAPE = b"\r\n", b"\x08\x7f", 0x15, 0x1B
MIB = 1 << 20


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
    found = execute(target, {"command": "balloon"})
    sizes = {name: f"{found[name] // MIB} MiB" for name in ("memory", "target", "actual")}
    return _table(sizes | found["statistics"])


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
    execute(target, {"command": "balloon", "size": parse_size(size)})
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
    "cont": Word("", "let it go on", _ask("resume")),
    "system_reset": Word("", "the reset button", _ask("reset")),
    "system_powerdown": Word("", "the power button", _ask("powerdown")),
    "quit": Word("", "end the virtual machine", _ask("quit")),
    "change": Word("DRIVE FILE", "put another disc in", _change),
    "eject": Word("[-f] DRIVE", "take the disc out", _eject),
    "device_add": Word("disk|net|device OPTIONS", "add a virtio device", _plug),
    "device_del": Word("SLOT", "remove it", _unplug),
    "balloon": Word("SIZE", "what the guest gets along with", _balloon),
    "screendump": Word("FILE", "write the screen as PNG", _screendump),
}


def answer(target: Controlled, line: str) -> str:
    """Carry out *line*; what it says, also when it cannot."""
    try:
        name, *words = shlex.split(line) or [""]
        if not name:
            return ""
        # As in QEMU's, a beginning that fits one command is that command.
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


class Monitor:
    """Reads keys and answers lines; *write* shows something on a raw terminal."""

    def __init__(self, target: Controlled, write: Callable[[bytes], None]) -> None:
        self._target, self._write = target, write
        self._line = bytearray()
        self._skipping = b""  # what came of a key that is more than a character, such as an arrow

    def show(self) -> None:
        """The terminal is this monitor's from now on."""
        self._write(b"\r\n" + PROMPT + self._line)

    def hide(self) -> None:
        """It is the guest's again."""
        self._write(b"\r\n")

    def keys(self, data: bytes) -> None:
        """Somebody typed *data*."""
        for byte in data:
            if self._skipping or byte == ESCAPE:
                self._skipping += bytes((byte,))
                # ESC [ …, to a letter or ~; or ESC and one character.
                if len(self._skipping) > 1 and (self._skipping[1] not in b"[O" or (byte >= 0x40 and byte not in b"[O")):
                    self._skipping = b""
            elif byte in ENTER:
                self._enter()
            elif byte in ERASE:
                if self._line:
                    self._erase()
            elif byte == KILL:
                self._line.clear()
                self._write(b"\r\x1b[K" + PROMPT)
            elif byte >= 0x20 and len(self._line) < LONGEST_LINE:
                self._line.append(byte)
                self._write(bytes((byte,)))

    def _erase(self) -> None:
        """The last character, all of its bytes in UTF-8."""
        while self._line and self._line.pop() & 0xC0 == 0x80:
            continue
        self._write(b"\x08 \x08")

    def _enter(self) -> None:
        line = self._line.decode(errors="replace")
        self._line.clear()
        self._write(b"\r\n")
        if text := answer(self._target, line):
            self._write(text.replace("\n", "\r\n").encode() + b"\r\n")
        self._write(PROMPT)
