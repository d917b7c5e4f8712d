"""CPUID: answers from the processor's table, with the few bits that follow its state. SDM, "CPUID—CPU
Identification".
"""

import cython
from cython.cimports.libc.stdlib import calloc, free
from cython.cimports.vmonty.cpu.codecache import cache_flush
from cython.cimports.vmonty.cpu.state import (
    CR4_LA57,
    CR4_OSXSAVE,
    CR4_VMXE,
    EFER_FFXSR,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    EFER_SVME,
)


def _find(m, leaf, subleaf):
    i: uint32_t
    for i in range(m.count):
        if m.entries[i].leaf == leaf and (m.entries[i].indexed == 0 or m.entries[i].subleaf == subleaf):
            return cython.address(m.entries[i])
    return cython.NULL


def lookup(s, leaf, subleaf, out):
    """Answer one leaf; leaves above the range answer the highest basic one, as Intel's processors do."""
    m: cython.pointer(CpuModel) = cython.cast(cython.pointer(CpuModel), s.models)
    e: cython.pointer(CpuidEntry) = cython.NULL
    top: cython.pointer(CpuidEntry)
    out[0] = 0
    out[1] = 0
    out[2] = 0
    out[3] = 0
    if m == cython.NULL or m.count == 0:
        return
    e = _find(m, leaf, subleaf)
    if e == cython.NULL:
        top = _find(m, leaf & cython.cast(uint64_t, 0x80000000), 0)
        if (leaf >> 31) == 0 and top != cython.NULL and leaf > top.eax:
            e = _find(m, top.eax, subleaf)
    if e == cython.NULL:
        if leaf == 0xB:
            out[2] = subleaf & 0xFF
        return
    out[0] = e.eax
    out[1] = e.ebx
    out[2] = e.ecx
    out[3] = e.edx
    if e.leaf == 1:
        out[2] &= ~cython.cast(uint32_t, 1 << 27)
        if s.cr4 & CR4_OSXSAVE:
            out[2] |= 1 << 27
        if (s.apic_base & 0x800) == 0:
            out[3] &= ~cython.cast(uint32_t, 1 << 9)


def cr4_allowed(s):
    """CR4 bits that may be 1: those of the features, VMXE when VMX is there."""
    m: cython.pointer(CpuModel) = cython.cast(cython.pointer(CpuModel), s.models)
    allowed: uint64_t = 0x3707FF  # VME … OSXMMEXCPT, FSGSBASE, PCIDE, OSXSAVE, SMEP, SMAP
    if m != cython.NULL:
        allowed = m.cr4_allowed
    if s.vmx != cython.NULL:
        allowed |= CR4_VMXE
    return allowed


def efer_allowed(s):
    """EFER bits that may be 1."""
    m: cython.pointer(CpuModel) = cython.cast(cython.pointer(CpuModel), s.models)
    allowed: uint64_t = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_FFXSR | EFER_SVME
    if m != cython.NULL:
        allowed = m.efer_allowed
    if s.svm == cython.NULL:
        allowed &= ~cython.cast(uint64_t, EFER_SVME)
    return allowed


def xcr0_allowed(s):
    """XCR0 bits that may be 1."""
    m: cython.pointer(CpuModel) = cython.cast(cython.pointer(CpuModel), s.models)
    if m != cython.NULL:
        return m.xcr0_allowed
    return 7


def msrs_allowed(s, group):
    """Do the features bring a group of model-specific registers? A processor without a table has them all."""
    m: cython.pointer(CpuModel) = cython.cast(cython.pointer(CpuModel), s.models)
    return m == cython.NULL or (m.msrs_allowed >> group) & 1 != 0


def set_table(state_address: int, rows: list, cr4: int, efer: int, xcr0: int, msrs: int) -> None:
    """Give a processor its table: rows (leaf, subleaf or None, eax, ebx, ecx, edx). MemoryError, ValueError."""
    s: cython.pointer(CpuState) = cython.cast(cython.pointer(CpuState), cython.cast(uint64_t, state_address))
    m: cython.pointer(CpuModel) = cython.cast(cython.pointer(CpuModel), s.models)
    i: cython.int
    if len(rows) > MAX_CPUID_ENTRIES:
        raise ValueError(f"a CPUID table holds at most {MAX_CPUID_ENTRIES} rows, not {len(rows)}")
    if m == cython.NULL:
        m = cython.cast(cython.pointer(CpuModel), calloc(1, cython.sizeof(CpuModel)))
        if m == cython.NULL:
            raise MemoryError("no memory for a CPUID table")
        s.models = m
    m.count = 0
    for i, (leaf, subleaf, eax, ebx, ecx, edx) in enumerate(rows):
        m.entries[i].leaf = leaf
        m.entries[i].indexed = subleaf is not None
        m.entries[i].subleaf = subleaf or 0
        m.entries[i].eax = eax
        m.entries[i].ebx = ebx
        m.entries[i].ecx = ecx
        m.entries[i].edx = edx
    m.cr4_allowed = cr4
    s.linear_bits = 57 if cr4 & CR4_LA57 else 48
    m.efer_allowed = efer
    m.xcr0_allowed = xcr0
    m.msrs_allowed = msrs
    m.count = len(rows)


def set_features(state_address: int, words: list) -> None:
    """Say which instructions a processor has: bits by the numbers of ``opcodes.FEATURES``; the others raise #UD.

    ValueError while the processor runs or without eight words.
    """
    s: cython.pointer(CpuState) = cython.cast(cython.pointer(CpuState), cython.cast(uint64_t, state_address))
    k: cython.int
    word: uint64_t
    changed: cython.bint = False
    if len(words) != 8:
        raise ValueError("the features of a processor are eight words")
    if s.in_run:
        raise ValueError("a processor's features cannot change while it runs")
    for k in range(8):
        word = words[k]
        changed = changed or s.features[k] != word
        s.features[k] = word
    if changed:
        cache_flush(s)


def drop_table(state_address: int) -> None:
    """Free a processor's table."""
    s: cython.pointer(CpuState) = cython.cast(cython.pointer(CpuState), cython.cast(uint64_t, state_address))
    free(s.models)
    s.models = cython.NULL


def answer(state_address: int, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """Give EAX, EBX, ECX, EDX as the processor would answer."""
    out: uint32_t[4]
    s: cython.pointer(CpuState) = cython.cast(cython.pointer(CpuState), cython.cast(uint64_t, state_address))
    lookup(s, leaf, subleaf, cython.cast(cython.pointer(uint32_t), out))
    return out[0], out[1], out[2], out[3]
