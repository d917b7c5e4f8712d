"""Layouts that old kernels had; they give their ioctls their numbers.

linux/kvm.h, asm/kvm.h
"""

from __future__ import annotations

from vmonty.base.layout import Structure, array, layout, u16, u16s, u32, u32s, u64


@layout
class kvm_memory_alias(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    target_phys_addr: u64


@layout
class kvm_memory_region(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64


@layout
class kvm_assigned_pci_dev(Structure):
    assigned_dev_id: u32
    busnr: u32
    devfn: u32
    flags: u32
    segnr: u32
    reserved: u32s = array(11)


@layout
class kvm_assigned_irq(Structure):
    assigned_dev_id: u32
    host_irq: u32
    guest_irq: u32
    flags: u32
    reserved: u32s = array(12)


@layout
class kvm_assigned_msix_nr(Structure):
    assigned_dev_id: u32
    entry_nr: u16
    padding: u16


@layout
class kvm_assigned_msix_entry(Structure):
    assigned_dev_id: u32
    gsi: u32
    entry: u16
    padding: u16s = array(3)
