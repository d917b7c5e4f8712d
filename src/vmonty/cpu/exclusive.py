"""A processor that is alone for one instruction: what a bus lock is where the host's own cannot serve.

Locked instructions are the host's, on the guest's memory itself, so that all processors, and devices, see them as
atomic. Only an operand in two pages that do not follow one another in the host has no such place: it is put together in
a buffer, while every other processor of this process waits at its next poll. SDM, "Bus Locking".

Who wants to be alone takes the lock, clears the others' run flags, and waits until each of them is out of run() or
``parked``. Those that come into run() meanwhile see their cleared flag before they touch anything.
"""

import cython
from cython.cimports.vmonty.cpu.codecache import (
    cpu_relax,
    lock_drop,
    lock_take,
    processors,
    processors_count,
    read_again,
)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _turn(spins: cython.int) -> cython.int:
    """One turn of a wait; the other one's thread may need this host processor."""
    cpu_relax()
    read_again()
    if spins & 1023 == 1023:
        sched_yield()
    return spins + 1


def exclusive_begin(s):
    """Wait until no other processor executes anything. Until ``exclusive_end`` the caller waits for nobody."""
    k: cython.int
    spins: cython.int = 0
    t: cython.pointer(CpuState)
    exclusive_aside(s)
    while lock_take(cython.address(exclusive_lock), 1):
        spins = _turn(spins)
    s.exclusive = 1
    s.parked = 0
    for k in range(processors_count):
        t = processors[k]
        if t != cython.NULL and t != s:
            t.run = 0
    read_again()
    for k in range(processors_count):
        t = processors[k]
        if t == cython.NULL or t == s:
            continue
        while t.in_run and not t.parked:
            spins = _turn(spins)


def exclusive_end(s):
    """Let the others go on."""
    s.exclusive = 0
    lock_drop(cython.address(exclusive_lock))


def exclusive_aside(s):
    """From here on nobody waits for this processor."""
    s.parked = 1


def exclusive_back(s):
    """Wait while another one is alone."""
    spins: cython.int = 0
    s.parked = 0
    read_again()
    while exclusive_lock:
        s.parked = 1
        while exclusive_lock:
            spins = _turn(spins)
        s.parked = 0
        read_again()


def exclusive_wait(s):
    """Stop here while another one is alone, or wants to be."""
    if exclusive_lock:
        exclusive_back(s)
