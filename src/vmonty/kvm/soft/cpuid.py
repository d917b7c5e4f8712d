"""What CPUID may offer a guest here."""

from __future__ import annotations

from vmonty.kvm.uapi.flags import KVM_CPUID_FLAG_SIGNIFCANT_INDEX as INDEXED
from vmonty.kvm.uapi.vcpu import kvm_cpuid_entry2

KVM_MAX_CPUID_ENTRIES = 256


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


def supported() -> list[kvm_cpuid_entry2]:
    vendor = [int.from_bytes(b"GenuineIntel"[at : at + 4], "little") for at in (0, 8, 4)]
    rows = [
        (0, 0, 0, 0xD, vendor[0], vendor[1], vendor[2]),
        (1, 0, 0, 0x50657, 0x800 | 1 << 16,
         _bits(0, 1, 9, 13, 19, 20, 21, 22, 23, 24, 25, 26, 30, 31),
         _bits(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26)),
        (2, 0, 0, 0x00FEFF01, 0, 0, 0xF0),
        (7, 0, INDEXED, 0, _bits(0, 3, 8, 9, 19, 20, 23, 24), 0, 0),
        (0xB, 0, INDEXED, 0, 1, 0x100, 0),
        (0xB, 1, INDEXED, 0, 1, 0x201, 0),
        (0xD, 0, INDEXED, 3, 576, 576, 0),
        (0xD, 1, INDEXED, 0, 0, 0, 0),
        (0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D),
        (0x4000_0001, 0, 0, 0, 0, 0, 0),
        (0x8000_0000, 0, 0, 0x8000_0008, 0, 0, 0),
        (0x8000_0001, 0, 0, 0, 0, _bits(0), _bits(11, 20, 26, 27, 29)),
        (0x8000_0008, 0, 0, 0x302E, 0, 0, 0),
    ]  # fmt: skip
    return [kvm_cpuid_entry2(function=f, index=i, flags=g, eax=a, ebx=b, ecx=c, edx=d) for f, i, g, a, b, c, d in rows]
