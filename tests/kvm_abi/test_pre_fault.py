"""KVM_PRE_FAULT_MEMORY. Source: api.rst, 4.143."""

from __future__ import annotations

import errno

import pytest

from vmonty.kvm.api import Vcpu
from vmonty.kvm.uapi import Cap, Requests
from vmonty.kvm.uapi.vm import kvm_pre_fault_memory
from vmonty.testing.guests import RAM_SIZE

from .refusals import refused

pytestmark = pytest.mark.needs(Cap.PRE_FAULT_MEMORY)


def test_a_range_is_done_and_told(vcpu: Vcpu) -> None:
    request = kvm_pre_fault_memory(gpa=0, size=0x4000)
    vcpu.ioctl(Requests.KVM_PRE_FAULT_MEMORY, request)
    assert (request.gpa, request.size) == (0x4000, 0)


def test_it_ends_where_the_memory_ends(vcpu: Vcpu) -> None:
    request = kvm_pre_fault_memory(gpa=RAM_SIZE - 0x2000, size=0x4000)
    vcpu.ioctl(Requests.KVM_PRE_FAULT_MEMORY, request)
    assert (request.gpa, request.size) == (RAM_SIZE, 0x2000)
    with refused(errno.ENOENT):
        vcpu.ioctl(Requests.KVM_PRE_FAULT_MEMORY, request)


@pytest.mark.parametrize(("gpa", "size", "flags"), [(1, 0x1000, 0), (0, 0x800, 0), (0, 0, 0), (0, 0x1000, 1)])
def test_bad_ranges(vcpu: Vcpu, gpa: int, size: int, flags: int) -> None:
    with refused(errno.EINVAL):
        vcpu.ioctl(Requests.KVM_PRE_FAULT_MEMORY, kvm_pre_fault_memory(gpa=gpa, size=size, flags=flags))
