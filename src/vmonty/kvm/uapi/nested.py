"""State of nested virtualization.

linux/kvm.h, asm/kvm.h
"""

from __future__ import annotations

from vmonty.base.layout import Array, Structure, Union, array, layout, u8s, u16, u32, u64


@layout
class kvm_vmx_nested_state_data(Structure):
    vmcs12: u8s = array(4096)
    shadow_vmcs12: u8s = array(4096)


@layout
class kvm_vmx_nested_state_hdr_smm(Structure):
    flags: u16


@layout
class kvm_vmx_nested_state_hdr(Structure):
    vmxon_pa: u64
    vmcs12_pa: u64
    smm: kvm_vmx_nested_state_hdr_smm
    pad: u16
    flags: u32
    preemption_timer_deadline: u64


@layout
class kvm_svm_nested_state_data(Structure):
    vmcb12: u8s = array(4096)


@layout
class kvm_svm_nested_state_hdr(Structure):
    vmcb_pa: u64
    gpat: u64


@layout
class kvm_nested_state_hdr(Union):
    vmx: kvm_vmx_nested_state_hdr
    svm: kvm_svm_nested_state_hdr
    pad: u8s = array(120)


@layout
class kvm_nested_state_data(Union):
    vmx: Array[kvm_vmx_nested_state_data] = array(0)
    svm: Array[kvm_svm_nested_state_data] = array(0)


@layout
class kvm_nested_state(Structure):
    flags: u16
    format: u16
    size: u32
    hdr: kvm_nested_state_hdr
    data: kvm_nested_state_data
