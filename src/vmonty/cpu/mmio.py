"""Device memory: every access of an instruction is reported to the caller of run(), in order, one EXIT_MMIO each.

An access is split at page borders, and into parts of eight bytes from its start, as Linux's KVM splits it
(emulator_read_write()). A read stops the instruction before it changed anything; with the answer it is executed again
and finds the answers so far in ``mmio``. A write is queued in ``mmio_writes``: the instruction finishes, and run()
hands over one part after the other before it goes on.
"""

import cython
from cython.cimports.vmonty.cpu.state import EXIT_BUDGET, EXIT_MMIO, EXIT_NONE, LEAVE_EXIT, MMIO_SLOTS, MODE_LONG64


def mmio_read(s, physical, data, size):
    """Read from the answers at hand, or ask for the next part."""
    part: uint32_t
    k: uint32_t
    n: uint32_t
    while size:
        part = min(8, size)
        k = s.mmio_at
        if k >= MMIO_SLOTS:  # no instruction reads so much: a bus without a device
            for n in range(part):
                data[n] = 0xFF
        elif k < s.mmio_count and s.mmio[k].address == physical and s.mmio[k].size == part:
            s.mmio_at = k + 1
            for n in range(part):
                data[n] = cython.cast(uint8_t, s.mmio[k].data >> (8 * n))
        else:
            s.mmio_count = k + 1
            s.mmio[k].address = physical
            s.mmio[k].size = part
            s.mmio_writes_count = 0  # they come again
            s.exit.reason = EXIT_MMIO
            s.exit.address = physical
            s.exit.size = part
            s.exit.write = 0
            s.exit.data = 0
            return LEAVE_EXIT
        data += part
        physical += part
        size -= part
    return 0


def mmio_write(s, physical, data, size):
    """Queue the parts of a write."""
    part: uint32_t
    k: uint32_t
    n: uint32_t
    while size:
        part = min(8, size)
        k = s.mmio_writes_count
        if k >= MMIO_SLOTS:  # no instruction writes so much
            return
        s.mmio_writes_count = k + 1
        s.mmio_writes[k].address = physical
        s.mmio_writes[k].size = part
        s.mmio_writes[k].data = 0
        for n in range(part):
            s.mmio_writes[k].data |= cython.cast(uint64_t, data[n]) << (8 * n)
        data += part
        physical += part
        size -= part


def mmio_report(s):
    """Report the next queued write."""
    k: uint32_t = s.mmio_writes_at
    if k >= s.mmio_writes_count:
        return False
    s.exit.reason = EXIT_MMIO
    s.exit.address = s.mmio_writes[k].address
    s.exit.size = s.mmio_writes[k].size
    s.exit.write = 1
    s.exit.data = s.mmio_writes[k].data
    s.mmio_writes_at = k + 1
    if s.mmio_writes_at == s.mmio_writes_count:
        s.mmio_writes_at = 0
        s.mmio_writes_count = 0
    return True


def mmio_begin(s, resume):
    """Forget the last one, or report what is left of it: its writes, or that it is done."""
    if not resume:
        s.mmio_count = 0
        s.mmio_writes_count = 0
        s.mmio_writes_at = 0
        s.emulated = 0
        return EXIT_NONE
    if mmio_report(s):
        return EXIT_MMIO
    return EXIT_BUDGET if s.emulated else EXIT_NONE


def mmio_end(s):
    """The instruction is done when its budget is used up; outside of 64-bit mode 0 follows the last byte of 4 GiB."""
    s.emulated = s.budget == 0
    s.budget = 0
    if s.mode != MODE_LONG64:
        s.rip = cython.cast(uint32_t, s.rip)


def mmio_answer(s):
    """Keep the data of the read that run() reported last."""
    if s.mmio_count and not s.exit.write:
        s.mmio[s.mmio_count - 1].data = s.exit.data
