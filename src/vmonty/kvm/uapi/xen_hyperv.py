"""Interfaces that let KVM pose as Xen or Hyper-V.

linux/kvm.h, asm/kvm.h
"""

from __future__ import annotations

from vmonty.base.layout import Structure, Union, array, i32, layout, u8, u8s, u16, u16s, u32, u32s, u64, u64s


@layout
class kvm_hyperv_exit_u_synic(Structure):
    msr: u32
    pad2: u32
    control: u64
    evt_page: u64
    msg_page: u64


@layout
class kvm_hyperv_exit_u_hcall(Structure):
    input: u64
    result: u64
    params: u64s = array(2)


@layout
class kvm_hyperv_exit_u_syndbg(Structure):
    msr: u32
    pad2: u32
    control: u64
    status: u64
    send_page: u64
    recv_page: u64
    pending_page: u64


@layout
class kvm_hyperv_exit_u(Union):
    synic: kvm_hyperv_exit_u_synic
    hcall: kvm_hyperv_exit_u_hcall
    syndbg: kvm_hyperv_exit_u_syndbg


@layout
class kvm_hyperv_exit(Structure):
    type: u32
    pad1: u32
    u: kvm_hyperv_exit_u


@layout
class kvm_xen_exit_u_hcall(Structure):
    longmode: u32
    cpl: u32
    input: u64
    result: u64
    params: u64s = array(6)


@layout
class kvm_xen_exit_u(Union):
    hcall: kvm_xen_exit_u_hcall


@layout
class kvm_xen_exit(Structure):
    type: u32
    u: kvm_xen_exit_u


@layout
class kvm_xen_hvm_config(Structure):
    flags: u32
    msr: u32
    blob_addr_32: u64
    blob_addr_64: u64
    blob_size_32: u8
    blob_size_64: u8
    pad2: u8s = array(30)


@layout
class kvm_xen_hvm_attr_u_shared_info(Union):
    gfn: u64
    hva: u64


@layout
class kvm_xen_hvm_attr_u_evtchn_deliver_port(Structure):
    port: u32
    vcpu: u32
    priority: u32


@layout
class kvm_xen_hvm_attr_u_evtchn_deliver_eventfd(Structure):
    port: u32
    fd: i32


@layout
class kvm_xen_hvm_attr_u_evtchn_deliver(Union):
    port: kvm_xen_hvm_attr_u_evtchn_deliver_port
    eventfd: kvm_xen_hvm_attr_u_evtchn_deliver_eventfd
    padding: u32s = array(4)


@layout
class kvm_xen_hvm_attr_u_evtchn(Structure):
    send_port: u32
    type: u32
    flags: u32
    deliver: kvm_xen_hvm_attr_u_evtchn_deliver


@layout
class kvm_xen_hvm_attr_u(Union):
    long_mode: u8
    vector: u8
    runstate_update_flag: u8
    shared_info: kvm_xen_hvm_attr_u_shared_info
    evtchn: kvm_xen_hvm_attr_u_evtchn
    xen_version: u32
    pad: u64s = array(8)


@layout
class kvm_xen_hvm_attr(Structure):
    type: u16
    pad: u16s = array(3)
    u: kvm_xen_hvm_attr_u


@layout
class kvm_xen_vcpu_attr_u_runstate(Structure):
    state: u64
    state_entry_time: u64
    time_running: u64
    time_runnable: u64
    time_blocked: u64
    time_offline: u64


@layout
class kvm_xen_vcpu_attr_u_timer(Structure):
    port: u32
    priority: u32
    expires_ns: u64


@layout
class kvm_xen_vcpu_attr_u(Union):
    gpa: u64
    hva: u64
    pad: u64s = array(8)
    runstate: kvm_xen_vcpu_attr_u_runstate
    vcpu_id: u32
    timer: kvm_xen_vcpu_attr_u_timer
    vector: u8


@layout
class kvm_xen_vcpu_attr(Structure):
    type: u16
    pad: u16s = array(3)
    u: kvm_xen_vcpu_attr_u


@layout
class kvm_hyperv_eventfd(Structure):
    conn_id: u32
    fd: i32
    flags: u32
    padding: u32s = array(3)
