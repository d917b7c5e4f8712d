"""SEV, SEV-SNP and TDX commands.

linux/kvm.h, asm/kvm.h
"""

from __future__ import annotations

from vmonty.base.layout import Structure, array, layout, u8, u8s, u16, u32, u32s, u64, u64s
from vmonty.kvm.uapi.vcpu import kvm_cpuid2


@layout
class kvm_sev_cmd(Structure):
    id: u32
    pad0: u32
    data: u64
    error: u32
    sev_fd: u32


@layout
class kvm_sev_launch_start(Structure):
    handle: u32
    policy: u32
    dh_uaddr: u64
    dh_len: u32
    pad0: u32
    session_uaddr: u64
    session_len: u32
    pad1: u32


@layout
class kvm_sev_launch_update_data(Structure):
    uaddr: u64
    len: u32
    pad0: u32


@layout
class kvm_sev_launch_secret(Structure):
    hdr_uaddr: u64
    hdr_len: u32
    pad0: u32
    guest_uaddr: u64
    guest_len: u32
    pad1: u32
    trans_uaddr: u64
    trans_len: u32
    pad2: u32


@layout
class kvm_sev_launch_measure(Structure):
    uaddr: u64
    len: u32
    pad0: u32


@layout
class kvm_sev_guest_status(Structure):
    handle: u32
    policy: u32
    state: u32


@layout
class kvm_sev_dbg(Structure):
    src_uaddr: u64
    dst_uaddr: u64
    len: u32
    pad0: u32


@layout
class kvm_sev_attestation_report(Structure):
    mnonce: u8s = array(16)
    uaddr: u64
    len: u32
    pad0: u32


@layout
class kvm_sev_send_start(Structure):
    policy: u32
    pad0: u32
    pdh_cert_uaddr: u64
    pdh_cert_len: u32
    pad1: u32
    plat_certs_uaddr: u64
    plat_certs_len: u32
    pad2: u32
    amd_certs_uaddr: u64
    amd_certs_len: u32
    pad3: u32
    session_uaddr: u64
    session_len: u32
    pad4: u32


@layout
class kvm_sev_send_update_data(Structure):
    hdr_uaddr: u64
    hdr_len: u32
    pad0: u32
    guest_uaddr: u64
    guest_len: u32
    pad1: u32
    trans_uaddr: u64
    trans_len: u32
    pad2: u32


@layout
class kvm_sev_receive_start(Structure):
    handle: u32
    policy: u32
    pdh_uaddr: u64
    pdh_len: u32
    pad0: u32
    session_uaddr: u64
    session_len: u32
    pad1: u32


@layout
class kvm_sev_receive_update_data(Structure):
    hdr_uaddr: u64
    hdr_len: u32
    pad0: u32
    guest_uaddr: u64
    guest_len: u32
    pad1: u32
    trans_uaddr: u64
    trans_len: u32
    pad2: u32


@layout
class kvm_sev_init(Structure):
    vmsa_features: u64
    flags: u32
    ghcb_version: u16
    pad1: u16
    pad2: u32s = array(8)


@layout
class kvm_sev_snp_launch_start(Structure):
    policy: u64
    gosvw: u8s = array(16)
    flags: u16
    pad0: u8s = array(6)
    pad1: u64s = array(4)


@layout
class kvm_sev_snp_launch_update(Structure):
    gfn_start: u64
    uaddr: u64
    len: u64
    type: u8
    pad0: u8
    flags: u16
    pad1: u32
    pad2: u64s = array(4)


@layout
class kvm_sev_snp_launch_finish(Structure):
    id_block_uaddr: u64
    id_auth_uaddr: u64
    id_block_en: u8
    auth_key_en: u8
    vcek_disabled: u8
    host_data: u8s = array(32)
    pad0: u8s = array(3)
    flags: u16
    pad1: u64s = array(4)


@layout
class kvm_tdx_cmd(Structure):
    id: u32
    flags: u32
    data: u64
    hw_error: u64


@layout
class kvm_tdx_capabilities(Structure):
    supported_attrs: u64
    supported_xfam: u64
    kernel_tdvmcallinfo_1_r11: u64
    user_tdvmcallinfo_1_r11: u64
    kernel_tdvmcallinfo_1_r12: u64
    user_tdvmcallinfo_1_r12: u64
    reserved: u64s = array(250)
    cpuid: kvm_cpuid2


@layout
class kvm_tdx_init_vm(Structure):
    attributes: u64
    xfam: u64
    mrconfigid: u64s = array(6)
    mrowner: u64s = array(6)
    mrownerconfig: u64s = array(6)
    reserved: u64s = array(12)
    cpuid: kvm_cpuid2


@layout
class kvm_tdx_init_mem_region(Structure):
    source_addr: u64
    gpa: u64
    nr_pages: u64
