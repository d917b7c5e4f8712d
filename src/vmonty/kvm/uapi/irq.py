"""Interrupt chips, the PIT, routing, MSI, irqfd and ioeventfd.

linux/kvm.h, asm/kvm.h
"""

from __future__ import annotations

from vmonty.base.layout import (
    Array,
    Structure,
    Union,
    array,
    bits,
    i8s,
    i32,
    i64,
    layout,
    u8,
    u8s,
    u16,
    u32,
    u32s,
    u64,
)


@layout
class kvm_pic_state(Structure):
    last_irr: u8
    irr: u8
    imr: u8
    isr: u8
    priority_add: u8
    irq_base: u8
    read_reg_select: u8
    poll: u8
    special_mask: u8
    init_state: u8
    auto_eoi: u8
    rotate_on_auto_eoi: u8
    special_fully_nested_mode: u8
    init4: u8
    elcr: u8
    elcr_mask: u8


@layout
class kvm_ioapic_state_redirtbl_fields(Structure):
    vector: u8
    delivery_mode: u8 = bits(3)
    dest_mode: u8 = bits(1)
    delivery_status: u8 = bits(1)
    polarity: u8 = bits(1)
    remote_irr: u8 = bits(1)
    trig_mode: u8 = bits(1)
    mask: u8 = bits(1)
    reserve: u8 = bits(7)
    reserved: u8s = array(4)
    dest_id: u8


@layout
class kvm_ioapic_state_redirtbl(Union):
    bits: u64
    fields: kvm_ioapic_state_redirtbl_fields


@layout
class kvm_ioapic_state(Structure):
    base_address: u64
    ioregsel: u32
    id: u32
    irr: u32
    pad: u32
    redirtbl: Array[kvm_ioapic_state_redirtbl] = array(24)


@layout
class kvm_lapic_state(Structure):
    regs: i8s = array(1024)


@layout
class kvm_pit_channel_state(Structure):
    count: u32
    latched_count: u16
    count_latched: u8
    status_latched: u8
    status: u8
    read_state: u8
    write_state: u8
    write_latch: u8
    rw_mode: u8
    mode: u8
    bcd: u8
    gate: u8
    count_load_time: i64


@layout
class kvm_pit_state(Structure):
    channels: Array[kvm_pit_channel_state] = array(3)


@layout
class kvm_pit_state2(Structure):
    channels: Array[kvm_pit_channel_state] = array(3)
    flags: u32
    reserved: u32s = array(9)


@layout
class kvm_reinject_control(Structure):
    pit_reinject: u8
    reserved: u8s = array(31)


@layout
class kvm_irq_level_u(Union):
    irq: u32
    status: i32


@layout
class kvm_irq_level(Structure):
    _anonymous_ = ("u",)
    u: kvm_irq_level_u
    level: u32


@layout
class kvm_irqchip_chip(Union):
    dummy: i8s = array(512)
    pic: kvm_pic_state
    ioapic: kvm_ioapic_state


@layout
class kvm_irqchip(Structure):
    chip_id: u32
    pad: u32
    chip: kvm_irqchip_chip


@layout
class kvm_pit_config(Structure):
    flags: u32
    pad: u32s = array(15)


@layout
class kvm_vapic_addr(Structure):
    vapic_addr: u64


@layout
class kvm_ioeventfd(Structure):
    datamatch: u64
    addr: u64
    len: u32
    fd: i32
    flags: u32
    pad: u8s = array(36)


@layout
class kvm_irq_routing_irqchip(Structure):
    irqchip: u32
    pin: u32


@layout
class kvm_irq_routing_msi_u(Union):
    pad: u32
    devid: u32


@layout
class kvm_irq_routing_msi(Structure):
    _anonymous_ = ("u",)
    address_lo: u32
    address_hi: u32
    data: u32
    u: kvm_irq_routing_msi_u


@layout
class kvm_irq_routing_hv_sint(Structure):
    vcpu: u32
    sint: u32


@layout
class kvm_irq_routing_xen_evtchn(Structure):
    port: u32
    vcpu: u32
    priority: u32


@layout
class kvm_irq_routing_entry_u(Union):
    irqchip: kvm_irq_routing_irqchip
    msi: kvm_irq_routing_msi
    hv_sint: kvm_irq_routing_hv_sint
    xen_evtchn: kvm_irq_routing_xen_evtchn
    pad: u32s = array(8)


@layout
class kvm_irq_routing_entry(Structure):
    gsi: u32
    type: u32
    flags: u32
    pad: u32
    u: kvm_irq_routing_entry_u


@layout
class kvm_irq_routing(Structure):
    nr: u32
    flags: u32
    entries: Array[kvm_irq_routing_entry] = array(0)


@layout
class kvm_irqfd(Structure):
    fd: u32
    gsi: u32
    flags: u32
    resamplefd: u32
    pad: u8s = array(16)


@layout
class kvm_msi(Structure):
    address_lo: u32
    address_hi: u32
    data: u32
    flags: u32
    devid: u32
    pad: u8s = array(12)
