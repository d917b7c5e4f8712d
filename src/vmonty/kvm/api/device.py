"""Device fds (KVM_CREATE_DEVICE), and the attribute requests that VMs, vCPUs and the system answer too."""

from __future__ import annotations

import ctypes

from vmonty.kvm.api.handle import Handle
from vmonty.kvm.uapi import Requests
from vmonty.kvm.uapi.vm import kvm_device_attr


class Device(Handle):
    """A device inside KVM, made by Vm.create_device."""

    @staticmethod
    def read_attr(handle: Handle, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR on *handle*: a 64-bit attribute. Raises KvmError with ENXIO when it is unknown."""
        value = ctypes.c_uint64()
        handle.ioctl(
            Requests.KVM_GET_DEVICE_ATTR,
            kvm_device_attr(group=group, attr=attr, addr=ctypes.addressof(value)),
        )
        return value.value

    @staticmethod
    def write_attr(handle: Handle, group: int, attr: int, value: int) -> None:
        """KVM_SET_DEVICE_ATTR on *handle*: set a 64-bit attribute. Raises KvmError with ENXIO when it is unknown."""
        cell = ctypes.c_uint64(value)
        handle.ioctl(Requests.KVM_SET_DEVICE_ATTR, kvm_device_attr(group=group, attr=attr, addr=ctypes.addressof(cell)))

    @staticmethod
    def knows_attr(handle: Handle, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR on *handle*."""
        return handle.try_ioctl(Requests.KVM_HAS_DEVICE_ATTR, kvm_device_attr(group=group, attr=attr)) == 0

    def get_attr(self, group: int, attr: int) -> int:
        """KVM_GET_DEVICE_ATTR: see read_attr."""
        return Device.read_attr(self, group, attr)

    def set_attr(self, group: int, attr: int, value: int) -> None:
        """KVM_SET_DEVICE_ATTR: see write_attr."""
        Device.write_attr(self, group, attr, value)

    def has_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR: see knows_attr."""
        return Device.knows_attr(self, group, attr)
