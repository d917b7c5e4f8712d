"""The kvm_run page that a vCPU shares with user space, and the rings mapped next to it.

linux/kvm.h, asm/kvm.h
"""

from __future__ import annotations

from vmonty.base.layout import Array, Structure, Union, array, i8s, layout, u8, u8s, u16, u32, u64, u64s
from vmonty.kvm.uapi.vcpu import kvm_debug_exit_arch, kvm_regs, kvm_sregs, kvm_vcpu_events
from vmonty.kvm.uapi.xen_hyperv import kvm_hyperv_exit, kvm_xen_exit


@layout
class kvm_exit_snp_req_certs(Structure):
    gpa: u64
    npages: u64
    ret: u64


@layout
class kvm_sync_regs(Structure):
    regs: kvm_regs
    sregs: kvm_sregs
    events: kvm_vcpu_events


@layout
class kvm_run_u_hw(Structure):
    hardware_exit_reason: u64


@layout
class kvm_run_u_fail_entry(Structure):
    hardware_entry_failure_reason: u64
    cpu: u32


@layout
class kvm_run_u_ex(Structure):
    exception: u32
    error_code: u32


@layout
class kvm_run_u_io(Structure):
    direction: u8
    size: u8
    port: u16
    count: u32
    data_offset: u64


@layout
class kvm_run_u_debug(Structure):
    arch: kvm_debug_exit_arch


@layout
class kvm_run_u_mmio(Structure):
    phys_addr: u64
    data: u8s = array(8)
    len: u32
    is_write: u8


@layout
class kvm_run_u_hypercall_u(Union):
    longmode: u32
    flags: u64


@layout
class kvm_run_u_hypercall(Structure):
    _anonymous_ = ("u",)
    nr: u64
    args: u64s = array(6)
    ret: u64
    u: kvm_run_u_hypercall_u


@layout
class kvm_run_u_tpr_access(Structure):
    rip: u64
    is_write: u32
    pad: u32


@layout
class kvm_run_u_internal(Structure):
    suberror: u32
    ndata: u32
    data: u64s = array(16)


@layout
class kvm_run_u_emulation_failure_u_u(Structure):
    insn_size: u8
    insn_bytes: u8s = array(15)


@layout
class kvm_run_u_emulation_failure_u(Union):
    _anonymous_ = ("u",)
    u: kvm_run_u_emulation_failure_u_u


@layout
class kvm_run_u_emulation_failure(Structure):
    _anonymous_ = ("u",)
    suberror: u32
    ndata: u32
    flags: u64
    u: kvm_run_u_emulation_failure_u


@layout
class kvm_run_u_system_event_u(Union):
    flags: u64
    data: u64s = array(16)


@layout
class kvm_run_u_system_event(Structure):
    _anonymous_ = ("u",)
    type: u32
    ndata: u32
    u: kvm_run_u_system_event_u


@layout
class kvm_run_u_eoi(Structure):
    vector: u8


@layout
class kvm_run_u_msr(Structure):
    error: u8
    pad: u8s = array(7)
    reason: u32
    index: u32
    data: u64


@layout
class kvm_run_u_notify(Structure):
    flags: u32


@layout
class kvm_run_u_memory_fault(Structure):
    flags: u64
    gpa: u64
    size: u64


@layout
class kvm_run_u_tdx_u_unknown(Structure):
    ret: u64
    data: u64s = array(5)


@layout
class kvm_run_u_tdx_u_get_quote(Structure):
    ret: u64
    gpa: u64
    size: u64


@layout
class kvm_run_u_tdx_u_get_tdvmcall_info(Structure):
    ret: u64
    leaf: u64
    r11: u64
    r12: u64
    r13: u64
    r14: u64


@layout
class kvm_run_u_tdx_u_setup_event_notify(Structure):
    ret: u64
    vector: u64


@layout
class kvm_run_u_tdx_u(Union):
    unknown: kvm_run_u_tdx_u_unknown
    get_quote: kvm_run_u_tdx_u_get_quote
    get_tdvmcall_info: kvm_run_u_tdx_u_get_tdvmcall_info
    setup_event_notify: kvm_run_u_tdx_u_setup_event_notify


@layout
class kvm_run_u_tdx(Structure):
    _anonymous_ = ("u",)
    flags: u64
    nr: u64
    u: kvm_run_u_tdx_u


@layout
class kvm_run_u(Union):
    hw: kvm_run_u_hw
    fail_entry: kvm_run_u_fail_entry
    ex: kvm_run_u_ex
    io: kvm_run_u_io
    debug: kvm_run_u_debug
    mmio: kvm_run_u_mmio
    hypercall: kvm_run_u_hypercall
    tpr_access: kvm_run_u_tpr_access
    internal: kvm_run_u_internal
    emulation_failure: kvm_run_u_emulation_failure
    system_event: kvm_run_u_system_event
    eoi: kvm_run_u_eoi
    hyperv: kvm_hyperv_exit
    msr: kvm_run_u_msr
    xen: kvm_xen_exit
    notify: kvm_run_u_notify
    memory_fault: kvm_run_u_memory_fault
    tdx: kvm_run_u_tdx
    snp_req_certs: kvm_exit_snp_req_certs
    padding: i8s = array(256)


@layout
class kvm_run_s(Union):
    regs: kvm_sync_regs
    padding: i8s = array(2048)


@layout
class kvm_run(Structure):
    _anonymous_ = ("u",)
    request_interrupt_window: u8
    immediate_exit: u8
    padding1: u8s = array(6)
    exit_reason: u32
    ready_for_interrupt_injection: u8
    if_flag: u8
    flags: u16
    cr8: u64
    apic_base: u64
    u: kvm_run_u
    kvm_valid_regs: u64
    kvm_dirty_regs: u64
    s: kvm_run_s


@layout
class kvm_coalesced_mmio_zone_u(Union):
    pad: u32
    pio: u32


@layout
class kvm_coalesced_mmio_zone(Structure):
    _anonymous_ = ("u",)
    addr: u64
    size: u32
    u: kvm_coalesced_mmio_zone_u


@layout
class kvm_coalesced_mmio_u(Union):
    pad: u32
    pio: u32


@layout
class kvm_coalesced_mmio(Structure):
    _anonymous_ = ("u",)
    phys_addr: u64
    len: u32
    u: kvm_coalesced_mmio_u
    data: u8s = array(8)


@layout
class kvm_coalesced_mmio_ring(Structure):
    first: u32
    last: u32
    coalesced_mmio: Array[kvm_coalesced_mmio] = array(0)


@layout
class kvm_dirty_gfn(Structure):
    flags: u32
    slot: u32
    offset: u64
