"""vmonty.kvm.uapi against the kernel's headers: every size, offset and number, in both directions.

``--kvm-headers=DIR`` (repeatable) adds newer headers: both sets must agree with what is declared.
"""

from __future__ import annotations

import ctypes
import re

import pytest

from . import declared
from .headers import Headers, number_line, struct_lines

# Names of the headers that uapi does not declare, and why.
NOT_OURS = {
    # Other architectures, whose parts of linux/kvm.h every architecture sees.
    r"KVM_\w*S390\w*|kvm_s390_\w+|kvm_irq_routing_s390_adapter|KVM_PV_(?!EOI|REASON)\w+|kvm_pv_cmd": "S390",
    r"KVM_MP_STATE_(CHECK_STOP|OPERATING|LOAD)|KVM_DEV_TYPE_FLIC|KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY": "S390",
    r"KVM_\w*PPC\w*|kvm_ppc_\w+|KVM_\w*SPAPR\w*|kvm_\w*spapr\w*|KVM_\w*_(XICS|XIVE)\w*|KVM_PVINFO\w*": "PowerPC",
    r"KVM_CREATE_SPAPR\w*|KVM_ALLOCATE_RMA|KVM_EXIT_(DCR|WATCHDOG|OSI|PAPR_HCALL|EPR)": "PowerPC",
    r"KVM_CAP_(IRQ_MPIC|SW_TLB)": "PowerPC",
    r"KVM_DEV_TYPE_FSL_MPIC_\d+|KVM_MMU_FSL_\w+|KVM_DIRTY_TLB|kvm_(config|dirty)_tlb": "PowerPC",
    r"KVM_\w*_?ARM(64)?(_\w+)?|kvm_arm_\w+|KVM_\w*VGIC\w*|KVM_MP_STATE_(STOPPED|SUSPENDED)": "ARM",
    r"KVM_\w*MIPS\w*": "MIPS",
    r"KVM_\w*RISCV\w*": "RISC-V",
    r"KVM_\w*LOONGARCH\w*": "LoongArch",
    r"KVM_REG_IA64": "Itanium",
    # What is no number that a caller passes.
    r"_\w+": "the headers' own guards and helpers",
    r"KVM_(DEV_TYPE_MAX|SEV_NR_MAX|TDX_CMD_NR_MAX)": "ends of enumerations, that move",
    r"kvm_ioeventfd_flag_nr_\w+": "bit numbers of KVM_IOEVENTFD_FLAG_*",
    r"KVM_SIGNATURE": "a text; the CPUID tests look at it",
    r"KVM_COALESCED_MMIO_MAX": "a quotient of sizes, which the ring's class computes",
    # Gone from Linux for ten years or more.
    r"KVM_(TRC|TRACE)_\w+|kvm_user_trace_setup": "tracing of Linux before 2.6.31",
    r"KVM_DEBUG_GUEST|kvm_debug_guest|kvm_breakpoint": "replaced by KVM_SET_GUEST_DEBUG in 2.6.29",
    r"KVM_ASSIGN_IRQ": "device assignment's first request, replaced by KVM_ASSIGN_DEV_IRQ",
}

# Layouts that some versions ended differently: the declared one is the newest.
ENDED_DIFFERENTLY = {
    "kvm_vcpu_pv_apf_data": "until Linux 6.8 a member `enabled` followed that was only the guest's own",
}


def header_sets(config: pytest.Config) -> list[Headers]:
    given = tuple(config.getoption("--kvm-headers"))
    return [Headers("system"), *([Headers("given", given)] if given else [])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "headers" in metafunc.fixturenames:
        sets = header_sets(metafunc.config)
        metafunc.parametrize("headers", sets, ids=[headers.name for headers in sets], scope="module")


@pytest.fixture(autouse=True)
def usable(request: pytest.FixtureRequest) -> None:
    for headers in header_sets(request.config):
        complaint = headers.complaint()
        if complaint is not None:
            pytest.skip(f"{headers.name}: {complaint}")


def excluded(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in NOT_OURS)


def expected_layouts(headers: Headers) -> tuple[dict[str, str], dict[str, str]]:
    """What uapi says of the structs that *headers* have: key → value, and key → the C statement that asks."""
    values: dict[str, str] = {}
    lines: dict[str, str] = {}
    for tag, layout in declared.layouts().items():
        if tag not in headers.structs:
            continue
        rows = list(declared.members(layout))
        bit_rows = declared.bit_fields(layout)
        lines |= struct_lines(headers.structs[tag], tag, [path for path, *_ in rows], bit_rows)
        values[tag] = str(ctypes.sizeof(layout))
        for path, offset, size, _ in rows:
            values[f"{tag}.{path} offset"] = str(offset)
            if size is None:
                del lines[f"{tag}.{path} size"]
            else:
                values[f"{tag}.{path} size"] = str(size)
        values |= {f"{tag}.{path} bits": image for path, image in bit_rows.items()}
    return values, lines


def members_that_are(tags: set[str]) -> set[tuple[str, str]]:
    """(tag, path) of every member whose type is one of *tags*."""
    wanted = {layout for tag, layout in declared.layouts().items() if tag in tags}
    return {
        (tag, path)
        for tag, layout in declared.layouts().items()
        for path, _, _, kind in declared.members(layout)
        if kind in wanted
    }


def test_numbers(headers: Headers) -> None:
    """Requests, capabilities, exit reasons, flags."""
    ours = declared.constants()
    theirs = headers.evaluate({name: number_line(name) for name in ours})
    assert len(theirs) > 500, "the headers were hardly read"
    wrong = {
        name: (hex(ours[name]), text) for name, text in theirs.items() if int(text, 16) != ours[name] & ((1 << 64) - 1)
    }
    assert not wrong, f"ours and the headers' {headers.name} values"


def test_layouts(headers: Headers) -> None:
    """Sizes, and the offset and size of each member by path.

    A layout that has grown since these headers must agree in all members that they know; its size is theirs.
    """
    values, lines = expected_layouts(headers)
    theirs = headers.evaluate(lines)
    assert len(theirs) > 1000, "the headers were hardly read"
    grown = {key.partition(".")[0] for key in lines.keys() - theirs.keys()} | ENDED_DIFFERENTLY.keys()
    sizes = grown | {f"{tag}.{path} size" for tag, path in members_that_are(grown)}
    wrong = {
        key: (values[key], text)
        for key, text in theirs.items()
        if text != values[key] and not (key in sizes and int(text) != 0)
    }
    assert not wrong, f"ours and the headers' ({headers.name})"


def test_nothing_is_missing(headers: Headers) -> None:
    """Every macro, enumerator and struct of the headers that concerns x86 is declared."""
    ours = declared.constants().keys() | declared.layouts().keys()
    missing = {name for name in headers.constants | headers.structs.keys() if name not in ours and not excluded(name)}
    assert not missing, sorted(missing)


def test_nothing_is_invented(request: pytest.FixtureRequest) -> None:
    """Every declared name is known to some headers; without newer ones those that are not are shown and skipped."""
    sets = header_sets(request.config)
    ours = declared.constants()
    known: set[str] = set()
    members: set[str] = set()
    for headers in sets:
        known |= headers.evaluate({name: number_line(name) for name in ours}).keys()
        known |= headers.structs.keys()
        members |= headers.evaluate(expected_layouts(headers)[1]).keys()
    # Members whose type has no name in C.
    nested = {kind for layout in declared.layouts().values() for kind in declared.inner_layouts(layout)}
    unknown = {name for name in ours if name not in known}
    unknown |= {name for name, layout in declared.layouts().items() if name not in known and layout not in nested}
    for headers in sets[-1:]:
        unknown |= {key.split()[0] for key in expected_layouts(headers)[1] if key not in members}
    if unknown and len(sets) == 1:
        pytest.skip(f"the system's headers are older and do not know: {', '.join(sorted(unknown))}")
    assert not unknown, sorted(unknown)
