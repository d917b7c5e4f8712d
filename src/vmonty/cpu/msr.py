"""Model-specific registers of the processor. Unknown ones raise #GP. SDM, "Model-Specific Registers (MSRs)".

What an interrupt controller or hypervisor owns (x2APIC, kvmclock, …) isn't here: host software intercepts it.
"""

import cython
from cython.cimports.vmonty.cpu.cpuid import (
    MSRS_APIC,
    MSRS_ARCH_CAPABILITIES,
    MSRS_EFER,
    MSRS_LONG_MODE,
    MSRS_MACHINE_CHECK,
    MSRS_MTRR,
    MSRS_OSVW,
    MSRS_PAT,
    MSRS_SPEC_CTRL,
    MSRS_SYSCALL,
    MSRS_SYSENTER,
    MSRS_TSC,
    MSRS_TSC_ADJUST,
    MSRS_TSC_AUX,
    MSRS_TSC_DEADLINE,
    efer_allowed,
    msrs_allowed,
)
from cython.cimports.vmonty.cpu.information import tsc
from cython.cimports.vmonty.cpu.state import (
    DEBUGCTL_BTF,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SVME,
    FS,
    GS,
    MTRR_VARIABLE,
    has_feature,
    is_register_canonical,
    paging_enabled,
)
from cython.cimports.vmonty.cpu.svm_exit import VM_CR_LOCK, VM_CR_SVMDIS, svm_of
from cython.cimports.vmonty.cpu.tlb import flush_all, mode_changed
from cython.cimports.vmonty.cpu.vmx_capabilities import capability

from vmonty.cpu import opcodes

_XSAVES = cython.declare(cython.int, opcodes.FEATURES.index("xsaves"))


def _pat_valid(value):
    """SDM, "IA32_PAT MSR": each byte 0, 1, 4, 5, 6 or 7."""
    i: uint32_t
    kind: uint64_t
    for i in range(8):
        kind = (value >> (8 * i)) & 0xFF
        if kind > 7 or kind == 2 or kind == 3:
            return False
    return True


def _group(index):
    """The group of registers (MSRS_*) that one belongs to; -1 for those that no CPUID bit tells of."""
    if index >= cython.cast(uint64_t, 0xC0000000):
        index -= cython.cast(uint64_t, 0xC0000000)
        if 0x100 <= index <= 0x102 or index == 0x82 or index == 0x83:
            return MSRS_LONG_MODE
        if index == 0x80:
            return MSRS_EFER
        if index == 0x81 or index == 0x84:
            return MSRS_SYSCALL
        if index == 0x103:
            return MSRS_TSC_AUX
        return MSRS_OSVW if index == 0x10140 or index == 0x10141 else -1
    if index == 0x10:
        return MSRS_TSC
    if index == 0x3B:
        return MSRS_TSC_ADJUST
    if index == 0x1B:
        return MSRS_APIC
    if index == 0x48 or index == 0x49:
        return MSRS_SPEC_CTRL
    if index == 0x10A:
        return MSRS_ARCH_CAPABILITIES
    if 0x174 <= index <= 0x176:
        return MSRS_SYSENTER
    if index == 0x179 or index == 0x17A:
        return MSRS_MACHINE_CHECK
    if index == 0x277:
        return MSRS_PAT
    if index == 0x6E0:
        return MSRS_TSC_DEADLINE
    if index == 0xFE or index == 0x2FF or 0x200 <= index < 0x200 + 2 * MTRR_VARIABLE or _mtrr_fixed(index) >= 0:
        return MSRS_MTRR
    return -1


def _absent(s, index):
    """Is it a register of a feature that CPUID does not show? SDM, "RDMSR—Read From Model Specific Register"."""
    group: cython.int = _group(index)
    return group >= 0 and not msrs_allowed(s, cython.cast(uint32_t, group))


def _mtrr_type(value):
    """SDM, "Memory Types That Can Be Encoded in MTRRs"."""
    return value < 8 and (0x73 >> value) & 1 != 0


def _mtrr_valid(s, index, value):
    """SDM, "MTRRs": reserved bits and memory types raise #GP."""
    k: uint32_t
    bad: cython.bint = False
    if index == 0x2FF:
        return (value & ~cython.cast(uint64_t, 0xCFF)) == 0 and _mtrr_type(value & 0xFF)
    if index < 0x200 + 2 * MTRR_VARIABLE:
        if value >> s.physical_bits:
            return False
        return (value & 0x7FF) == 0 if index & 1 else (value & 0xF00) == 0 and _mtrr_type(value & 0xFF)
    for k in range(8):
        bad = bad or not _mtrr_type((value >> (8 * k)) & 0xFF)
    return not bad


def _mtrr_fixed(index):
    if index == 0x250:
        return 0
    if index == 0x258 or index == 0x259:
        return 1 + (index - 0x258)
    if 0x268 <= index <= 0x26F:
        return 3 + (index - 0x268)
    return -1


def _write_vm_cr(s, value):
    """APM, "VM_CR MSR (C001_0114h)": SVMDIS is fixed while LOCK is set or EFER.SVME is; LOCK stays."""
    old: uint64_t = svm_of(s).vm_cr
    if value & ~cython.cast(uint64_t, 0x1F):
        return False
    if old & VM_CR_LOCK:
        value = (value & ~cython.cast(uint64_t, VM_CR_LOCK | VM_CR_SVMDIS)) | (old & (VM_CR_LOCK | VM_CR_SVMDIS))
    if (value & VM_CR_SVMDIS) and (s.efer & EFER_SVME):
        return False
    svm_of(s).vm_cr = value
    return True


def write_efer(s, value):
    """SDM, "IA32_EFER MSR"; APM, "Extended Feature Enable Register (EFER)"."""
    if value & ~efer_allowed(s):
        return False
    if (value & EFER_SVME) and (svm_of(s).vm_cr & VM_CR_SVMDIS):
        return False
    if paging_enabled(s) and ((value ^ s.efer) & EFER_LME):
        return False
    value = (value & ~cython.cast(uint64_t, EFER_LMA)) | (s.efer & EFER_LMA)
    if (value ^ s.efer) & EFER_NXE:
        s.efer = value
        flush_all(s)
    s.efer = value
    mode_changed(s)
    return True


def read_msr(s, index, value):
    """Read one register."""
    fixed: cython.int
    value[0] = 0
    if _absent(s, index):
        return False
    if index == 0x10:
        value[0] = tsc(s)
    elif index == 0x1B:
        value[0] = s.apic_base
    elif index == 0x3A and s.vmx != cython.NULL:
        value[0] = 5  # locked, VMX outside SMX
    elif index == 0x3B:
        value[0] = s.tsc_adjust
    elif index == 0x48:
        value[0] = s.spec_ctrl
    elif index == 0xFE:
        value[0] = 0x500 | MTRR_VARIABLE  # write-combining and fixed ranges
    elif index == 0x174:
        value[0] = s.sysenter_cs
    elif index == 0x175:
        value[0] = s.sysenter_esp
    elif index == 0x176:
        value[0] = s.sysenter_eip
    elif index == 0x17A:
        value[0] = s.mcg_status
    elif index == 0x1A0:
        value[0] = s.misc_enable
    elif index == 0x1D9:
        value[0] = s.debugctl
    elif index == 0x277:
        value[0] = s.pat
    elif index == 0x2FF:
        value[0] = s.mtrr_def_type
    elif 0x200 <= index < 0x200 + 2 * MTRR_VARIABLE:
        value[0] = s.mtrr_mask[(index - 0x200) >> 1] if index & 1 else s.mtrr_base[(index - 0x200) >> 1]
    elif index == 0x6E0:
        value[0] = s.tsc_deadline
    elif index == 0xDA0:  # IA32_XSS: there are no supervisor components
        return has_feature(s, _XSAVES)
    elif 0x480 <= index <= 0x491 and s.vmx != cython.NULL:
        return capability(s, index, value)
    elif index == cython.cast(uint64_t, 0xC0010114) and s.svm != cython.NULL:
        value[0] = svm_of(s).vm_cr
    elif index == cython.cast(uint64_t, 0xC0010117) and s.svm != cython.NULL:
        value[0] = svm_of(s).hsave
    elif index == cython.cast(uint64_t, 0xC0000104) and s.svm != cython.NULL:
        value[0] = svm_of(s).tsc_ratio or cython.cast(uint64_t, 1) << 32
    elif index == cython.cast(uint64_t, 0xC0000080):
        value[0] = s.efer
    elif index == cython.cast(uint64_t, 0xC0000081):
        value[0] = s.star
    elif index == cython.cast(uint64_t, 0xC0000082):
        value[0] = s.lstar
    elif index == cython.cast(uint64_t, 0xC0000083):
        value[0] = s.cstar
    elif index == cython.cast(uint64_t, 0xC0000084):
        value[0] = s.fmask
    elif index == cython.cast(uint64_t, 0xC0000100):
        value[0] = s.segs[FS].base
    elif index == cython.cast(uint64_t, 0xC0000101):
        value[0] = s.segs[GS].base
    elif index == cython.cast(uint64_t, 0xC0000102):
        value[0] = s.kernel_gs_base
    elif index == cython.cast(uint64_t, 0xC0000103):
        value[0] = s.tsc_aux
    elif (
        index == 0x17  # platform ID
        or index == 0x8B  # microcode revision
        or index == 0xCE  # platform information
        or index == 0x179  # machine-check capability: no banks
        or 0x1DB <= index <= 0x1DE  # last branch
        or index == 0x34  # SMI count
        or index == 0x10A  # architecture capabilities
        or index == cython.cast(uint64_t, 0xC0010015)
        or index == cython.cast(uint64_t, 0xC001001F)
        or index == cython.cast(uint64_t, 0xC0010140)
        or index == cython.cast(uint64_t, 0xC0010141)
    ):
        value[0] = 0
    else:
        fixed = _mtrr_fixed(index)
        if fixed < 0:
            return False
        value[0] = s.mtrr_fixed[fixed]
    return True


def write_msr(s, index, value):
    """Write one register."""
    fixed: cython.int
    now: uint64_t
    if _absent(s, index):
        return False
    if index == 0x10:
        now = tsc(s)
        s.tsc_adjust += value - now
        s.tsc_offset += value - now
    elif index == 0x1B:
        if (value & 0x2FF) or value >> s.physical_bits or ((value & 0xC00) == 0x400):
            return False
        s.apic_base = value
    elif index == 0x3B:
        s.tsc_offset += value - s.tsc_adjust
        s.tsc_adjust = value
    elif index == 0x48:
        if value & ~cython.cast(uint64_t, 7):
            return False
        s.spec_ctrl = value
    elif index == 0x49:
        return (value & ~cython.cast(uint64_t, 1)) == 0
    elif index == 0x79 or index == 0x8B:
        return True
    elif index == 0x1D9:
        if value >> 16:
            return False
        s.debugctl = value & DEBUGCTL_BTF  # nothing is recorded
    elif index == 0x174:
        s.sysenter_cs = value & cython.cast(uint64_t, 0xFFFFFFFF)
    elif index == 0x175:
        if not is_register_canonical(s, value):
            return False
        s.sysenter_esp = value
    elif index == 0x176:
        if not is_register_canonical(s, value):
            return False
        s.sysenter_eip = value
    elif index == 0x17A:
        s.mcg_status = value
    elif index == 0x1A0:
        s.misc_enable = value
    elif index == 0x277:
        if not _pat_valid(value):
            return False
        s.pat = value
    elif index == 0x2FF:
        if not _mtrr_valid(s, index, value):
            return False
        s.mtrr_def_type = value
    elif 0x200 <= index < 0x200 + 2 * MTRR_VARIABLE:
        if not _mtrr_valid(s, index, value):
            return False
        if index & 1:
            s.mtrr_mask[(index - 0x200) >> 1] = value
        else:
            s.mtrr_base[(index - 0x200) >> 1] = value
    elif index == 0x6E0:
        s.tsc_deadline = value
    elif index == 0xDA0:
        return has_feature(s, _XSAVES) and value == 0
    elif index == cython.cast(uint64_t, 0xC0000080):
        return write_efer(s, value)
    elif index == cython.cast(uint64_t, 0xC0010114) and s.svm != cython.NULL:
        return _write_vm_cr(s, value)
    elif index == cython.cast(uint64_t, 0xC0010117) and s.svm != cython.NULL:
        if value & 0xFFF or value >> s.physical_bits:
            return False
        svm_of(s).hsave = value
    elif index == cython.cast(uint64_t, 0xC0000104) and s.svm != cython.NULL:
        if value >> 40:
            return False
        svm_of(s).tsc_ratio = value
    elif index == cython.cast(uint64_t, 0xC0000081):
        s.star = value
    elif index == cython.cast(uint64_t, 0xC0000082):
        if not is_register_canonical(s, value):
            return False
        s.lstar = value
    elif index == cython.cast(uint64_t, 0xC0000083):
        if not is_register_canonical(s, value):
            return False
        s.cstar = value
    elif index == cython.cast(uint64_t, 0xC0000084):
        s.fmask = value & cython.cast(uint64_t, 0xFFFFFFFF)
    elif index == cython.cast(uint64_t, 0xC0000100) or index == cython.cast(uint64_t, 0xC0000101):
        if not is_register_canonical(s, value):
            return False
        s.segs[FS if index == cython.cast(uint64_t, 0xC0000100) else GS].base = value
    elif index == cython.cast(uint64_t, 0xC0000102):
        if not is_register_canonical(s, value):
            return False
        s.kernel_gs_base = value
    elif index == cython.cast(uint64_t, 0xC0000103):
        if value >> 32:
            return False
        s.tsc_aux = value
    else:
        fixed = _mtrr_fixed(index)
        if fixed < 0 or not _mtrr_valid(s, index, value):
            return False
        s.mtrr_fixed[fixed] = value
    return True
