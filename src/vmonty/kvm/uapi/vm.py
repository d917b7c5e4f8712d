"""What belongs to a VM: memory slots, dirty logs, filters, devices, clock, statistics.

linux/kvm.h, asm/kvm.h
"""

from __future__ import annotations

from vmonty.base.layout import (
    Array,
    Structure,
    Union,
    array,
    i8s,
    i16,
    layout,
    u8s,
    u16,
    u32,
    u32s,
    u64,
    u64s,
)


@layout
class kvm_msr_list(Structure):
    nmsrs: u32
    indices: u32s = array(0)


@layout
class kvm_msr_filter_range(Structure):
    flags: u32
    nmsrs: u32
    base: u32
    bitmap: u64  # a pointer


@layout
class kvm_msr_filter(Structure):
    flags: u32
    ranges: Array[kvm_msr_filter_range] = array(16)


@layout
class kvm_pmu_event_filter(Structure):
    action: u32
    nevents: u32
    fixed_counter_bitmap: u32
    flags: u32
    pad: u32s = array(4)
    events: u64s = array(0)


@layout
class kvm_userspace_memory_region(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64


@layout
class kvm_dirty_log_u(Union):
    dirty_bitmap: u64  # a pointer
    padding2: u64


@layout
class kvm_dirty_log(Structure):
    _anonymous_ = ("u",)
    slot: u32
    padding1: u32
    u: kvm_dirty_log_u


@layout
class kvm_clear_dirty_log_u(Union):
    dirty_bitmap: u64  # a pointer
    padding2: u64


@layout
class kvm_clear_dirty_log(Structure):
    _anonymous_ = ("u",)
    slot: u32
    num_pages: u32
    first_page: u64
    u: kvm_clear_dirty_log_u


@layout
class kvm_enable_cap(Structure):
    cap: u32
    flags: u32
    args: u64s = array(4)
    pad: u8s = array(64)


@layout
class kvm_clock_data(Structure):
    clock: u64
    flags: u32
    pad0: u32
    realtime: u64
    host_tsc: u64
    pad: u32s = array(4)


@layout
class kvm_create_device(Structure):
    type: u32
    fd: u32
    flags: u32


@layout
class kvm_device_attr(Structure):
    flags: u32
    group: u32
    attr: u64
    addr: u64


@layout
class kvm_enc_region(Structure):
    addr: u64
    size: u64


@layout
class kvm_stats_header(Structure):
    flags: u32
    name_size: u32
    num_desc: u32
    id_offset: u32
    desc_offset: u32
    data_offset: u32


@layout
class kvm_stats_desc(Structure):
    flags: u32
    exponent: i16
    size: u16
    offset: u32
    bucket_size: u32
    name: i8s = array(0)


@layout
class kvm_userspace_memory_region2(Structure):
    slot: u32
    flags: u32
    guest_phys_addr: u64
    memory_size: u64
    userspace_addr: u64
    guest_memfd_offset: u64
    guest_memfd: u32
    pad1: u32
    pad2: u64s = array(14)


@layout
class kvm_memory_attributes(Structure):
    address: u64
    size: u64
    attributes: u64
    flags: u64


@layout
class kvm_create_guest_memfd(Structure):
    size: u64
    flags: u64
    reserved: u64s = array(6)


@layout
class kvm_pre_fault_memory(Structure):
    gpa: u64
    size: u64
    flags: u64
    padding: u64s = array(5)
