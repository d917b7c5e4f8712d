"""VMware's backdoor port, for its mouse alone: it stands where the viewer's pointer stands, and needs no USB.

An IN of 32 bits with a magic number in EAX and a command in CX is a call; its answer comes in several registers. A PS/2
packet tells the driver that there is news. Linux has the driver in psmouse, on KVM as well. Source: Open VM Tools,
backdoor_def.h; X.Org's xf86-input-vmmouse, vmmouse_proto.h and vmmouse_defs.h.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vmonty.kvm.api import Vcpu

PORT, PORT_SIZE = 0x5658, 4
MAGIC = 0x564D5868
NOBODY = 0xFFFF_FFFF
GET_VERSION, POINTER_DATA, POINTER_STATUS, POINTER_COMMAND = 10, 39, 40, 41
VERSION, SCALABLE_SERVER = 6, 2
ENABLE, DISABLE, RELATIVE, ABSOLUTE = 0x45414552, 0x000000F5, 0x4C455252, 0x53424152
IDENTITY = 0x3442554A
OFF = 0xFFFF_0000
# In which registers what was read comes, and so how much at once.
DATA_REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi")
PACKET = 4
QUEUE_WORDS = 256 * PACKET
HIGHEST = 0xFFFF  # of a place, in both directions
# The left, the right and the middle one: as PS/2 has them, and here.
_BUTTONS = ((1, 0x20), (2, 0x10), (4, 0x08))


class Mouse(Protocol):
    """See Ps2Mouse."""

    def nudge(self) -> None:
        """Tell the driver that there is news."""
        ...


class VmMouse:
    """The port. *exiting* gives the vCPU whose access is being handled; *mouse* carries the news."""

    def __init__(self, exiting: Callable[[], Vcpu | None], mouse: Mouse) -> None:
        self._exiting = exiting
        self._mouse = mouse
        self._lock = threading.Lock()
        self._queue: deque[int] = deque()
        self._enabled = False
        self.absolute = False  # does the guest's driver want places?

    def place(self, x: int, y: int, dz: int = 0, buttons: int = 0) -> None:
        """The pointer is at *x*, *y*, up to HIGHEST at the lower right; the rest as Ps2Mouse. From any thread."""
        pressed = sum(theirs for ours, theirs in _BUTTONS if buttons & ours)
        with self._lock:
            if not self.absolute:
                return
            queue = self._queue
            if len(queue) >= PACKET and queue[-PACKET] == pressed and not queue[-1] and not dz:
                # Nobody has seen where it was.
                queue[-3], queue[-2] = x, y
            elif len(queue) <= QUEUE_WORDS - PACKET:
                queue.extend((pressed, x, y, dz & NOBODY))
            else:
                # What is dropped is not how it stands in the end.
                queue[-PACKET], queue[-3], queue[-2], queue[-1] = pressed, x, y, dz & NOBODY
        self._mouse.nudge()

    def read(self, offset: int, size: int) -> int:
        """A call; all ones where it is none."""
        if offset or size != PORT_SIZE or (vcpu := self._exiting()) is None:
            return NOBODY
        registers = vcpu.get_regs()
        if registers.rax & NOBODY != MAGIC:
            return NOBODY
        with self._lock:
            answer = self._call(registers.rcx & 0xFFFF, registers.rbx & NOBODY)
        for name, value in zip(DATA_REGISTERS[1:], answer[1:], strict=False):
            setattr(registers, name, value)
        if len(answer) > 1:
            vcpu.set_regs(registers)
        return answer[0]

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing takes OUT."""

    def _call(self, command: int, argument: int) -> list[int]:
        """The registers' new values, as many as change."""
        match command:
            case 10:  # GET_VERSION
                return [VERSION, MAGIC, SCALABLE_SERVER]
            case 40:  # POINTER_STATUS
                return [len(self._queue) if self._enabled else OFF]
            case 39:  # POINTER_DATA
                if not self._enabled or not 0 < argument <= min(len(DATA_REGISTERS), len(self._queue)):
                    self._disable()
                    return [OFF]
                return [self._queue.popleft() for _ in range(argument)]
            case 41:  # POINTER_COMMAND
                return [self._command(argument)]
        return [NOBODY]

    def _command(self, command: int) -> int:
        match command:
            case 0x45414552:  # ENABLE
                self._queue.clear()
                self._queue.append(IDENTITY)
                self._enabled = True
            case 0x000000F5:  # DISABLE
                self._disable()
            case 0x53424152 | 0x4C455252 if self._enabled:  # ABSOLUTE, RELATIVE
                self.absolute = command == ABSOLUTE
            case _:
                return NOBODY
        return 0

    def _disable(self) -> None:
        self._enabled = self.absolute = False
        self._queue.clear()
