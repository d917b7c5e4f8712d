"""Structures that guest and host share in guest memory (asm/kvm_para.h).

linux/kvm.h, asm/kvm.h
"""

from __future__ import annotations

from vmonty.base.layout import Structure, array, i64, layout, u8, u8s, u32, u32s, u64


@layout
class kvm_steal_time(Structure):
    steal: u64
    version: u32
    flags: u32
    preempted: u8
    u8_pad: u8s = array(3)
    pad: u32s = array(11)


@layout
class kvm_clock_pairing(Structure):
    sec: i64
    nsec: i64
    tsc: u64
    flags: u32
    pad: u32s = array(9)


@layout
class kvm_mmu_op_header(Structure):
    op: u32
    pad: u32


@layout
class kvm_mmu_op_write_pte(Structure):
    header: kvm_mmu_op_header
    pte_phys: u64
    pte_val: u64


@layout
class kvm_mmu_op_flush_tlb(Structure):
    header: kvm_mmu_op_header


@layout
class kvm_mmu_op_release_pt(Structure):
    header: kvm_mmu_op_header
    pt_phys: u64


@layout
class kvm_vcpu_pv_apf_data(Structure):
    flags: u32
    token: u32
    pad: u8s = array(56)
