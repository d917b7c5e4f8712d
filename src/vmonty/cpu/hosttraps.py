"""Signals that translated code raises on the host, turned into exits of the block.

Divide errors, misaligned SSE operands and unmasked floating-point exceptions are the guest's: the processor that runs
translated code reports them by a signal. The handler finds the processor by the address that trapped, notes what
happened in its state, and sends it to a stub that saves everything and leaves the block. Registers, flags and vector
state pass through the signal frame unharmed. A push that runs into the guard page of the shadow stack is restarted
with a shadow stack that has only the newest words. Host memory of the guest that is gone (unmapped, or beyond the end
of its file) ends the run with EXIT_HOST_FAULT, also where a compiled helper meets it. All other faults go to the
handler that stood there before.

Handlers run on an alternate stack of the thread, because rsp is the shadow stack in translated code.
"""

from __future__ import annotations

import cython
from cython.cimports.posix.mman import MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap
from cython.cimports.vmonty.cpu.codecache import CodeCache
from cython.cimports.vmonty.cpu.state import CS, state_free, state_new


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _wrap(s: cython.pointer(CpuState), rsp: uint64_t, miss: uint64_t) -> uint64_t:
    """Forget all predictions of a full shadow stack but its newest words; where rsp goes.

    The newest need not be a prediction: before it calls, translated code pushes what it asks of a stub.
    """
    top: uint64_t = s.shadow_base + s.shadow_size - 8 * KEPT_WORDS
    k: cython.int
    for k in range(KEPT_WORDS):
        cython.cast(cython.pointer(uint64_t), top)[k] = cython.cast(cython.pointer(uint64_t), rsp)[k]
    cython.cast(cython.pointer(uint64_t), top)[KEPT_WORDS] = miss
    return top


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _handler(number: cython.int, info: cython.pointer(siginfo_t), context: cython.p_void) -> cython.void:
    u: cython.pointer(ucontext_t) = cython.cast(cython.pointer(ucontext_t), context)
    rip: uint64_t = cython.cast(uint64_t, u.uc_mcontext.gregs[16])
    address: uint64_t = cython.cast(uint64_t, info.si_addr)
    s: cython.pointer(CpuState)
    c: cython.pointer(CodeCache)
    k: cython.int
    selectors: uint64_t = cython.cast(uint64_t, u.uc_mcontext.gregs[18])  # cs gs fs ss, 16 bits each
    linear: uint64_t
    for k in range(_watched_count):
        s = _watched[k]
        if s == cython.NULL:
            continue
        linear = rip
        if (selectors & 0xFFFF) != USER_CS and s.translator == cython.NULL:  # NativeTraps, in 16- or 32-bit code
            linear += s.segs[CS].base
        if linear < s.code_low or linear >= s.code_high:
            continue
        if number == SIGSEGV and s.shadow_base and address - s.shadow_base < 4096:
            c = cython.cast(cython.pointer(CodeCache), s.translator)
            u.uc_mcontext.gregs[15] = cython.cast(
                cython.longlong, _wrap(s, cython.cast(uint64_t, u.uc_mcontext.gregs[15]), c.return_miss)
            )
            return
        c = cython.cast(cython.pointer(CodeCache), s.translator)
        if c != cython.NULL and rip < s.code_low + c.first:
            break  # in a stub, which a helper has called, or a defect of ours
        s.trap_rip = rip
        s.trap_signal = number
        s.trap_code = cython.cast(uint64_t, info.si_code)
        s.trap_address = address
        s.trap_vector = cython.cast(uint64_t, u.uc_mcontext.gregs[20])
        if s.translator == cython.NULL:
            u.uc_mcontext.gregs[18] = cython.cast(
                cython.longlong, (selectors & cython.cast(uint64_t, 0xFFFFFFFF0000) & ~cython.cast(uint64_t, 0xFFFF))
                | USER_CS | (cython.cast(uint64_t, USER_DS) << 48)
            )  # fmt: skip
        u.uc_mcontext.gregs[16] = cython.cast(cython.longlong, s.trap_exit)
        return
    if memory_is_gone(number, info.si_code) and _abandon(u, address):
        return
    c_sigaction(number, cython.address(_previous[number]), cython.NULL)  # not ours: it comes again


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _abandon(u: cython.pointer(ucontext_t), address: uint64_t) -> cython.int:
    """A helper has met host memory that is gone: the thread goes on behind the guard that it is in; 0 without one.

    What the helper was at is not finished. It holds no lock where it uses guest memory, and guest registers that
    translated code had are in the state already.
    """
    s: cython.pointer(CpuState)
    k: cython.int
    for k in range(_watched_count):
        s = _watched[k]
        if s != cython.NULL and s.guard_thread and s.guard_thread == pthread_self():
            s.guard_thread = 0
            s.host_fault = 1
            s.trap_address = address
            u.uc_mcontext.gregs[10] = cython.cast(cython.longlong, cython.cast(uint64_t, s) + 128)
            u.uc_mcontext.gregs[16] = cython.cast(
                cython.longlong, cython.cast(cython.pointer(CodeCache), s.translator).abandon
            )
            return 1
    return 0


def memory_is_gone(number, code):
    """Whether a signal says that nothing which allows the access is mapped, or that its file ended: sigaction(2)."""
    if number == SIGSEGV:
        return code in (SEGV_MAPERR, SEGV_ACCERR)
    return number == SIGBUS and code != BUS_ADRALN


def prepare_thread():
    """Give the calling thread an alternate signal stack unless it has one; -1 without memory."""
    now: stack_t
    new: stack_t
    memory: cython.p_void
    if sigaltstack(cython.NULL, cython.address(now)) < 0:
        return -1
    if not now.ss_flags & SS_DISABLE and now.ss_size >= 32768:
        return 0
    memory = mmap(cython.NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        return -1
    new.ss_sp = memory
    new.ss_flags = 0
    new.ss_size = 65536
    return sigaltstack(cython.address(new), cython.NULL)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _install(number: cython.int) -> cython.int:
    new: sigaction_t
    now: sigaction_t
    if c_sigaction(number, cython.NULL, cython.address(now)) < 0:
        return -1
    if now.sa_sigaction == _handler:
        return 0
    new.sa_sigaction = _handler
    sigemptyset(cython.address(new.sa_mask))
    new.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER
    _previous[number] = now
    return c_sigaction(number, cython.address(new), cython.NULL)


def watch(s):
    """Have the traps of a processor's code handled; -1 when there are too many processors. Call with the GIL held."""
    global _watched_count
    k: cython.int
    for k in range(_watched_count):
        if _watched[k] == cython.NULL:
            _watched[k] = s
            break
    else:
        if _watched_count >= 256:
            return -1
        _watched[_watched_count] = s
        _watched_count += 1
    if _install(SIGSEGV) < 0 or _install(SIGBUS) < 0 or _install(SIGFPE) < 0 or _install(SIGILL) < 0:
        return -1
    return 0


def unwatch(s):
    """Forget a processor. Call with the GIL held."""
    k: cython.int
    for k in range(_watched_count):
        if _watched[k] == s:
            _watched[k] = cython.NULL


def is_watched(s):
    """Is this one of the processors whose traps are handled?"""
    k: cython.int
    for k in range(_watched_count):
        if _watched[k] == s:
            return s != cython.NULL
    return False


@cython.cclass
class NativeTraps:
    """Catch the traps of native code in an address range: what the differential tests compare with."""

    s: cython.pointer(CpuState)

    def __cinit__(self, low: cython.ulonglong, high: cython.ulonglong, resume: cython.ulonglong):
        self.s = state_new()
        if self.s == cython.NULL:
            raise MemoryError("no memory for a trap record")
        self.s.code_low = low
        self.s.code_high = high
        self.s.trap_exit = resume
        if watch(self.s) < 0:
            raise RuntimeError("too many processors are watched")

    def __dealloc__(self):
        if self.s != cython.NULL:
            unwatch(self.s)
            state_free(self.s)

    def prepare(self, code_base: cython.ulonglong = 0) -> None:
        """Clear the record and ready the calling thread; *code_base* is that of a code segment that is not 64-bit."""
        prepare_thread()
        self.s.segs[CS].base = code_base
        self.s.trap_signal = 0

    @property
    def trap(self) -> tuple[int, int, int, int]:
        """Signal (0: none), its code, the faulting address, and the address of the instruction in its segment."""
        return self.s.trap_signal, self.s.trap_code, self.s.trap_address, self.s.trap_rip

    @property
    def vector(self) -> int:
        """The exception behind the signal, or -1 when there was none."""
        return self.s.trap_vector if self.s.trap_signal else -1
