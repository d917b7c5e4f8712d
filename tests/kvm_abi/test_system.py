"""The system file: version, capabilities, lists, VM creation. Source: api.rst, "API description"."""

from __future__ import annotations

import ctypes
import errno

import pytest

from vmonty import kvm
from vmonty.base.errors import KvmError, KvmUnavailable, KvmUnsupported, UsageError
from vmonty.kvm.api import CpuidEntry, Handle, System, Vcpu, Vm
from vmonty.kvm.linux import LinuxKvm
from vmonty.kvm.uapi import Cap, Requests
from vmonty.kvm.uapi.flags import KVM_X86_GRP_SYSTEM, KVM_X86_XCOMP_GUEST_SUPP
from vmonty.kvm.uapi.run import kvm_run
from vmonty.kvm.uapi.vcpu import kvm_cpuid2

from .refusals import refused
from .watched import WatchedProvider

# What kvmtool and QEMU refuse to start without, and what every KVM since Linux 3.x has.
EXPECTED = [
    Cap.IRQCHIP, Cap.HLT, Cap.USER_MEMORY, Cap.SET_TSS_ADDR, Cap.EXT_CPUID, Cap.NR_VCPUS, Cap.NR_MEMSLOTS, Cap.MP_STATE,
    Cap.COALESCED_MMIO, Cap.DESTROY_MEMORY_REGION_WORKS, Cap.SET_GUEST_DEBUG, Cap.IRQ_ROUTING, Cap.IRQ_INJECT_STATUS,
    Cap.JOIN_MEMORY_REGIONS_WORKS, Cap.IRQFD, Cap.PIT2, Cap.PIT_STATE2, Cap.IOEVENTFD, Cap.ADJUST_CLOCK,
    Cap.VCPU_EVENTS, Cap.DEBUGREGS, Cap.XSAVE, Cap.XCRS, Cap.MAX_VCPUS, Cap.SIGNAL_MSI, Cap.READONLY_MEM,
    Cap.IMMEDIATE_EXIT, Cap.SYNC_REGS, Cap.CHECK_EXTENSION_VM,
]  # fmt: skip


def test_api_version(system: System) -> None:
    assert system.api_version() == 12


def test_wrong_api_version_is_unavailable(provider: WatchedProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KVM older than Linux 2.6.22 is none that can be used."""
    closed = []
    monkeypatch.setattr(WatchedProvider, "ioctl", lambda self, fd, request, argument: 10)
    monkeypatch.setattr(WatchedProvider, "close", lambda self, fd: closed.append(fd) or self.inner.close(fd))
    with pytest.raises(KvmUnavailable, match="10, not 12"):
        System(provider)
    assert len(closed) == 1


def test_missing_device_says_how_to_get_one() -> None:
    with pytest.raises(KvmUnavailable) as caught:
        LinuxKvm("/dev/no-kvm-here").open()
    assert caught.value.errno == errno.ENOENT
    assert caught.value.remedy


def test_unknown_provider() -> None:
    with pytest.raises(UsageError, match="there are"):
        kvm.open("nosuch")


@pytest.mark.parametrize("cap", EXPECTED, ids=lambda cap: cap.name)
def test_expected_capability(system: System, cap: Cap) -> None:
    assert system.check_extension(cap) > 0


def test_unknown_capability_is_absent(system: System, vm: Vm) -> None:
    assert system.check_extension(0x7FFF) == 0
    assert vm.check_extension(0x7FFF) == 0


def test_capabilities_agree_with_check_extension(system: System) -> None:
    offered = system.capabilities()
    assert offered[Cap.USER_MEMORY] == 1
    assert offered == {cap: system.check_extension(cap) for cap in offered}
    assert 1 <= offered[Cap.NR_VCPUS] <= offered[Cap.MAX_VCPUS] <= offered.get(Cap.MAX_VCPU_ID, 1 << 31)
    assert offered[Cap.NR_MEMSLOTS] >= 32


def test_vcpu_mmap_size(system: System) -> None:
    """kvm_run, the PIO page and the coalesced ring."""
    assert system.vcpu_mmap_size % 4096 == 0
    assert system.vcpu_mmap_size >= max(ctypes.sizeof(kvm_run), 3 * 4096)


def test_msr_index_list(system: System) -> None:
    indices = system.msr_index_list()
    assert len(set(indices)) == len(indices)
    # IA32_SYSENTER_CS, EIP, ESP, STAR, LSTAR, KERNEL_GS_BASE, TSC
    assert {0x174, 0x175, 0x176, 0xC0000081, 0xC0000082, 0xC0000102, 0x10} <= set(indices)


@pytest.mark.needs(Cap.GET_MSR_FEATURES)
def test_feature_msrs(system: System) -> None:
    indices = system.msr_feature_index_list()
    assert indices
    assert set(system.feature_msrs(indices)) == set(indices)


@pytest.mark.needs(Cap.GET_MSR_FEATURES)
def test_feature_msrs_stop_at_an_unknown_one(system: System) -> None:
    known = system.msr_feature_index_list()[0]
    assert set(system.feature_msrs([known, 0x7FFFFFFF, known])) == {known}


def test_supported_cpuid(cpuid: list[CpuidEntry]) -> None:
    leaves = {(entry.function, entry.index): entry for entry in cpuid}
    assert leaves[0, 0].eax >= 1
    assert leaves[0x80000000, 0].eax >= 0x80000008
    features = leaves[1, 0]
    # FPU, TSC, MSR, PAE, CX8, APIC, CMOV, MMX, FXSR, SSE, SSE2
    for bit in (0, 4, 5, 6, 8, 9, 15, 23, 24, 25, 26):
        assert features.edx >> bit & 1, f"CPUID.1:EDX bit {bit}"
    assert leaves[0x80000001, 0].edx >> 29 & 1, "long mode"
    signature = leaves[0x40000000, 0]
    assert (
        b"".join(r.to_bytes(4, "little") for r in (signature.ebx, signature.ecx, signature.edx)) == b"KVMKVMKVM\0\0\0"
    )


def test_emulated_cpuid(system: System) -> None:
    """Leaves whose features KVM emulates; MOVBE (CPUID.1:ECX bit 22) always is one."""
    leaves = {entry.function: entry for entry in system.emulated_cpuid()}
    assert leaves[1].ecx >> 22 & 1


def test_supported_hv_cpuid(system: System) -> None:
    """The Hyper-V leaves, or a refusal where KVM does not pose as Hyper-V."""
    if system.check_extension(Cap.SYS_HYPERV_CPUID):
        assert 0x40000001 in {entry.function for entry in system.supported_hv_cpuid()}
    else:
        with refused(errno.ENOTTY, errno.EINVAL):
            system.supported_hv_cpuid()


def test_cpuid_list_without_room(system: System) -> None:
    table = kvm_cpuid2(nent=0)
    assert system.try_ioctl(Requests.KVM_GET_SUPPORTED_CPUID, table) == -errno.E2BIG


@pytest.mark.needs(Cap.MCE)
def test_mce_cap_supported(system: System) -> None:
    """MCG_CTL_P and MCG_SER_P are bits 8 and 24 of IA32_MCG_CAP."""
    assert system.mce_cap_supported() & (1 << 8 | 1 << 24) == 1 << 8 | 1 << 24


def test_system_attributes(system: System) -> None:
    known = system.check_extension(Cap.SYS_ATTRIBUTES) > 0
    assert system.has_device_attr(KVM_X86_GRP_SYSTEM, KVM_X86_XCOMP_GUEST_SUPP) == known
    if known:
        assert system.get_device_attr(KVM_X86_GRP_SYSTEM, KVM_X86_XCOMP_GUEST_SUPP) & 3 == 3, "x87 and SSE"
    assert not system.has_device_attr(0x7F, 0)
    with refused(errno.ENXIO, errno.ENOTTY, errno.EINVAL):
        system.get_device_attr(0x7F, 0)


def test_unknown_vm_type(system: System) -> None:
    with refused(errno.EINVAL):
        system.create_vm(0x7FFFFFFF)


def test_two_vms_are_independent(system: System) -> None:
    with system.create_vm() as first, system.create_vm() as second:
        first.create_irqchip()
        second.create_irqchip()
        assert first.fileno() != second.fileno()


@pytest.fixture
def files(system: System, vm: Vm, vcpu: Vcpu) -> dict[str, Handle]:
    """The three kinds of file."""
    return {"system": system, "vm": vm, "vcpu": vcpu}


@pytest.mark.parametrize("file", ["system", "vm", "vcpu"])
@pytest.mark.parametrize(
    "request_number", [0xAEFF, 0x5401, int(Requests.KVM_RUN) | 1 << 30], ids=["0xff", "tcgets", "run-with-direction"]
)
def test_unknown_ioctl(files: dict[str, Handle], file: str, request_number: int) -> None:
    """ENOTTY becomes KvmUnsupported; /dev/kvm itself answers EINVAL (kvm_arch_dev_ioctl)."""
    with pytest.raises(KvmError) as caught:
        files[file].ioctl(request_number)
    assert caught.value.errno in (errno.ENOTTY, errno.EINVAL)
    assert isinstance(caught.value, KvmUnsupported) == (caught.value.errno == errno.ENOTTY)
    assert files[file].try_ioctl(request_number) == -(caught.value.errno or 0)


WRONG_FILE = [
    ("run-on-vm", "vm", Requests.KVM_RUN),
    ("run-on-system", "system", Requests.KVM_RUN),
    ("create-vm-on-vm", "vm", Requests.KVM_CREATE_VM),
    ("create-vcpu-on-system", "system", Requests.KVM_CREATE_VCPU),
    ("create-vcpu-on-vcpu", "vcpu", Requests.KVM_CREATE_VCPU),
    ("create-irqchip-on-vcpu", "vcpu", Requests.KVM_CREATE_IRQCHIP),
    ("api-version-on-vm", "vm", Requests.KVM_GET_API_VERSION),
]


@pytest.mark.parametrize(("file", "number"), [row[1:] for row in WRONG_FILE], ids=[row[0] for row in WRONG_FILE])
def test_request_of_another_file(files: dict[str, Handle], file: str, number: int) -> None:
    with refused(errno.ENOTTY, errno.EINVAL):
        files[file].ioctl(number, 0)


def test_bad_fd(provider: WatchedProvider) -> None:
    assert provider.ioctl(-1, Requests.KVM_GET_API_VERSION, 0) == -errno.EBADF
    fd = provider.open()
    provider.close(fd)
    assert provider.ioctl(fd, Requests.KVM_GET_API_VERSION, 0) == -errno.EBADF


def test_create_vm_argument_is_the_type(system: System) -> None:
    """A new VM answers VM requests and not those of the system file."""
    with system.create_vm(0) as made:
        assert made.check_extension(Cap.NR_MEMSLOTS) > 0
        with refused(errno.ENOTTY):
            made.ioctl(Requests.KVM_GET_VCPU_MMAP_SIZE)
