"""The VMX-preemption timer of a guest that runs: a POSIX timer whose signal clears the run flag.

SDM, "VMX-Preemption Timer". The dispatcher compares the deadline with the TSC; all that is needed is that it looks. The
signal goes to the thread that runs the guest, and its handler writes one word; processors that are gone are recognised
by the list that the trap handler keeps.

The POSIX timer stays armed over exits and entries: a pair of system calls for each would be most of what an exit costs.
One that fires too early, since the deadline has moved or the clocks differ, makes the dispatcher look, which arms it
anew. One that fires after the guest has left clears a flag that nobody reads.
"""

import cython
from cython.cimports.vmonty.cpu.codecache import put_vectors, take_vectors
from cython.cimports.vmonty.cpu.hosttraps import is_watched
from cython.cimports.vmonty.cpu.information import host_tsc

_ticks_per_ms = 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _number() -> cython.int:
    return SIGRTMIN + 5


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _handler(number: cython.int, info: cython.pointer(siginfo_t), context: cython.p_void) -> cython.void:
    s: cython.pointer(CpuState) = cython.cast(cython.pointer(CpuState), info.si_value.sival_ptr)
    if is_watched(s):
        s.run = 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _measure() -> cython.void:
    """Count TSC ticks for a millisecond: the timer may come early, so this need not be exact."""
    global _ticks_per_ms
    begin: timespec
    now: timespec
    start: uint64_t
    passed: uint64_t = 0
    clock_gettime(CLOCK_MONOTONIC, cython.address(begin))
    start = host_tsc()
    while passed < 1000000:
        clock_gettime(CLOCK_MONOTONIC, cython.address(now))
        passed = cython.cast(
            uint64_t, (now.tv_sec - begin.tv_sec) * cython.cast(int64_t, 1000000000) + now.tv_nsec - begin.tv_nsec
        )
    _ticks_per_ms = (host_tsc() - start) * 1000000 // passed + 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _make(s: cython.pointer(CpuState)) -> cython.int:
    """Give the processor a timer that signals the calling thread; 0 when the host has none left."""
    action: sigaction_t
    event: sigevent_t
    timer: timer_t = cython.NULL
    thread: cython.int
    if s.timer_thread:
        return 1
    thread = gettid()
    action.sa_sigaction = _handler
    sigemptyset(cython.address(action.sa_mask))
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART
    event.sigev_notify = SIGEV_THREAD_ID
    event.sigev_signo = _number()
    event.sigev_value.sival_ptr = s
    event.sigev_notify_thread_id = thread
    if c_sigaction(_number(), cython.address(action), cython.NULL) < 0:
        return 0
    if timer_create(CLOCK_MONOTONIC, cython.address(event), cython.address(timer)) < 0:
        return 0
    s.timer = cython.cast(uint64_t, timer)
    s.timer_thread = thread
    return 1


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _prepare(s: cython.pointer(CpuState)) -> cython.int:
    """The first time on a thread; the C library uses vector registers for it."""
    live: uint32_t = s.vectors_live
    made: cython.int
    put_vectors(s)
    if _ticks_per_ms == 0:
        _measure()
    made = _make(s)
    if live:
        take_vectors(s)
    return made


def preemption_thread(s):
    """The calling thread runs the guest from here on: a timer of another's is of no use."""
    if s.timer_thread and s.timer_thread != cython.cast(uint32_t, gettid()):
        preemption_free(s)


def preemption_arm(s, now, deadline):
    """Have the run flag cleared at *deadline*, or before; a host without timers looks at entry only."""
    when: itimerspec
    ticks: uint64_t = deadline - now
    nanoseconds: uint64_t
    if now < s.timer_due and s.timer_due <= deadline:
        return
    if (_ticks_per_ms == 0 or s.timer_thread == 0) and not _prepare(s):
        return
    if ticks > _ticks_per_ms:
        ticks -= ticks >> 10  # by how much the clocks may differ
    nanoseconds = ticks // _ticks_per_ms * 1000000 + ticks % _ticks_per_ms * 1000000 // _ticks_per_ms + 1000
    when.it_value.tv_sec = nanoseconds // 1000000000
    when.it_value.tv_nsec = nanoseconds % 1000000000
    when.it_interval.tv_sec = 0
    when.it_interval.tv_nsec = 0
    s.timer_due = (
        deadline if timer_settime(cython.cast(timer_t, s.timer), 0, cython.address(when), cython.NULL) == 0 else 0
    )


def preemption_free(s):
    """The processor goes, or another thread takes it."""
    if s.timer_thread:
        timer_delete(cython.cast(timer_t, s.timer))
        s.timer_thread = 0
        s.timer_due = 0


def halted_wait(s):
    """Sleep until the run flag is cleared, for 200 microseconds at most."""
    time: timespec
    if s.run:
        time.tv_sec = 0
        time.tv_nsec = 200000
        nanosleep(cython.address(time), cython.NULL)
