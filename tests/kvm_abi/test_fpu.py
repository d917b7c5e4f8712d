"""x87, SSE and extended state. Source: api.rst, KVM_GET_FPU, KVM_GET_XSAVE, KVM_GET_XCRS; SDM, "XSAVE Area"."""

from __future__ import annotations

import errno

import pytest

from vmonty.kvm.api import CpuidEntry, System, Vcpu, Vm
from vmonty.kvm.uapi import Cap
from vmonty.kvm.uapi.vcpu import kvm_xsave
from vmonty.testing.guests import DATA, Mode, TinyGuest

from .refusals import refused

CR4_OSXSAVE = 1 << 18


def test_fpu_round_trip(vcpu: Vcpu) -> None:
    fpu = vcpu.get_fpu()
    assert fpu.fcw in (0x37F, 0x40), "INIT or reset state"
    fpu.fcw, fpu.ftwx = 0x27F, 0xFF  # Linux ignores mxcsr (kvm_arch_vcpu_ioctl_set_fpu); XSAVE carries it
    for index, register in enumerate(fpu.xmm):
        register[:] = [index] * 16
    for index, register in enumerate(fpu.fpr):
        register[:10] = [0x10 + index] * 10
    vcpu.set_fpu(fpu)
    again = vcpu.get_fpu()
    assert (again.fcw, again.ftwx) == (0x27F, 0xFF)
    assert [bytes(register) for register in again.xmm] == [bytes([index]) * 16 for index in range(16)]
    assert [bytes(register)[:10] for register in again.fpr] == [bytes([0x10 + index]) * 10 for index in range(8)]


@pytest.fixture
def vector_guest(guest: TinyGuest) -> TinyGuest:
    """It has loaded XMM0 (until then KVM may take SSE for unused), and will store it when it goes on."""
    guest.ram.write(DATA, b"from the guest!!")
    guest.load(Mode.USER, f"movups xmm0, [abs {DATA}]\n out 0x10, al\n movups [abs {DATA + 16}], xmm0\n out 0x11, al")
    assert guest.out()[0] == 0x10
    guest.vcpu.complete_io()
    return guest


def test_fpu_and_guest(vector_guest: TinyGuest) -> None:
    fpu = vector_guest.vcpu.get_fpu()
    assert bytes(fpu.xmm[0]) == b"from the guest!!"
    fpu.xmm[0][:] = list(b"into the guest!!")
    vector_guest.vcpu.set_fpu(fpu)
    assert vector_guest.out()[0] == 0x11
    assert vector_guest.ram.read(DATA + 16, 16) == b"into the guest!!"


def test_xsave_and_guest(vector_guest: TinyGuest) -> None:
    """The legacy region of the area: XMM0 at 160; XSTATE_BV at 512 says what is valid (SDM, "XSAVE Area")."""
    area = bytearray(vector_guest.vcpu.get_xsave())
    assert area[160:176] == b"from the guest!!"
    assert area[512] & 2
    area[160:176] = b"into the guest!!"
    vector_guest.vcpu.set_xsave(kvm_xsave.from_buffer(area))
    assert vector_guest.out()[0] == 0x11
    assert vector_guest.ram.read(DATA + 16, 16) == b"into the guest!!"


def test_xsave2(vector_guest: TinyGuest) -> None:
    """As long as KVM_CAP_XSAVE2 says, and the same state; where that is absent, the request is refused."""
    size = vector_guest.vm.check_extension(Cap.XSAVE2)
    if size == 0:
        with refused(errno.ENOTTY, errno.EINVAL):
            vector_guest.vcpu.get_xsave2(4096)
        return
    area = vector_guest.vcpu.get_xsave2(size)
    assert len(area) == size >= 4096
    assert area[160:176] == b"from the guest!!"


def test_xsave2_is_as_long_for_the_system(system: System, vm: Vm) -> None:
    """The whole, whatever a guest enables; and never less than struct kvm_xsave."""
    size = vm.check_extension(Cap.XSAVE2)
    assert size == system.check_extension(Cap.XSAVE2)
    assert not 0 < size < 4096


@pytest.mark.needs(Cap.XSAVE2)
def test_xsave2_has_the_guests_vectors(guest: TinyGuest, system: System, cpuid: list[CpuidEntry]) -> None:
    """The upper halves of YMM0 to YMM15 at the offset that CPUID leaf 0xD tells; KVM_SET_XSAVE takes as much."""
    features = next((entry.ecx for entry in cpuid if entry.function == 1), 0)
    at = next((entry.ebx for entry in cpuid if (entry.function, entry.index) == (0xD, 2)), 0)
    if not features >> 26 & features >> 28 & 1 or not at:
        pytest.skip("this KVM offers guests no AVX")
    # In CPL 3 once the state is enabled: there every KVM executes them on the processor.
    guest.load(
        Mode.USER,
        f"vmovups ymm0, [abs {DATA}]\n out 0x10, al\n vmovups [abs {DATA + 64}], ymm0\n out 0x11, al", cpuid=cpuid,
    )  # fmt: skip
    sregs = guest.vcpu.get_sregs()
    sregs.cr4 |= CR4_OSXSAVE
    guest.vcpu.set_sregs(sregs)
    guest.vcpu.set_xcrs({0: 7})
    guest.ram.write(DATA, bytes(range(32)))
    assert guest.out()[0] == 0x10
    guest.vcpu.complete_io()
    area = guest.vcpu.get_xsave2(guest.vm.check_extension(Cap.XSAVE2))
    assert area[512] & 6 == 6
    assert area[160:176] == bytes(range(16))
    assert area[at : at + 16] == bytes(range(16, 32))
    area[160:176], area[at : at + 16] = b"the lower half..", b"the upper half.."
    guest.vcpu.set_xsave(kvm_xsave.from_buffer(area))
    assert guest.out()[0] == 0x11
    assert guest.ram.read(DATA + 64, 32) == b"the lower half..the upper half.."


def test_xsave_with_an_impossible_component(vcpu: Vcpu) -> None:
    area = bytearray(vcpu.get_xsave())
    area[519] |= 0x40
    with refused(errno.EINVAL):
        vcpu.set_xsave(kvm_xsave.from_buffer(area))


def test_xcrs(guest: TinyGuest, system: System) -> None:
    if not any(entry.function == 1 and entry.ecx >> 26 & 1 for entry in system.supported_cpuid()):
        pytest.skip("this KVM offers guests no XSAVE")
    guest.vcpu.set_cpuid2(system.supported_cpuid())
    assert guest.vcpu.get_xcrs() == {0: 1}
    guest.vcpu.set_xcrs({0: 3})
    assert guest.vcpu.get_xcrs() == {0: 3}
    with refused(errno.EINVAL):
        guest.vcpu.set_xcrs({0: 2})  # x87 must be on
    with refused(errno.EINVAL):
        guest.vcpu.set_xcrs({0: 1 << 62 | 3})
    assert guest.vcpu.get_xcrs() == {0: 3}


def test_set_fpu_takes_no_mxcsr(guest: TinyGuest) -> None:
    """Reserved bits would make the processor fault when it loads them: they never get there."""
    fpu = guest.vcpu.get_fpu()
    before = fpu.mxcsr
    fpu.mxcsr = 0xFFFF_FFFF
    guest.vcpu.set_fpu(fpu)
    assert guest.vcpu.get_fpu().mxcsr == before
    guest.load(Mode.LONG, "out 0x10, al")
    guest.out()
