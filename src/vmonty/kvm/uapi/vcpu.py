"""State of a vCPU: registers, MSRs, CPUID, FPU, events, debug.

linux/kvm.h, asm/kvm.h
"""

from __future__ import annotations

from vmonty.base.layout import Array, Structure, array, layout, u8, u8s, u16, u16s, u32, u32s, u64, u64s


@layout
class kvm_regs(Structure):
    rax: u64
    rbx: u64
    rcx: u64
    rdx: u64
    rsi: u64
    rdi: u64
    rsp: u64
    rbp: u64
    r8: u64
    r9: u64
    r10: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64
    r15: u64
    rip: u64
    rflags: u64


@layout
class kvm_segment(Structure):
    base: u64
    limit: u32
    selector: u16
    type: u8
    present: u8
    dpl: u8
    db: u8
    s: u8
    l: u8
    g: u8
    avl: u8
    unusable: u8
    padding: u8


@layout
class kvm_dtable(Structure):
    base: u64
    limit: u16
    padding: u16s = array(3)


@layout
class kvm_sregs(Structure):
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    interrupt_bitmap: u64s = array(4)


@layout
class kvm_sregs2(Structure):
    cs: kvm_segment
    ds: kvm_segment
    es: kvm_segment
    fs: kvm_segment
    gs: kvm_segment
    ss: kvm_segment
    tr: kvm_segment
    ldt: kvm_segment
    gdt: kvm_dtable
    idt: kvm_dtable
    cr0: u64
    cr2: u64
    cr3: u64
    cr4: u64
    cr8: u64
    efer: u64
    apic_base: u64
    flags: u64
    pdptrs: u64s = array(4)


@layout
class kvm_fpu(Structure):
    fpr: Array[u8s] = array(8, 16)
    fcw: u16
    fsw: u16
    ftwx: u8
    pad1: u8
    last_opcode: u16
    last_ip: u64
    last_dp: u64
    xmm: Array[u8s] = array(16, 16)
    mxcsr: u32
    pad2: u32


@layout
class kvm_msr_entry(Structure):
    index: u32
    reserved: u32
    data: u64


@layout
class kvm_msrs(Structure):
    nmsrs: u32
    pad: u32
    entries: Array[kvm_msr_entry] = array(0)


@layout
class kvm_cpuid_entry(Structure):
    function: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: u32


@layout
class kvm_cpuid(Structure):
    nent: u32
    padding: u32
    entries: Array[kvm_cpuid_entry] = array(0)


@layout
class kvm_cpuid_entry2(Structure):
    function: u32
    index: u32
    flags: u32
    eax: u32
    ebx: u32
    ecx: u32
    edx: u32
    padding: u32s = array(3)


@layout
class kvm_cpuid2(Structure):
    nent: u32
    padding: u32
    entries: Array[kvm_cpuid_entry2] = array(0)


@layout
class kvm_debug_exit_arch(Structure):
    exception: u32
    pad: u32
    pc: u64
    dr6: u64
    dr7: u64


@layout
class kvm_guest_debug_arch(Structure):
    debugreg: u64s = array(8)


@layout
class kvm_vcpu_events_exception(Structure):
    injected: u8
    nr: u8
    has_error_code: u8
    pending: u8
    error_code: u32


@layout
class kvm_vcpu_events_interrupt(Structure):
    injected: u8
    nr: u8
    soft: u8
    shadow: u8


@layout
class kvm_vcpu_events_nmi(Structure):
    injected: u8
    pending: u8
    masked: u8
    pad: u8


@layout
class kvm_vcpu_events_smi(Structure):
    smm: u8
    pending: u8
    smm_inside_nmi: u8
    latched_init: u8


@layout
class kvm_vcpu_events_triple_fault(Structure):
    pending: u8


@layout
class kvm_vcpu_events(Structure):
    exception: kvm_vcpu_events_exception
    interrupt: kvm_vcpu_events_interrupt
    nmi: kvm_vcpu_events_nmi
    sipi_vector: u32
    flags: u32
    smi: kvm_vcpu_events_smi
    triple_fault: kvm_vcpu_events_triple_fault
    reserved: u8s = array(26)
    exception_has_payload: u8
    exception_payload: u64


@layout
class kvm_debugregs(Structure):
    db: u64s = array(4)
    dr6: u64
    dr7: u64
    flags: u64
    reserved: u64s = array(9)


@layout
class kvm_xsave(Structure):
    region: u32s = array(1024)
    extra: u32s = array(0)


@layout
class kvm_xcr(Structure):
    xcr: u32
    reserved: u32
    value: u64


@layout
class kvm_xcrs(Structure):
    nr_xcrs: u32
    flags: u32
    xcrs: Array[kvm_xcr] = array(16)
    padding: u64s = array(16)


@layout
class kvm_translation(Structure):
    linear_address: u64
    physical_address: u64
    valid: u8
    writeable: u8
    usermode: u8
    pad: u8s = array(5)


@layout
class kvm_interrupt(Structure):
    irq: u32


@layout
class kvm_signal_mask(Structure):
    len: u32
    sigset: u8s = array(0)


@layout
class kvm_tpr_access_ctl(Structure):
    enabled: u32
    flags: u32
    reserved: u32s = array(8)


@layout
class kvm_mp_state(Structure):
    mp_state: u32


@layout
class kvm_guest_debug(Structure):
    control: u32
    pad: u32
    arch: kvm_guest_debug_arch


@layout
class kvm_x86_mce(Structure):
    status: u64
    addr: u64
    misc: u64
    mcg_status: u64
    bank: u8
    pad1: u8s = array(7)
    pad2: u64s = array(3)


@layout
class kvm_reg_list(Structure):
    n: u64
    reg: u64s = array(0)


@layout
class kvm_one_reg(Structure):
    id: u64
    addr: u64
