"""Time: kvmclock, TSC. Source: api.rst, KVM_GET_CLOCK, KVM_SET_TSC_KHZ; msr.rst, MSR_KVM_SYSTEM_TIME_NEW."""

from __future__ import annotations

import errno
import struct

import pytest

from vmonty.kvm.api import CpuidEntry, System, Vcpu, Vm
from vmonty.kvm.uapi import Cap, Exit, Requests
from vmonty.kvm.uapi.flags import (
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK_NEW,
)
from vmonty.testing.guests import DATA, Mode, TinyGuest, load

from .refusals import refused

PVCLOCK_TSC_STABLE = 1
HOUR_NS = 3600 * 10**9
TSC = 0x10


def test_clock_runs(vm: Vm) -> None:
    first, second = vm.get_clock(), vm.get_clock()
    assert second.clock >= first.clock


@pytest.mark.needs(Cap.ADJUST_CLOCK)
def test_set_clock(vm: Vm) -> None:
    """It goes on from what was set, forwards and backwards."""
    for target in (5 * HOUR_NS, HOUR_NS):
        vm.set_clock(target)
        assert target <= vm.get_clock().clock < target + HOUR_NS


def test_set_clock_with_an_unknown_flag(vm: Vm) -> None:
    with refused(errno.EINVAL):
        vm.set_clock(0, flags=1 << 30)


def test_kvmclock_page(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """The guest gets its time in memory: an even version, a scale, and system_time near KVM_GET_CLOCK's."""
    guest.vm.set_clock(7 * HOUR_NS)
    guest.load(Mode.LONG, "out 0x10, al", cpuid=cpuid)
    assert guest.vcpu.set_msrs({MSR_KVM_SYSTEM_TIME_NEW: DATA | 1}) == 1
    guest.out()
    version, _, _, system_time, scale, _, _ = struct.unpack("<IIQQIbB2x", guest.ram.read(DATA, 32))
    assert version > 0
    assert version % 2 == 0
    assert scale > 0
    assert 7 * HOUR_NS <= system_time < 8 * HOUR_NS
    assert guest.vcpu.get_msrs([MSR_KVM_SYSTEM_TIME_NEW]) == {MSR_KVM_SYSTEM_TIME_NEW: DATA | 1}


@pytest.mark.parametrize("clock", [3 * 10**18, (1 << 64) - 1])
def test_a_clock_from_far_away(guest: TinyGuest, cpuid: list[CpuidEntry], clock: int) -> None:
    """User space may set it to anything: what does not fit is cut off, and nothing fails."""
    guest.vm.set_clock(clock)
    write = "mov ecx, {:#x}\n mov eax, {:#x}\n xor edx, edx\n wrmsr\n"
    both = write.format(MSR_KVM_WALL_CLOCK_NEW, DATA + 64) + write.format(MSR_KVM_SYSTEM_TIME_NEW, DATA | 1)
    guest.load(Mode.LONG, f"{both} out 0x10, al", cpuid=cpuid)
    assert guest.out()[0] == 0x10
    assert guest.ram.read_u32(DATA) % 2 == guest.ram.read_u32(DATA + 64) % 2 == 0
    guest.vm.get_clock()


def test_all_vcpus_have_one_clock(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """Where KVM says that the clock is stable, a guest compares what its vCPUs read: they may not differ at all."""
    pages = []
    with guest.vm.create_vcpu(1) as other:
        for number, vcpu in enumerate((guest.vcpu, other)):
            at = DATA + 64 * number
            load(vcpu, guest.ram, Mode.LONG, "out 0x10, al", cpuid=cpuid)
            assert vcpu.set_msrs({MSR_KVM_SYSTEM_TIME_NEW: at | 1}) == 1
            assert vcpu.run() is Exit.IO
            _, _, tsc, now, mul, shift, flags = struct.unpack("<IIQQIbB2x", guest.ram.read(at, 32))
            pages.append((tsc, now, mul, shift, flags & PVCLOCK_TSC_STABLE))
    if not all(stable for *_, stable in pages):
        pytest.skip("this KVM does not say that its clock is stable")
    (tsc, now, mul, shift, _), *others = pages
    for tsc_then, now_then, *scale in others:
        assert scale == [mul, shift, PVCLOCK_TSC_STABLE]
        ticks = tsc_then - tsc
        passed = (ticks << shift if shift >= 0 else ticks >> -shift) * mul >> 32
        assert abs(now + passed - now_then) <= 2


def test_wall_clock(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """KVM writes the time of the VM's start: some time after 2020."""
    write = f"mov ecx, {MSR_KVM_WALL_CLOCK_NEW:#x}\n mov eax, {DATA}\n xor edx, edx\n wrmsr\n"
    guest.load(Mode.LONG, f"{write} out 0x10, al", cpuid=cpuid)
    guest.out()
    version, seconds, nanoseconds = struct.unpack("<III", guest.ram.read(DATA, 12))
    assert version % 2 == 0
    assert seconds > 1_577_836_800 or guest.vm.get_clock().clock > seconds * 10**9
    assert nanoseconds < 10**9


def test_kvmclock_ctrl(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """Refused without a kvmclock; with one the guest is told in the page's flags that it was paused."""
    with refused(errno.EINVAL):
        guest.vcpu.kvmclock_ctrl()


@pytest.mark.needs(Cap.KVMCLOCK_CTRL)
def test_kvmclock_ctrl_tells_the_guest(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    guest.load(Mode.LONG, "again: out 0x10, al\n jmp again", cpuid=cpuid)
    guest.vcpu.set_msrs({MSR_KVM_SYSTEM_TIME_NEW: DATA | 1})
    guest.out()
    assert guest.ram.read_u8(DATA + 29) & 2 == 0
    guest.vcpu.kvmclock_ctrl()
    guest.out()
    assert guest.ram.read_u8(DATA + 29) & 2, "PVCLOCK_GUEST_STOPPED"


@pytest.mark.needs(Cap.GET_TSC_KHZ)
def test_tsc_frequency(vcpu: Vcpu) -> None:
    assert 100_000 < vcpu.get_tsc_khz() < 100_000_000


def test_set_tsc_frequency(system: System, vcpu: Vcpu) -> None:
    """The host's always. With KVM_CAP_TSC_CONTROL up to a limit; without it a slower one is refused.

    (A faster one is then accepted: KVM lets the guest's TSC jump ahead, kvm_set_tsc_khz.)
    """
    host = vcpu.get_tsc_khz()
    vcpu.set_tsc_khz(host)
    assert vcpu.get_tsc_khz() == host
    with refused(errno.EINVAL):
        vcpu.set_tsc_khz(0x7FFFFFFF if system.check_extension(Cap.TSC_CONTROL) else host // 2)


def test_tsc_frequency_of_the_vm(vm: Vm) -> None:
    """KVM_CAP_VM_TSC_CONTROL: the default of new vCPUs."""
    if vm.check_extension(Cap.VM_TSC_CONTROL):
        wanted = vm.get_tsc_khz()
        vm.set_tsc_khz(wanted)
        with vm.create_vcpu() as vcpu:
            assert vcpu.get_tsc_khz() == wanted
        with refused(errno.EINVAL):
            vm.set_tsc_khz(wanted)
    else:
        # Whether it takes one depends on the version; what it does not know it must refuse.
        assert vm.try_ioctl(Requests.KVM_SET_TSC_KHZ, 0) in (0, -errno.ENOTTY, -errno.EINVAL)
        assert vm.try_ioctl(Requests.KVM_GET_TSC_KHZ, 0) > 100_000 or vm.try_ioctl(Requests.KVM_GET_TSC_KHZ, 0) < 0


def test_guests_tsc_increases(guest: TinyGuest) -> None:
    read = f"rdtsc\n mov [abs {DATA}], eax\n mov [abs {DATA + 4}], edx\n out 0x10, al\n"
    guest.load(Mode.LONG, read + read)
    guest.out()
    first = guest.ram.read_u64(DATA)
    guest.out()
    assert guest.ram.read_u64(DATA) > first


@pytest.mark.known_gap("tsc-offset")
def test_set_tsc(guest: TinyGuest) -> None:
    """MSR 0x10 set from user space moves the guest's TSC."""
    guest.load(Mode.LONG, f"rdtsc\n mov [abs {DATA}], eax\n mov [abs {DATA + 4}], edx\n out 0x10, al")
    target = 1 << 60
    assert guest.vcpu.set_msrs({TSC: target}) == 1
    guest.out()
    assert target <= guest.ram.read_u64(DATA) < target + (1 << 50)


@pytest.mark.known_gap("tsc-offset")
@pytest.mark.needs(Cap.VCPU_ATTRIBUTES)
def test_tsc_offset(vcpu: Vcpu) -> None:
    assert vcpu.has_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET)
    vcpu.set_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, (1 << 64) - 12345)
    assert vcpu.get_device_attr(KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET) == (1 << 64) - 12345


def test_unknown_vcpu_attribute(vcpu: Vcpu) -> None:
    assert not vcpu.has_device_attr(77, 0)
    with refused(errno.ENXIO, errno.ENOTTY):
        vcpu.get_device_attr(77, 0)
    with refused(errno.ENXIO, errno.ENOTTY):
        vcpu.set_device_attr(77, 0, 0)


@pytest.mark.needs(Cap.VM_TSC_CONTROL)
def test_tsc_frequency_too_high(vm: Vm) -> None:
    with refused(errno.EINVAL):
        vm.set_tsc_khz(0x7FFFFFFF)
