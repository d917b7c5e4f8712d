"""Arguments that memory does not hold to their end: every request that takes a struct must answer EFAULT.

The argument begins in a mapped page and ends behind it, one byte short.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from vmonty.base.ram import Ram
from vmonty.kvm.api import System, Vcpu, Vm
from vmonty.kvm.uapi import Ioctl, Requests
from vmonty.kvm.uapi.vm import kvm_dirty_log

VM = [
    Requests.KVM_SET_USER_MEMORY_REGION, Requests.KVM_GET_DIRTY_LOG, Requests.KVM_CLEAR_DIRTY_LOG,
    Requests.KVM_SET_IDENTITY_MAP_ADDR, Requests.KVM_IRQ_LINE, Requests.KVM_IRQ_LINE_STATUS, Requests.KVM_GET_IRQCHIP,
    Requests.KVM_SET_IRQCHIP, Requests.KVM_GET_PIT2, Requests.KVM_SET_PIT2, Requests.KVM_SET_GSI_ROUTING,
    Requests.KVM_IRQFD, Requests.KVM_IOEVENTFD, Requests.KVM_REGISTER_COALESCED_MMIO,
    Requests.KVM_UNREGISTER_COALESCED_MMIO, Requests.KVM_SIGNAL_MSI, Requests.KVM_GET_CLOCK, Requests.KVM_SET_CLOCK,
    Requests.KVM_CREATE_DEVICE, Requests.KVM_ENABLE_CAP, Requests.KVM_X86_SET_MSR_FILTER,
    Requests.KVM_SET_PMU_EVENT_FILTER,
]  # fmt: skip
VCPU = [
    Requests.KVM_GET_REGS, Requests.KVM_SET_REGS, Requests.KVM_GET_SREGS, Requests.KVM_SET_SREGS,
    Requests.KVM_TRANSLATE, Requests.KVM_GET_MSRS, Requests.KVM_SET_MSRS, Requests.KVM_SET_CPUID2,
    Requests.KVM_GET_CPUID2, Requests.KVM_SET_SIGNAL_MASK, Requests.KVM_GET_FPU, Requests.KVM_SET_FPU,
    Requests.KVM_GET_LAPIC, Requests.KVM_SET_LAPIC, Requests.KVM_GET_MP_STATE, Requests.KVM_SET_MP_STATE,
    Requests.KVM_GET_VCPU_EVENTS, Requests.KVM_SET_VCPU_EVENTS, Requests.KVM_GET_DEBUGREGS,
    Requests.KVM_SET_DEBUGREGS, Requests.KVM_GET_XSAVE, Requests.KVM_SET_XSAVE, Requests.KVM_GET_XCRS,
    Requests.KVM_SET_XCRS, Requests.KVM_SET_GUEST_DEBUG, Requests.KVM_ENABLE_CAP, Requests.KVM_X86_SETUP_MCE,
    Requests.KVM_X86_SET_MCE, Requests.KVM_TPR_ACCESS_REPORTING,
]  # fmt: skip
SYSTEM = [
    Requests.KVM_GET_MSR_INDEX_LIST, Requests.KVM_GET_SUPPORTED_CPUID, Requests.KVM_GET_EMULATED_CPUID,
    Requests.KVM_X86_GET_MCE_CAP_SUPPORTED, Requests.KVM_GET_MSRS,
]  # fmt: skip


@pytest.fixture(scope="module")
def fence() -> Iterator[int]:
    """The address behind the last byte of mapped memory: the page there may not be accessed."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    holder = ctypes.c_char.from_buffer(pages)
    boundary = ctypes.addressof(holder) + mmap.PAGESIZE
    for protection in (mmap.PROT_READ, 0):  # first only to see that mprotect works at all
        done = libc.mprotect(ctypes.c_void_p(boundary), ctypes.c_size_t(mmap.PAGESIZE), protection)
        assert done == 0, os.strerror(ctypes.get_errno())
    yield boundary
    del holder
    pages.close()


@pytest.mark.parametrize("number", VM, ids=repr)
def test_vm_argument_ends_too_early(vm: Vm, fence: int, number: Ioctl) -> None:
    vm.create_irqchip()
    vm.create_pit2()
    assert vm.try_ioctl(number, fence - number.size + 1) == -errno.EFAULT


@pytest.mark.parametrize("number", VCPU, ids=repr)
def test_vcpu_argument_ends_too_early(vm: Vm, fence: int, number: Ioctl) -> None:
    vm.create_irqchip()
    with vm.create_vcpu() as vcpu:
        assert vcpu.try_ioctl(number, fence - number.size + 1) == -errno.EFAULT


@pytest.mark.parametrize("number", SYSTEM, ids=repr)
def test_system_argument_ends_too_early(system: System, fence: int, number: Ioctl) -> None:
    assert system.try_ioctl(number, fence - number.size + 1) == -errno.EFAULT


@pytest.mark.parametrize("address", [0, 0xFFFF800000000000], ids=["null", "kernel"])
def test_argument_that_is_no_memory(vcpu: Vcpu, address: int) -> None:
    assert vcpu.try_ioctl(Requests.KVM_GET_REGS, address) == -errno.EFAULT


def test_buffer_shorter_than_the_request_says(vcpu: Vcpu) -> None:
    """The raw door notices it by itself."""
    assert vcpu.try_ioctl(Requests.KVM_GET_REGS, bytearray(Requests.KVM_GET_REGS.size - 1)) == -errno.EFAULT
    assert vcpu.try_ioctl(Requests.KVM_GET_REGS, bytearray(Requests.KVM_GET_REGS.size)) == 0


def test_list_whose_entries_end_too_early(vcpu: Vcpu, fence: int) -> None:
    """The count says two MSRs; the memory holds one."""
    header = ctypes.c_uint64.from_address(fence - 24)
    header.value = 2
    assert vcpu.try_ioctl(Requests.KVM_GET_MSRS, fence - 24) == -errno.EFAULT


def test_dirty_bitmap_that_is_no_memory(vm: Vm, ram: Ram, fence: int) -> None:
    vm.set_user_memory_region(0, 0, ram, flags=1)
    request = kvm_dirty_log(slot=0)
    request.u.dirty_bitmap = fence
    assert vm.try_ioctl(Requests.KVM_GET_DIRTY_LOG, request) == -errno.EFAULT
