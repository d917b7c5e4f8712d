"""The TSCs of a VM agree, unless somebody means otherwise. Source: arch/x86/kvm/x86.c: kvm_synchronize_tsc()."""

from __future__ import annotations

import time

import pytest

from vmonty import kvm
from vmonty.kvm.soft.clock import TscWrites
from vmonty.kvm.uapi.flags import KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET

KHZ = 2_000_000
SECOND_NS = 10**9


@pytest.mark.parametrize(
    ("after_ns", "value", "khz", "agrees"),
    [
        (5 * SECOND_NS, 0, KHZ, True),  # a vCPU that is plugged
        (SECOND_NS, 1000 + KHZ * 1000, KHZ, True),
        (SECOND_NS, 1000 + KHZ * 1990, KHZ, True),
        (SECOND_NS, 1000 + KHZ * 2010, KHZ, False),
        (2 * SECOND_NS, 1000 + KHZ * 1010, KHZ, True),
        (2 * SECOND_NS, 1000 + KHZ * 990, KHZ, False),
        (0, 0, KHZ + 1, False),
    ],
)
def test_what_is_meant_to_agree(after_ns: int, value: int, khz: int, agrees: bool) -> None:
    writes = TscWrites()
    with writes as last:
        assert last.agree(KHZ, 1000, 7, offset=111) == 111
        assert last.agree(khz, value, 7 + after_ns, offset=222) == (111 if agrees else 222)


def test_what_user_space_sets_first_is_what_it_means() -> None:
    """The beginning of a vCPU is nothing that it could mean to agree with: a guest that was saved young."""
    writes = TscWrites()
    with writes as last:
        assert last.agree(KHZ, 0, 7, offset=111) == 111
        assert last.agree(KHZ, KHZ * 600, 8, offset=222) == 222
        assert last.agree(KHZ, KHZ * 601, 9, offset=333) == 222
        assert last.agree(KHZ, 0, SECOND_NS, offset=444) == 222


def test_vcpus_that_are_created_one_after_another() -> None:
    with kvm.open("soft") as system, system.create_vm() as vm:
        offsets = set()
        for number in range(3):
            with vm.create_vcpu(number) as vcpu:
                offsets.add(vcpu.get_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET))
            time.sleep(0.01)
        assert len(offsets) == 1
