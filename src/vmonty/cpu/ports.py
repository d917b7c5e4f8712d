"""IN, OUT, INS, OUTS. SDM, "I/O Port Access Protection"; "Exit Qualification for I/O Instructions"."""

import cython
from cython.cimports.vmonty.cpu.boundary import data_trap
from cython.cimports.vmonty.cpu.breakpoints import port_access
from cython.cimports.vmonty.cpu.mmio import mmio_done
from cython.cimports.vmonty.cpu.segmentation import linear_address
from cython.cimports.vmonty.cpu.segments import implicit_read
from cython.cimports.vmonty.cpu.state import (
    ACCESS_WRITE,
    DEBUGCTL_BTF,
    ES,
    EXIT_PIO,
    FLAG_DF,
    FLAG_RF,
    FLAG_TF,
    GO_ON,
    LEAVE_EXIT,
    MODE_REAL,
    MODE_VM86,
    RAX,
    RCX,
    RDI,
    RDX,
    RSI,
    SHADOW_MOV_SS,
    SHADOW_STI,
    raise_error,
)
from cython.cimports.vmonty.cpu.svm_exit import svm_exit, svm_port_intercepted
from cython.cimports.vmonty.cpu.tlb import probe_write, read_value, write_value
from cython.cimports.vmonty.cpu.vmcb import SVM_IOIO
from cython.cimports.vmonty.cpu.vmcs import GUEST_LINEAR_ADDRESS, put
from cython.cimports.vmonty.cpu.vmx_exit import (
    GUEST_VMX,
    PROC_IO_BITMAPS,
    PROC_UNCONDITIONAL_IO,
    REASON_IO,
    vm_exit,
    vm_exit_information,
    vmx_of,
)


def _allowed(s, port, size):
    """CPL against IOPL, then the TSS's permission bitmap: GO_ON or #GP(0)."""
    base: uint64_t
    bits: uint64_t
    r: cython.int
    if s.mode == MODE_REAL or (s.mode != MODE_VM86 and s.cpl <= (cython.cast(uint32_t, s.rflags >> 12) & 3)):
        return GO_ON
    if s.tr.limit < 0x67 or (s.tr.access_rights & 8) == 0:
        return raise_error(s, 13, 0)
    r = implicit_read(s, s.tr.base + 0x66, 2, cython.address(base))
    if r != GO_ON:
        return r
    if base + (port >> 3) + 1 > s.tr.limit:
        return raise_error(s, 13, 0)
    r = implicit_read(s, s.tr.base + base + (port >> 3), 2, cython.address(bits))
    if r != GO_ON:
        return r
    if (bits >> (port & 7)) & ((cython.cast(uint64_t, 1) << size) - 1):
        return raise_error(s, 13, 0)
    return GO_ON


def _intercepted(s, port, size):
    """Do the I/O controls of the running guest select this access?"""
    i: uint32_t
    bitmap: cython.pointer(uint8_t)
    if s.guest_mode != GUEST_VMX:
        return False
    if vmx_of(s).processor & PROC_IO_BITMAPS:
        if port + size > 0x10000:
            return True
        for i in range(port, port + size):
            bitmap = vmx_of(s).io_bitmap_b if i & 0x8000 else vmx_of(s).io_bitmap_a
            if (bitmap[(i & 0x7FFF) >> 3] >> (i & 7)) & 1:
                return True
        return False
    return (vmx_of(s).processor & PROC_UNCONDITIONAL_IO) != 0


def _trap(s, port, size, repeats):
    """What waits at the boundary behind a port instruction, or behind an iteration of one that *repeats*."""
    if s.port_watch:
        port_access(s, port, size)
    if s.rflags & FLAG_TF and not s.debugctl & DEBUGCTL_BTF:
        s.pending_debug |= 0x4000
    if s.monitor_trap:
        s.monitor_trap = 2
    s.interruptibility &= ~cython.cast(uint32_t, SHADOW_STI | SHADOW_MOV_SS)
    if not repeats:
        s.retired += 1
    s.observe_again = repeats
    if repeats:
        s.rflags |= FLAG_RF
    else:
        s.rflags &= ~cython.cast(uint64_t, FLAG_RF)


def _svm_information(port, size, rest):
    """EXITINFO1: 31..16 port | 12..10 segment | 9..7 address size | 6..4 operand size | 3 REP | 2 string | 0 IN.

    APM, "IN and OUT Behavior". The sizes are one-hot: 1, 2, 4 for 1, 2, 4 bytes, and for 2, 4, 8.
    """
    return rest | (size << 4) | (cython.cast(uint64_t, port) << 16)


def _leave(s, port, size, write, data):
    """Report a port access of the bare processor."""
    s.exit.reason = EXIT_PIO
    s.exit.address = port
    s.exit.size = size
    s.exit.write = write
    s.exit.count = 0
    s.exit.data = data
    return LEAVE_EXIT


def port_in(s, port, size, immediate, length):
    """IN."""
    r: cython.int = _allowed(s, port, size)
    if r != GO_ON:
        return r
    if _intercepted(s, port, size):
        return vm_exit(s, REASON_IO, (size - 1) | 8 | (immediate << 6) | (cython.cast(uint64_t, port) << 16), length)
    if svm_port_intercepted(s, port, size):
        return svm_exit(s, SVM_IOIO, _svm_information(port, size, 1), s.rip + length, length)
    s.rip += length
    _trap(s, port, size, 0)
    return _leave(s, port, size, 0, 0)


def port_out(s, port, size, immediate, length):
    """OUT."""
    data: uint64_t = s.gpr[RAX] & ((cython.cast(uint64_t, 1) << (8 * size)) - 1)
    r: cython.int = _allowed(s, port, size)
    if r != GO_ON:
        return r
    if _intercepted(s, port, size):
        return vm_exit(s, REASON_IO, (size - 1) | (immediate << 6) | (cython.cast(uint64_t, port) << 16), length)
    if svm_port_intercepted(s, port, size):
        return svm_exit(s, SVM_IOIO, _svm_information(port, size, 0), s.rip + length, length)
    s.rip += length
    _trap(s, port, size, 0)
    return _leave(s, port, size, 1, data)


def _masked(value, address_size):
    if address_size == 8:
        return value
    if address_size == 4:
        return value & cython.cast(uint64_t, 0xFFFFFFFF)
    return value & 0xFFFF


def _advance(s, register, size, address_size):
    """Move an index register by the operand size, in its address size."""
    value: uint64_t = s.gpr[register] - size if s.rflags & FLAG_DF else s.gpr[register] + size
    if address_size == 8:
        s.gpr[register] = value
    elif address_size == 4:
        s.gpr[register] = value & cython.cast(uint64_t, 0xFFFFFFFF)
    else:
        s.gpr[register] = (s.gpr[register] & ~cython.cast(uint64_t, 0xFFFF)) | (value & 0xFFFF)


def string_in(s, size, address_size, rep, length):
    """INS. The exit reports the whole REP; the bare processor does one iteration per exit."""
    port: uint32_t = cython.cast(uint32_t, s.gpr[RDX]) & 0xFFFF
    offset: uint64_t = _masked(s.gpr[RDI], address_size)
    linear: uint64_t
    r: cython.int
    if rep and _masked(s.gpr[RCX], address_size) == 0:
        return GO_ON
    r = _allowed(s, port, size)
    if r == GO_ON:
        r = linear_address(s, ES, offset, size, 1, cython.address(linear))
    if r != GO_ON:
        return r
    if _intercepted(s, port, size):
        put(vmx_of(s).vmcs, GUEST_LINEAR_ADDRESS, linear)
        return vm_exit_information(
            s,
            REASON_IO,
            (size - 1) | 0x18 | ((1 if rep else 0) << 5) | (cython.cast(uint64_t, port) << 16),
            length,
            (address_size >> 2) << 7,
        )
    if svm_port_intercepted(s, port, size):
        return svm_exit(
            s, SVM_IOIO, _svm_information(port, size, 5 | ((1 if rep else 0) << 3) | ((address_size >> 1) << 7)),
            s.rip + length, length,
        )  # fmt: skip
    r = probe_write(s, linear, size, ACCESS_WRITE)
    if r != GO_ON:
        return r
    _leave(s, port, size, 0, 0)
    s.exit.count = 1 | (address_size << 8) | ((1 if rep else 0) << 16) | (length << 24)
    return LEAVE_EXIT


def string_out(s, size, address_size, rep, segment, length):
    """OUTS."""
    port: uint32_t = cython.cast(uint32_t, s.gpr[RDX]) & 0xFFFF
    offset: uint64_t = _masked(s.gpr[RSI], address_size)
    linear: uint64_t
    data: uint64_t
    r: cython.int
    if rep and _masked(s.gpr[RCX], address_size) == 0:
        return GO_ON
    r = _allowed(s, port, size)
    if r == GO_ON:
        r = linear_address(s, segment, offset, size, 0, cython.address(linear))
    if r != GO_ON:
        return r
    if _intercepted(s, port, size):
        put(vmx_of(s).vmcs, GUEST_LINEAR_ADDRESS, linear)
        return vm_exit_information(
            s,
            REASON_IO,
            (size - 1) | 0x10 | ((1 if rep else 0) << 5) | (cython.cast(uint64_t, port) << 16),
            length,
            ((address_size >> 2) << 7) | (segment << 15),
        )
    if svm_port_intercepted(s, port, size):
        return svm_exit(
            s, SVM_IOIO,
            _svm_information(port, size, 4 | ((1 if rep else 0) << 3) | ((address_size >> 1) << 7) | (segment << 10)),
            s.rip + length, length,
        )  # fmt: skip
    r = read_value(s, linear, size, 0, cython.address(data))
    if r != GO_ON:
        return r
    _advance(s, RSI, size, address_size)
    if rep:
        s.gpr[RCX] = (s.gpr[RCX] & ~_masked(~cython.cast(uint64_t, 0), address_size)) | _masked(
            s.gpr[RCX] - 1, address_size
        )
    if not rep or _masked(s.gpr[RCX], address_size) == 0:
        s.rip += length
        rep = 0
    _trap(s, port, size, rep)
    data_trap(s)
    mmio_done(s)
    return _leave(s, port, size, 1, data)


def complete(s):
    """Put the answer of a port read where it belongs: rAX, or memory for INS."""
    size: uint32_t = s.exit.size
    address_size: uint32_t = (s.exit.count >> 8) & 0xFF
    mask: uint64_t = (cython.cast(uint64_t, 1) << (8 * size)) - 1
    linear: uint64_t
    r: cython.int
    if s.exit.reason != EXIT_PIO or s.exit.write:
        return GO_ON
    if s.exit.count == 0:
        if size == 4:
            s.gpr[RAX] = s.exit.data & mask
        else:
            s.gpr[RAX] = (s.gpr[RAX] & ~mask) | (s.exit.data & mask)
        return GO_ON
    r = linear_address(s, ES, _masked(s.gpr[RDI], address_size), size, 1, cython.address(linear))
    if r == GO_ON:
        r = write_value(s, linear, size, ACCESS_WRITE, s.exit.data & mask)
    if r != GO_ON:
        return r
    _advance(s, RDI, size, address_size)
    data_trap(s)
    if s.exit.count & 0x10000:
        s.gpr[RCX] = (s.gpr[RCX] & ~_masked(~cython.cast(uint64_t, 0), address_size)) | _masked(
            s.gpr[RCX] - 1, address_size
        )
        if _masked(s.gpr[RCX], address_size):
            _trap(s, cython.cast(uint32_t, s.exit.address), size, 1)
            return GO_ON
    s.rip += s.exit.count >> 24
    _trap(s, cython.cast(uint32_t, s.exit.address), size, 0)
    return GO_ON
