"""Bits of control registers and model-specific registers that CPUID does not show raise #GP.

SDM, "MOV—Move to/from Control Registers", "RDMSR—Read From Model Specific Register", "XSETBV—Set Extended Control
Register"; APM, "MSR Cross-Reference".
"""

from __future__ import annotations

import pytest

from vmonty.cpu import models
from vmonty.testing.nasm import assemble

from .machine import CODE, TABLES, Machine

GP = 13
ALL = frozenset(models.FEATURES)
CR4_BITS = {
    "vme": 0, "tsc": 2, "de": 3, "pse": 4, "mce": 6, "pge": 7, "fxsr": 9, "sse": 10, "umip": 11, "fsgsbase": 16,
    "pcid": 17, "xsave": 18, "smep": 20, "smap": 21,
}  # fmt: skip
NEVER_CR4 = (12, 13, 14, 15, 19, 22, 23, 24, 25, 28, 31, 32, 61, 63)
EFER_BITS = {"syscall": 0, "nx": 11, "fxsr-opt": 14}
MSRS = {
    "tsc": (0x10,), "apic": (0x1B,), "arch-capabilities": (0x10A,), "sep": (0x174, 0x175, 0x176), "mce": (0x179, 0x17A),
    "pat": (0x277,), "mtrr": (0xFE, 0x200, 0x201, 0x20F, 0x250, 0x258, 0x259, 0x268, 0x26F, 0x2FF),
    "tsc-deadline": (0x6E0,), "syscall": (0xC0000081, 0xC0000084),
    "lm": (0xC0000082, 0xC0000083, 0xC0000100, 0xC0000101, 0xC0000102),
}  # fmt: skip
READ_ONLY = (0xFE, 0x179, 0x10A)


def machine(features: frozenset[str]) -> Machine:
    made = Machine().long_mode()
    made.ram.write_u64(TABLES + 0x2000, 0x83)  # the supervisor's page: SMEP and SMAP allow it
    models.install(made.cpu, models.Configuration(models.MODELS["max"], features))
    return made


def outcome(made: Machine, source: str) -> int:
    """The vector of the exception, with an error code of 0; or -1."""
    assert made.run(assemble(f"{source}\nhlt", 64, CODE)) == "halt"
    if made["rip"] >= CODE:
        return -1
    assert made.stack(1) == [0]
    return made.handler


@pytest.mark.parametrize("feature", CR4_BITS)
def test_cr4_bits_follow_their_features(feature: str) -> None:
    source = f"mov rax, cr4\n bts rax, {CR4_BITS[feature]}\n mov cr4, rax"
    assert outcome(machine(ALL), source) == -1
    assert outcome(machine(ALL - {feature}), source) == GP


@pytest.mark.parametrize("bit", NEVER_CR4)
def test_cr4_bits_that_are_never_offered(bit: int) -> None:
    assert outcome(machine(ALL), f"mov rax, cr4\n bts rax, {bit}\n mov cr4, rax") == GP


@pytest.mark.parametrize("bit", range(64))
def test_efer_bits_follow_their_features(bit: int) -> None:
    source = f"mov ecx, 0xC0000080\n rdmsr\n {'bts eax' if bit < 32 else 'bts edx'}, {bit % 32}\n wrmsr"
    feature = {number: name for name, number in EFER_BITS.items()}.get(bit)
    allowed = feature is not None or bit in (8, 10)  # LME and LMA are set already
    assert outcome(machine(ALL), source) == (-1 if allowed else GP)
    if feature is not None:
        assert outcome(machine(ALL - {feature}), source) == GP


@pytest.mark.parametrize(
    ("value", "features", "vector"),
    [
        (1, ALL, -1), (3, ALL, -1), (7, ALL, -1), (7, ALL - {"avx"}, GP), (3, ALL - {"avx"}, -1), (5, ALL, GP),
        (2, ALL, GP), (0xF, ALL, GP), (0x1F, ALL, GP), (0xE7, ALL, GP), (0x207, ALL, GP), (0x60007, ALL, GP),
    ],
)  # fmt: skip
def test_xcr0_bits_follow_their_features(value: int, features: frozenset[str], vector: int) -> None:
    made = machine(features)
    made["cr4"] |= 1 << 18
    assert outcome(made, f"xor ecx, ecx\n xor edx, edx\n mov eax, {value}\n xsetbv") == vector


@pytest.mark.parametrize("feature", MSRS)
def test_msrs_follow_their_features(feature: str) -> None:
    for index in MSRS[feature]:
        read = f"mov ecx, {index}\n rdmsr"
        assert outcome(machine(ALL), read) == -1, hex(index)
        assert outcome(machine(ALL - {feature}), read) == GP, hex(index)
        if index not in READ_ONLY:
            assert outcome(machine(ALL), f"{read}\n wrmsr") == -1, hex(index)
        assert outcome(machine(ALL - {feature}), f"mov ecx, {index}\n xor eax, eax\n xor edx, edx\n wrmsr") == GP


def test_msrs_of_one_of_several_features() -> None:
    """IA32_TSC_AUX comes with RDTSCP or RDPID."""
    read = "mov ecx, 0xC0000103\n rdmsr"
    assert outcome(machine(ALL - {"rdpid"}), read) == -1
    assert outcome(machine(ALL - {"rdtscp"}), read) == -1
    assert outcome(machine(ALL - {"rdpid", "rdtscp"}), read) == GP


@pytest.mark.parametrize("index", [0x3B, 0x48, 0x49, 0xC0010140, 0xC0010141, 0x3A, 0x480, 0xC0010114])
def test_msrs_of_what_is_never_offered(index: int) -> None:
    """TSC_ADJUST, SPEC_CTRL, PRED_CMD, OSVW; those of VMX and SVM where they are not there."""
    clear = "xor eax, eax\n xor edx, edx\n"
    assert outcome(machine(ALL), f"mov ecx, {index}\n {clear} wrmsr") == GP
    assert outcome(machine(ALL), f"mov ecx, {index}\n rdmsr") == GP


@pytest.mark.parametrize(
    ("index", "value", "vector"),
    [
        (0x200, 6, -1), (0x200, 0x1006, -1), (0x200, 2, GP), (0x200, 3, GP), (0x200, 7, GP), (0x200, 0x106, GP),
        (0x200, 1 << 46, GP), (0x201, 0x800, -1), (0x201, 0x400, GP), (0x201, 1 << 46, GP), (0x2FF, 0xC06, -1),
        (0x2FF, 0xC02, GP), (0x2FF, 0x1006, GP), (0x250, 0x0606060606060606, -1), (0x26F, 0x0601040500060606, -1),
        (0x250, 0x0606060602060606, GP), (0x268, 0x0706060606060606, GP),
    ],
)  # fmt: skip
def test_mtrrs_take_memory_types_alone(index: int, value: int, vector: int) -> None:
    """SDM, "Memory Type Range Registers (MTRRs)": reserved bits and encodings."""
    source = f"mov ecx, {index}\n mov eax, {value & 0xFFFFFFFF}\n mov edx, {value >> 32}\n wrmsr"
    assert outcome(machine(ALL), source) == vector
