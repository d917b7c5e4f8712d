"""Binary statistics. Source: api.rst, KVM_GET_STATS_FD."""

from __future__ import annotations

import errno
import itertools
import os

import pytest

from vmonty.kvm.api import Stats, System, Vcpu, Vm
from vmonty.kvm.uapi import Cap
from vmonty.testing.guests import Mode, TinyGuest

from .refusals import refused

needs_stats = pytest.mark.needs(Cap.BINARY_STATS_FD)


@needs_stats
def test_vm_statistics(configured: Vm) -> None:
    with configured.stats() as stats:
        assert stats.id.startswith("kvm-")
        names = {entry.name for entry in stats.descriptors}
        assert {"remote_tlb_flush", "max_mmu_page_hash_collisions"} <= names
        assert stats.read().keys() == names


@pytest.mark.known_gap("io-exits")
@needs_stats
def test_vcpu_exits_are_counted(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "again: out 0x10, al\n jmp again")
    with guest.vcpu.stats() as stats:
        before = stats.read()
        guest.outs(10)
        after = stats.read()
    assert isinstance(after["io_exits"], int)
    assert isinstance(before["io_exits"], int)
    assert after["exits"] >= before["exits"]
    assert before["io_exits"] == 0
    assert after["io_exits"] == 10


@needs_stats
def test_descriptors(vcpu: Vcpu) -> None:
    """Every value lies behind the other; units and exponents are those of the format."""
    with vcpu.stats() as stats:
        offsets = sorted((entry.offset, entry.size) for entry in stats.descriptors)
        for (offset, size), (following, _) in itertools.pairwise(offsets):
            assert offset + 8 * size <= following
        by_name = {entry.name: entry for entry in stats.descriptors}
        assert (by_name["exits"].unit, by_name["exits"].exponent, by_name["exits"].size) == ("", 0, 1)
        wait = by_name["halt_wait_ns"]
        assert (wait.unit, wait.base, wait.exponent) == ("seconds", 10, -9)
        histogram = by_name["halt_wait_hist"]
        assert histogram.size > 1
        assert histogram.kind in (3, 4)
        assert len(stats.read()["halt_wait_hist"]) == histogram.size  # type: ignore[arg-type]


@needs_stats
def test_closed(vcpu: Vcpu) -> None:
    stats = vcpu.stats()
    fd = stats.fileno()
    assert os.fstat(fd)
    stats.close()
    stats.close()
    with pytest.raises(OSError) as caught:
        os.fstat(fd)
    assert caught.value.errno == errno.EBADF


@needs_stats
def test_statistics_outlive_their_vcpu(guest: TinyGuest) -> None:
    guest.load(Mode.LONG, "out 0x10, al\n out 0x10, al")
    guest.outs(2)
    stats: Stats = guest.vcpu.stats()
    before = stats.read()
    guest.close()
    with stats:
        assert stats.read()["exits"] == before["exits"]


def test_absent(system: System, vm: Vm) -> None:
    if system.check_extension(Cap.BINARY_STATS_FD):
        pytest.skip("this KVM has KVM_CAP_BINARY_STATS_FD; the other tests cover it")
    with refused(errno.ENOTTY, errno.EINVAL):
        vm.stats()
