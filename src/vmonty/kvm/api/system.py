"""The system file: /dev/kvm."""

from __future__ import annotations

import ctypes
import errno
from typing import Any

from vmonty.base.errors import KvmUnavailable
from vmonty.base.layout import flexible
from vmonty.kvm.api.device import Device
from vmonty.kvm.api.handle import Handle
from vmonty.kvm.api.lists import CpuidEntry, get_cpuid, msr_indices
from vmonty.kvm.api.provider import Provider
from vmonty.kvm.api.vm import Vm
from vmonty.kvm.uapi import Cap, Requests
from vmonty.kvm.uapi.flags import KVM_API_VERSION
from vmonty.kvm.uapi.vcpu import kvm_msrs


class System(Handle):
    """An open /dev/kvm: what this KVM can do, and the source of VMs.

    Raises KvmUnavailable when the API version is not 12, the only one there has been since Linux 2.6.22.
    """

    def __init__(self, provider: Provider) -> None:
        super().__init__(provider, provider.open())
        version = self.try_ioctl(Requests.KVM_GET_API_VERSION)
        if version != KVM_API_VERSION:
            self.close()
            raise KvmUnavailable(
                errno.ENODEV,
                "KVM_GET_API_VERSION",
                f"it answers {version}, not {KVM_API_VERSION}: no usable KVM",
            )
        # A constant of this KVM that every Vcpu needs.
        self.vcpu_mmap_size = self.ioctl(Requests.KVM_GET_VCPU_MMAP_SIZE)

    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12."""
        return self.ioctl(Requests.KVM_GET_API_VERSION)

    def create_vm(self, kind: int = 0) -> Vm:
        """KVM_CREATE_VM: a VM with no vCPUs and no memory. *kind* is KVM_X86_DEFAULT_VM (0) or another type.

        Raises KvmError with EINVAL for an unknown type.
        """
        return Vm(self.provider, self.ioctl(Requests.KVM_CREATE_VM, kind), self.vcpu_mmap_size)

    def capabilities(self) -> dict[Cap, int]:
        """Every capability this KVM has, with the number that KVM_CHECK_EXTENSION gives for it."""
        return {cap: value for cap in Cap if (value := self.check_extension(cap)) > 0}

    def msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs that are part of a vCPU's state."""
        return msr_indices(self, Requests.KVM_GET_MSR_INDEX_LIST)

    def msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs that tell features of the host (read with feature_msrs)."""
        return msr_indices(self, Requests.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def feature_msrs(self, indices: list[int]) -> dict[int, int]:
        """KVM_GET_MSRS on the system file: the values of feature MSRs; it stops at the first unknown one."""
        table: Any = flexible(kvm_msrs, len(indices))(nmsrs=len(indices))
        for entry, index in zip(table.entries, indices, strict=True):
            entry.index = index
        count = self.ioctl(Requests.KVM_GET_MSRS, table)
        return {entry.index: entry.data for entry in table.entries[:count]}

    def supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID: what a vCPU may be offered here."""
        return get_cpuid(self, Requests.KVM_GET_SUPPORTED_CPUID)

    def emulated_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_EMULATED_CPUID: features that work by emulation only."""
        return get_cpuid(self, Requests.KVM_GET_EMULATED_CPUID)

    def supported_hv_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_HV_CPUID: the Hyper-V leaves. Raises KvmError where there are none."""
        return get_cpuid(self, Requests.KVM_GET_SUPPORTED_HV_CPUID)

    def mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED: the bits of IA32_MCG_CAP that KVM_X86_SETUP_MCE takes."""
        return self.get(Requests.KVM_X86_GET_MCE_CAP_SUPPORTED, ctypes.c_uint64).value

    def get_device_attr(self, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR on the system file: one 64-bit attribute, such as KVM_X86_XCOMP_GUEST_SUPP."""
        return Device.read_attr(self, group, attr)

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR on the system file."""
        return Device.knows_attr(self, group, attr)
