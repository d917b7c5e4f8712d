"""VMX capability reporting. SDM, "VMX Capability Reporting Facility".

Each control MSR has the bits that must be 1 in its low half (default1 class) and those that may be 1 in its high half.
"""

import cython
from cython.cimports.vmonty.cpu.cpuid import cr4_allowed
from cython.cimports.vmonty.cpu.state import CR4_VMXE
from cython.cimports.vmonty.cpu.vmcs import VMCS_REVISION

from vmonty.cpu.vmcs import Field

_exists = cython.declare(cython.uchar[0x8000])


def _fill():
    for field in Field:
        _exists[field] = 1


_fill()


def field_exists(encoding):
    """Is this the encoding of a field (its full access) that the VMCS has?"""
    return encoding < 0x8000 and _exists[encoding]


def _row(index, must, may):
    """The two halves of a control MSR; False when ``index`` isn't one."""
    must[0] = 0
    may[0] = 0
    if index == 0x481 or index == 0x48D:
        must[0] = PIN_DEFAULT1
        may[0] = PIN_MAY
    elif index == 0x482 or index == 0x48E:
        must[0] = PROCESSOR_DEFAULT1 if index == 0x482 else PROCESSOR_TRUE1
        may[0] = PROCESSOR_MAY | (cython.cast(uint32_t, 1) << 31)
    elif index == 0x483 or index == 0x48F:
        must[0] = EXIT_DEFAULT1 if index == 0x483 else EXIT_TRUE1
        may[0] = EXIT_MAY
    elif index == 0x484 or index == 0x490:
        must[0] = ENTRY_DEFAULT1 if index == 0x484 else ENTRY_TRUE1
        may[0] = ENTRY_MAY
    elif index == 0x48B:
        may[0] = SECONDARY_MAY
    else:
        return False
    may[0] |= must[0]
    return True


def capability(s, index, value):
    """Give one capability MSR; 0 when it doesn't exist."""
    must: uint32_t
    may: uint32_t
    if index == 0x480:
        # region size 4096, write-back memory, INS/OUTS information, true controls
        value[0] = VMCS_REVISION | (cython.cast(uint64_t, 0x1000) << 32) | (cython.cast(uint64_t, 6) << 50)
        value[0] |= (cython.cast(uint64_t, 1) << 54) | (cython.cast(uint64_t, 1) << 55)
    elif index == 0x485:
        value[0] = 5 | (1 << 5) | (7 << 6) | (4 << 16)  # timer rate TSC/32, EFER.LMA stored, HLT…SIPI, 4 CR3 targets
    elif index == 0x486:
        value[0] = cython.cast(uint64_t, 0x80000021)
    elif index == 0x487:
        value[0] = cython.cast(uint64_t, 0xFFFFFFFF)
    elif index == 0x488:
        value[0] = CR4_VMXE
    elif index == 0x489:
        value[0] = cr4_allowed(s)
    elif index == 0x48A:
        value[0] = 0x2E  # highest index 23
    elif index == 0x48C:
        # execute-only, walk length 4, UC and WB, 2M and 1G pages, INVEPT, A/D flags, INVVPID with all types
        value[0] = 1 | (1 << 6) | (1 << 8) | (1 << 14) | (1 << 16) | (1 << 17) | (1 << 20) | (1 << 21) | (3 << 25)
        value[0] |= (cython.cast(uint64_t, 1) << 32) | (cython.cast(uint64_t, 0xF) << 40)
    elif index == 0x491:
        value[0] = 0
    elif _row(index, cython.address(must), cython.address(may)):
        value[0] = must | (cython.cast(uint64_t, may) << 32)
    else:
        return False
    return True


def controls_allowed(s, index, value):
    """SDM, "Reserved Controls and Default Settings"."""
    must: uint32_t
    may: uint32_t
    _row(index, cython.address(must), cython.address(may))
    return (value & must) == must and (value & ~may) == 0


def read(state_address: int, index: int) -> int:
    """Read a capability MSR (0x480 … 0x491) of a processor. KeyError when there is none."""
    value: uint64_t = 0
    s: cython.pointer(CpuState) = cython.cast(cython.pointer(CpuState), cython.cast(uint64_t, state_address))
    if not capability(s, index, cython.address(value)):
        raise KeyError(f"no VMX capability MSR {index:#x}")
    return value
