"""The guest's CPUID leaves, from the vCPU's table. Without vector registers, which may be the guest's."""

from __future__ import annotations

import cython


def _find_cpuid(a, function, index):
    """An entry with this index, else one for all; of equal ones the last."""
    k: cython.int
    found: cython.int = -1
    for k in range(cython.cast(cython.int, a.cpuid_count)):
        if a.cpuid[k].function == function:
            if not a.cpuid[k].significant:
                if found < 0 or not a.cpuid[found].significant:
                    found = k
            elif a.cpuid[k].index == index:
                found = k
    return found


def kvm_cpuid(a, function, index, out):
    """The guest's leaf; beyond the highest one, as Intel does, the highest basic leaf."""
    k: cython.int
    highest: uint32_t = 0
    found: cython.int = _find_cpuid(a, function, index)
    out[0] = out[1] = out[2] = out[3] = 0
    if found < 0 and (function >> 31) == 0:
        for k in range(cython.cast(cython.int, a.cpuid_count)):
            if (a.cpuid[k].function >> 31) == 0 and (a.cpuid[k].function >> 16) != 0x4000:
                highest = max(highest, a.cpuid[k].function)
        if function > highest:
            found = _find_cpuid(a, highest, index)
    if found < 0:
        if function == 0xB or function == 0x1F:
            out[2] = index & 0xFF
        return
    out[0] = a.cpuid[found].eax
    out[1] = a.cpuid[found].ebx
    out[2] = a.cpuid[found].ecx
    out[3] = a.cpuid[found].edx
