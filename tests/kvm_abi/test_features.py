"""Smaller interfaces: devices, machine check, TPR access, SMI, PMU filter, nested state, memory encryption."""

from __future__ import annotations

import errno

import pytest

from vmonty.base.errors import KvmUnsupported
from vmonty.kvm.api import CpuidEntry, Device, System, Vm
from vmonty.kvm.uapi import Cap, Exit, Requests
from vmonty.kvm.uapi.flags import (
    KVM_DEV_TYPE_VFIO,
    KVM_DEV_VFIO_GROUP,
    KVM_DEV_VFIO_GROUP_ADD,
    KVM_PMU_EVENT_ALLOW,
    KVM_PMU_EVENT_DENY,
)
from vmonty.kvm.uapi.vcpu import kvm_x86_mce
from vmonty.testing.guests import Mode, TinyGuest

from .irq_guests import APIC
from .refusals import outcome, refused

MCG_CTL_P = 1 << 8


class TestDevice:
    """KVM_CREATE_DEVICE. On x86 the one type is VFIO, which a kernel may lack."""

    @pytest.fixture
    def vfio(self, vm: Vm) -> Device:
        if outcome(lambda: vm.create_device(KVM_DEV_TYPE_VFIO, test=True), errno.ENODEV):
            pytest.skip("this KVM has no devices of type VFIO")
        device = vm.create_device(KVM_DEV_TYPE_VFIO)
        assert device is not None
        return device

    def test_asking_creates_nothing(self, vm: Vm, vfio: Device) -> None:
        assert vm.create_device(KVM_DEV_TYPE_VFIO, test=True) is None

    def test_attributes(self, vfio: Device) -> None:
        with vfio:
            assert vfio.has_attr(KVM_DEV_VFIO_GROUP, KVM_DEV_VFIO_GROUP_ADD)
            assert not vfio.has_attr(99, 0)
            with refused(errno.ENXIO, errno.EPERM):
                vfio.set_attr(99, 0, 0)
            with refused(errno.ENXIO, errno.EPERM):
                vfio.get_attr(99, 0)

    def test_unknown_request(self, vfio: Device) -> None:
        with vfio, refused(errno.ENOTTY, errno.EINVAL):
            vfio.ioctl(Requests.KVM_RUN, 0)

    @pytest.mark.parametrize("test", [True, False], ids=["ask", "create"])
    def test_unknown_type(self, vm: Vm, test: bool) -> None:
        with refused(errno.ENODEV):
            vm.create_device(0x7FFF, test=test)

    def test_attributes_that_a_file_does_not_have(self, vm: Vm) -> None:
        """The static forms work on any file; a VM has no such group."""
        assert not Device.knows_attr(vm, 77, 0)
        with refused(errno.ENXIO, errno.ENOTTY, errno.EPERM):
            Device.read_attr(vm, 77, 0)
        with refused(errno.ENXIO, errno.ENOTTY, errno.EPERM):
            Device.write_attr(vm, 77, 0, 1)


@pytest.mark.needs(Cap.MCE)
class TestMachineCheck:
    def test_setup(self, guest: TinyGuest) -> None:
        """The banks are initialised; the guest reads what was set."""
        guest.vcpu.setup_mce(10 | MCG_CTL_P)
        guest.load(Mode.LONG, "mov ecx, 0x179\n rdmsr\n out 0x10, eax")
        assert guest.out() == (0x10, 10 | MCG_CTL_P)

    def test_refused(self, guest: TinyGuest, system: System) -> None:
        banks = system.check_extension(Cap.MCE)
        with refused(errno.EINVAL):
            guest.vcpu.setup_mce(banks + 1)
        with refused(errno.EINVAL):
            guest.vcpu.setup_mce(0)
        with refused(errno.EINVAL):
            guest.vcpu.setup_mce(1 << 40 | 10)

    def test_error_in_a_bank(self, guest: TinyGuest) -> None:
        """A corrected error only lands in its bank's registers."""
        guest.vcpu.setup_mce(10)
        valid, address_valid = 1 << 63, 1 << 58
        guest.vcpu.set_mce(kvm_x86_mce(status=valid | address_valid | 0x150, addr=0x1234000, bank=3))
        got = guest.vcpu.get_msrs([0x401 + 4 * 3, 0x402 + 4 * 3])
        assert got == {0x40D: valid | address_valid | 0x150, 0x40E: 0x1234000}

    def test_unknown_bank(self, guest: TinyGuest) -> None:
        guest.vcpu.setup_mce(10)
        with refused(errno.EINVAL):
            guest.vcpu.set_mce(kvm_x86_mce(status=1 << 63, bank=10))


@pytest.mark.needs(Cap.VAPIC)
class TestTpr:
    @pytest.mark.known_gap("tpr-access")
    def test_access_is_reported(self, chipped: TinyGuest, cpuid: list[CpuidEntry]) -> None:
        """KVM_EXIT_TPR_ACCESS after each access, with the instruction's address."""
        chipped.vcpu.tpr_access_reporting(True)
        chipped.load(Mode.LONG, f"mov ebx, {APIC + 0x80:#x}\n mov eax, [rbx]\n out 0x90, al", cpuid=cpuid)
        assert chipped.run() is Exit.TPR_ACCESS
        access = chipped.vcpu.kvm_run.u.tpr_access
        assert (access.is_write, access.rip) in ((0, 0x8005), (0, 0x8007))
        chipped.vcpu.tpr_access_reporting(False)
        assert chipped.out()[0] == 0x90

    def test_switched_off(self, chipped: TinyGuest) -> None:
        chipped.vcpu.tpr_access_reporting(False)
        chipped.load(Mode.LONG, f"mov ebx, {APIC + 0x80:#x}\n mov dword [rbx], 0x30\n out 0x90, al")
        assert chipped.out()[0] == 0x90
        assert bytes(chipped.vcpu.get_lapic())[0x80] == 0x30
        assert chipped.vcpu.get_sregs().cr8 == 3

    def test_vapic_address(self, chipped: TinyGuest) -> None:
        """It must be in guest memory when it is set; 0 switches it off."""
        chipped.vcpu.set_vapic_addr(0x4000)
        chipped.vcpu.set_vapic_addr(0)
        with refused(errno.EINVAL, errno.EFAULT):
            chipped.vcpu.set_vapic_addr(0xD0000000)

    def test_vapic_without_local_apic(self, guest: TinyGuest) -> None:
        with refused(errno.EINVAL):
            guest.vcpu.set_vapic_addr(0x4000)


def test_smi(guest: TinyGuest) -> None:
    """Pending in the vCPU's events; refused without KVM_CAP_X86_SMM."""
    if guest.vm.check_extension(Cap.X86_SMM):
        guest.vcpu.smi()
        assert guest.vcpu.get_vcpu_events().smi.pending == 1
    else:
        with refused(errno.ENOTTY, errno.EINVAL):
            guest.vcpu.smi()


@pytest.mark.needs(Cap.PMU_EVENT_FILTER)
class TestPmuFilter:
    @pytest.mark.parametrize("action", [KVM_PMU_EVENT_ALLOW, KVM_PMU_EVENT_DENY], ids=["allow", "deny"])
    def test_set(self, vm: Vm, action: int) -> None:
        before = vm.try_ioctl(Requests.KVM_SET_PMU_EVENT_FILTER, 0)
        assert before == -errno.EFAULT
        vm.set_pmu_event_filter([0xC0, 0x3C], action=action)

    def test_unknown_action(self, vm: Vm) -> None:
        with refused(errno.EINVAL):
            vm.set_pmu_event_filter([0xC0], action=9)

    def test_unknown_flag(self, vm: Vm) -> None:
        with refused(errno.EINVAL):
            vm.set_pmu_event_filter([0xC0], flags=1 << 20)

    def test_too_many_events(self, vm: Vm) -> None:
        with refused(errno.E2BIG):
            vm.set_pmu_event_filter([0] * 301)


def test_nested_state(guest: TinyGuest, cpuid: list[CpuidEntry]) -> None:
    """Round trip of a vCPU that runs no guest of its own; refused where KVM has no nesting."""
    size = guest.vm.check_extension(Cap.NESTED_STATE)
    if size == 0:
        with refused(errno.EINVAL, errno.ENOTTY):
            guest.vcpu.get_nested_state(4096)
        with refused(errno.EINVAL, errno.ENOTTY):
            guest.vcpu.set_nested_state(bytearray(4096))
        return
    guest.vcpu.set_cpuid2(cpuid)
    state = guest.vcpu.get_nested_state(size)
    assert int.from_bytes(state[4:8], "little") >= 128, "the size that was used"
    guest.vcpu.set_nested_state(state)
    assert guest.vcpu.get_nested_state(size)[:128] == state[:128]
    state[0] |= 0x40
    with refused(errno.EINVAL):
        guest.vcpu.set_nested_state(state)


def test_memory_encryption(vm: Vm) -> None:
    """KVM_MEMORY_ENCRYPT_OP with 0 asks whether there is SEV: it is 0 or refused, and nothing else."""
    refusals = (errno.ENOTTY, errno.EINVAL, errno.EFAULT, errno.ENODEV)
    assert outcome(lambda: vm.memory_encrypt_op(0), *refusals) in (0, *refusals)
    with refused(*refusals):
        vm.memory_encrypt_op(0xFFFF800000000000)


@pytest.mark.needs(Cap.DISABLE_QUIRKS2)
def test_quirks(vm: Vm) -> None:
    """KVM_CAP_DISABLE_QUIRKS2 tells which quirks it knows and refuses others."""
    known = vm.check_extension(Cap.DISABLE_QUIRKS2)
    assert known & 1, "KVM_X86_QUIRK_LINT0_REENABLED"
    vm.enable_cap(Cap.DISABLE_QUIRKS2, 1)
    with refused(errno.EINVAL):
        vm.enable_cap(Cap.DISABLE_QUIRKS2, 1 << 62)


def test_what_no_ioctl_tells(guest: TinyGuest) -> None:
    """Through a provider that has only the ABI's door, which the watched one is."""
    vm, vcpu = guest.vm, guest.vcpu
    asked = vcpu.dump_vmcs, vcpu.dump_vmcb, lambda: vcpu.walk(0), lambda: vm.translate(0, vcpu), lambda: vm.trace(None)
    for ask in asked:
        with pytest.raises(KvmUnsupported, match="--accel soft"):
            ask()
