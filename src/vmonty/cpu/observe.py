"""The observer's door: Python functions that are called for instructions, blocks, memory accesses and events.

Nobody who does not observe pays for it: no generated code asks. Who observes has the processor execute one instruction
at a time, with every memory access on the careful path; so what is reported is exact, and slow. An observer sees the
processor between instructions (``debug_state``), the accesses of an instruction when it is complete, and an event
before it is delivered. It works under ``Cpu.run`` and, for a guest of VMX, under ``Vmx.run``.
"""

from __future__ import annotations

from typing import NamedTuple

import cython
from cython.cimports.vmonty.cpu.decode import (
    C_CALL,
    C_CALLI,
    C_JCC,
    C_JMP,
    C_JMPI,
    C_LOOP,
    C_RET,
    C_SYSEND,
    ROW,
    decode,
)
from cython.cimports.vmonty.cpu.state import (
    CS,
    EXIT_DEBUG,
    MODE_COMPAT32,
    MODE_LONG64,
    MODE_PROT32,
    OBSERVE_EVENT,
    OBSERVE_INSTRUCTION,
    OBSERVE_MEMORY,
)
from cython.cimports.vmonty.cpu.tlb import fetch_page

from vmonty.base.errors import UsageError

EVENT_KINDS = ("external", "", "nmi", "exception", "soft_interrupt", "privileged", "soft_exception", "")


class Instruction(NamedTuple):
    """An instruction that is about to be executed: address, length, mode (16, 32 or 64 bits) and bytes."""

    rip: int
    linear: int
    bits: int
    code: bytes

    @property
    def text(self) -> str:
        """Its disassembly. Raises UsageError without iced-x86."""
        return disassemble(self.code, self.rip, self.bits)


class Access(NamedTuple):
    """A memory access: of the instruction at ``rip``, or (``implicit``) of the processor for its tables."""

    rip: int
    linear: int
    physical: int
    write: bool
    data: bytes
    implicit: bool


class Event(NamedTuple):
    """An event before its delivery; ``kind`` is of EVENT_KINDS, ``address`` that of a page fault."""

    rip: int
    vector: int
    kind: str
    error_code: int | None
    address: int


def disassemble(code: bytes, rip: int = 0, bits: int = 64) -> str:
    """The first instruction of *code* in Intel's syntax. Raises UsageError without iced-x86."""
    try:
        from iced_x86 import Decoder, Formatter, FormatterSyntax
    except ImportError:
        raise UsageError("disassembly needs iced-x86; install it with: pip install 'vmonty[insight]'") from None
    return str(Formatter(FormatterSyntax.NASM).format(Decoder(bits, code, ip=rip).decode()))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _callback(s: cython.pointer(CpuState), kind: uint32_t) -> cython.void:
    """What the dispatcher calls."""
    with cython.gil:
        _tell(s, kind)


@cython.cfunc
@cython.exceptval(check=False)
def _tell(s: cython.pointer(CpuState), kind: uint32_t) -> cython.void:
    observer: Observer
    if s.observe == 0:  # closed, and perhaps gone, while this thread waited for the GIL
        return
    observer = cython.cast(Observer, s.observer_object)
    try:
        if observer._stop:
            pass
        elif kind == OBSERVE_INSTRUCTION:
            observer._before()
        elif kind == OBSERVE_EVENT:
            observer._deliver()
        else:
            observer._after()
    except BaseException as error:
        if observer._error is None:
            observer._error = error
        observer._stop = True
    if observer._stop and kind == OBSERVE_INSTRUCTION:
        s.exit.reason = EXIT_DEBUG


@cython.cclass
class Observer:
    """Observes one processor until it is closed. Hooks run on the thread that runs the processor.

    on_instruction(Instruction) is called before each instruction, once for a repeated string instruction;
    on_block(rip) before the first instruction behind a control transfer, wherever it goes; on_memory(Access) behind
    each instruction or iteration that made the access, in order; on_event(Event) before an event is delivered. What a
    hook raises ends the run and is raised by it. A processor has one observer at a time: ValueError.
    """

    def __init__(
        self, cpu: Cpu, on_instruction: object = None, on_block: object = None, on_memory: object = None,
        on_event: object = None,
    ) -> None:  # fmt: skip
        if cpu.observer is not None:
            raise ValueError("the processor is observed already")
        self.cpu = cpu
        self.s = cpu.s
        self._instruction, self._block, self._memory, self._event = on_instruction, on_block, on_memory, on_event
        self._error = None
        self._stop = False
        self._ended = True
        self._began = cpu.s.retired
        self.s.observer = cython.cast(cython.p_void, _callback)
        self.s.observer_object = cython.cast(cython.p_void, self)
        self.s.observe = OBSERVE_INSTRUCTION
        if on_memory is not None:
            self.s.observe |= OBSERVE_MEMORY
        if on_event is not None:
            self.s.observe |= OBSERVE_EVENT
        cpu.observer = self
        self.s.run = 0  # a processor that runs comes out of its blocks

    def close(self) -> None:
        """Stop observing; the processor runs at its own speed again."""
        if self.cpu.observer is self:
            self.s.observe = 0
            self.s.observe_again = 0
            self.cpu.observer = None

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def instructions(self) -> int:
        """Instructions completed since observation began; those that faulted or exited aren't."""
        return self.s.retired - self._began

    @property
    def lost(self) -> int:
        """Accesses that were not reported: one instruction made more than 128."""
        return self.s.access_lost

    def stop(self) -> None:
        """From a hook: end the run, before the instruction that comes next; run() gives "debug"."""
        self._stop = True

    def check(self) -> None:
        """Raise what a hook raised."""
        self._stop = False
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _before(self):
        s: cython.pointer(CpuState) = self.s
        linear: uint64_t = s.rip
        bits: cython.int = 64
        n: cython.int
        i: Insn
        raw: cython.uchar[16]
        have: cython.int = self._bytes(raw)
        if s.mode != MODE_LONG64:
            bits = 32 if s.mode == MODE_PROT32 or s.mode == MODE_COMPAT32 else 16
            linear = cython.cast(uint32_t, s.rip + s.segs[CS].base)
        n = decode(raw, have, s.rip, bits // 8, cython.address(i))
        if self._block is not None and (self._ended or s.rip != self._next):
            self._block(s.rip)
        self._ended = n <= 0 or ROW[i.row].cls in (C_JCC, C_JMP, C_CALL, C_JMPI, C_CALLI, C_RET, C_LOOP, C_SYSEND)
        self._next = s.rip + (max(0, n))
        if self._instruction is not None:
            self._instruction(Instruction(s.rip, linear, bits, raw[: n if n > 0 else have]))

    def _bytes(self, raw):
        """Copy what can be fetched of the next fifteen bytes; the processor has just fetched the instruction."""
        s: cython.pointer(CpuState) = self.s
        linear: uint64_t = s.rip if s.mode == MODE_LONG64 else cython.cast(uint32_t, s.rip + s.segs[CS].base)
        have: cython.int = 0
        why: cython.int = 0
        k: cython.int
        page = fetch_page(s, linear, cython.address(why))
        if page == cython.NULL or page.host == 0:
            return 0
        for k in range(15):
            if (linear & 0xFFF) + k >= 4096:
                break
            raw[k] = cython.cast(cython.p_uchar, page.host)[(linear & 0xFFF) + k]
            have += 1
        if have < 15 and s.fetch_second:
            for k in range(have, 15):
                raw[k] = cython.cast(cython.p_uchar, s.fetch_second)[k - have]
            have = 15
        return have

    def _after(self):
        k: cython.uint
        a: cython.pointer(AccessRecord)
        if self._memory is None:
            return
        for k in range(self.s.access_count):
            a = cython.address(self.s.accesses[k])
            self._memory(
                Access(
                    self.s.observed_rip, a.linear, a.physical, a.write != 0,
                    cython.cast(cython.p_char, self.s.access_data)[a.at : a.at + a.size], a.implicit != 0,
                )
            )  # fmt: skip

    def _deliver(self):
        e = self.s.event
        self._ended = True
        self._event(
            Event(
                self.s.rip, e.vector, EVENT_KINDS[e.kind & 7], e.error_code if e.has_error else None,
                e.payload if e.vector == 14 else 0,
            )
        )  # fmt: skip
