"""Port registers whose plain accesses a VM answers in place of user space. No ioctl of Linux's KVM does this.

A window is the eight registers of a serial console. Coalesced PIO comes closest, but each of a UART's bytes is
preceded by a read of its line status. User space says what reads of some registers give, which writes change nothing,
and whether bytes that are written to the first register are collected. Everything else leaves to it as before, as do
those when the ring is full.

A cell is one port that is memory: PCI's configuration address, the A20 gate that firmware reads around each BIOS call.
"""

from __future__ import annotations

import os

import cython
from cython.cimports.libc.string import memset
from cython.cimports.posix.unistd import write
from cython.cimports.vmonty.cpu.state import RAX
from cython.cimports.vmonty.kvm.soft.fastpath import (
    COUNT_IO_EXITS,
    FAST_NONE,
    FAST_RESUME,
    skip_emulated_instruction,
)
from cython.cimports.vmonty.kvm.soft.kvm_host import (
    PORT_CELLS,
    PORT_WINDOW_RING,
    PORT_WINDOW_SIZE,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)


def _access(w, s, register, reads):
    """With the lock held."""
    one: uint64_t = 1
    value: uint32_t = cython.cast(uint32_t, s.gpr[RAX]) & 0xFF
    if reads:
        if ((w.reads >> register) & 1) == 0:
            return False
        s.gpr[RAX] = (s.gpr[RAX] & ~cython.cast(uint64_t, 0xFF)) | w.values[register]
        return True
    if (w.idle >> register) & 1 and value == w.values[register]:
        return True
    if register != 0 or not w.collects or w.put - w.taken >= PORT_WINDOW_RING:
        return False
    w.ring[w.put % PORT_WINDOW_RING] = value
    w.put += 1
    # Only the first: who takes them takes all. Nobody reads the result: the counter cannot be at its limit.
    if w.put - w.taken == 1 and w.event >= 0:
        write(w.event, cython.address(one), 8)
    return True


def _window(w, s, port, size, reads):
    register: uint32_t
    done: cython.bint
    if w == cython.NULL or size != 1:
        return False
    register = port - w.first
    if register >= PORT_WINDOW_SIZE:
        return False
    pthread_mutex_lock(cython.address(w.lock))
    done = _access(w, s, register, reads)
    pthread_mutex_unlock(cython.address(w.lock))
    return done


def _cell(a, s, port, size, reads):
    n: cython.int
    c: cython.pointer(KvmPortCell)
    value: uint32_t
    every: uint64_t
    for n in range(PORT_CELLS):
        c = a.kvm.cells[n]
        if c == cython.NULL:
            return False
        if c.port == port:
            break
    else:
        return False
    if c.size != size or c.hidden:
        return False
    # SDM, "General-Purpose Registers": what writes 32 bits clears those above, and what writes fewer keeps them.
    every = cython.cast(uint64_t, 0xFFFF_FFFF) >> (32 - 8 * size)
    if reads:
        s.gpr[RAX] = c.value if size == 4 else (s.gpr[RAX] & ~every) | c.value
        return True
    value = s.gpr[RAX] & every
    if c.mask == 0 or (value ^ c.value) & ~c.mask:
        return False
    c.value = value
    return True


def fastpath_ports(a, s, port, size, reads):
    """What user space has said it would do."""
    if (a.kvm.port_map[port >> 3] >> (port & 7)) & 1:
        return FAST_NONE
    if not _window(a.kvm.window, s, port, size, reads) and not _cell(a, s, port, size, reads):
        return FAST_NONE
    a.counters[COUNT_IO_EXITS] += 1
    skip_emulated_instruction(s)
    return FAST_RESUME


@cython.cclass
class PortWindow:
    """The ports from *first*; see vmonty.kvm.api.PortWindow. All methods on any thread."""

    def __cinit__(self, first: cython.uint):
        memset(cython.address(self.w), 0, cython.sizeof(KvmPortWindow))
        pthread_mutex_init(cython.address(self.w.lock), cython.NULL)
        self.w.first = first
        self.w.event = -1

    def __init__(self, first: cython.uint) -> None:
        self.event = self.w.event = os.eventfd(0, os.EFD_CLOEXEC)

    def __dealloc__(self):
        if self.w.event >= 0:
            os.close(self.w.event)
        pthread_mutex_destroy(cython.address(self.w.lock))

    def show(self, values: dict, idle: cython.uint, collects: cython.bint) -> None:
        """From now on; the guest's next access sees it."""
        register: cython.uint
        reads: cython.uint = 0
        given: cython.uchar[8]
        for register, value in values.items():
            if register >= PORT_WINDOW_SIZE:
                raise ValueError(f"register {register}: a window has {PORT_WINDOW_SIZE}")
            given[register] = value
            reads |= cython.cast(cython.uint, 1) << register
        pthread_mutex_lock(cython.address(self.w.lock))
        for register in range(cython.cast(cython.uint, PORT_WINDOW_SIZE)):
            if (reads >> register) & 1:
                self.w.values[register] = given[register]
        self.w.reads = reads
        self.w.idle = idle & reads
        self.w.collects = collects
        pthread_mutex_unlock(cython.address(self.w.lock))

    def take(self) -> bytes:
        """What was collected since the last time."""
        made: cython.uchar[4096]
        count: cython.uint = 0
        pthread_mutex_lock(cython.address(self.w.lock))
        while self.w.taken != self.w.put:
            made[count] = self.w.ring[self.w.taken % PORT_WINDOW_RING]
            self.w.taken += 1
            count += 1
        pthread_mutex_unlock(cython.address(self.w.lock))
        return made[:count]

    def wait(self) -> None:
        """Sleep until something was collected, or close()."""
        os.eventfd_read(self.event)

    def wake(self) -> None:
        """End a wait()."""
        os.eventfd_write(self.event, 1)


@cython.cclass
class PortCell:
    """*size* bytes (1, 2 or 4) at *port*; see vmonty.kvm.api.PortCell. All methods on any thread."""

    def __cinit__(self, port: cython.uint, size: cython.uint, value: cython.uint, mask: cython.uint):
        if size not in (1, 2, 4):
            raise ValueError(f"a port is of 1, 2 or 4 bytes, not {size}")
        self.c.port, self.c.size = port, size
        self.c.mask, self.c.hidden = mask, False
        self.value = value

    @property
    def value(self) -> int:
        """What the port holds."""
        return self.c.value

    @value.setter
    def value(self, value: cython.uint) -> None:
        self.c.value = value & (cython.cast(uint64_t, 0xFFFF_FFFF) >> (32 - 8 * self.c.size))

    def hide(self) -> None:
        """From now on every access is an exit; the guest's next one sees it."""
        self.c.hidden = True
