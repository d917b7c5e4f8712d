"""vmonty.kvm.uapi against the kernel's headers: every size, offset and number, in both directions.

``--kvm-headers=DIR`` (repeatable) adds newer headers: both sets must agree with what is declared.
"""

from __future__ import annotations

import ctypes
import re

import pytest

from . import declared
from .headers import Headers, number_line, struct_lines

# Of other architectures, of interfaces that x86 never had, and of the headers' own making.
OTHER_ARCHITECTURES = re.compile(
    r"KVM_(CAP_|EXIT_|GET_|SET_|VM_|DEV_|REG_|SYSTEM_EVENT_|IRQ_ROUTING_|MP_STATE_|VCPU_|DIRTY_|HAS_|CREATE_|MEM_|DEV_TYPE_)*"
    r"(S390|PPC|ARM|ARM64|MIPS|RISCV|LOONGARCH|SPAPR|XICS|XIVE|BOOK3S|PVINFO|NESTED_HV|FLIC)"
)
EXCLUDED = {
    r"KVM_S390\w*|\w*S390\w*|KVM_SYNC_(PREFIX|GPRS|ACRS|CRS)\w*": "S390",
    r"\w*PPC\w*|\w*SPAPR\w*|KVM_PVINFO\w*|\w*(XICS|XIVE|HPT|RMA|HTM|PAPR|EPR|OSI)\w*|KVM_(CREATE_SPAPR\w*|ALLOCATE_RMA)": "PowerPC",
    r"\w*(ARM|VGIC|SMCCC|PSCI|NISV)\w*|KVM_DIRTY_LOG_RING_ARM\w*|KVM_REG_ARM\w*|KVM_EXIT_HYPERCALL_ARM\w*": "ARM",
    r"\w*MIPS\w*": "MIPS",
    r"\w*RISCV\w*|\w*AIA\w*": "RISC-V",
    r"\w*LOONGARCH\w*": "LoongArch",
}
ALWAYS = {
    r"_\w*|__\w*": "the headers' own guards and helpers",
    r"KVM_TRC_\w*|KVM_TRACE_\w*": "tracing of Linux before 2.6.31",
    r"KVM_IRQFD_RESAMPLE|KVM_GET_SUPPORTED\w*_OLD": "never part of an interface",
}
NOT_OURS = {**EXCLUDED, **ALWAYS}


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
    """Sizes, and the offset and size of each member by path."""
    values, lines = expected_layouts(headers)
    theirs = headers.evaluate(lines)
    assert len(theirs) > 1000, "the headers were hardly read"
    wrong = {key: (values[key], text) for key, text in theirs.items() if text != values[key]}
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
    nested = {name for name in declared.layouts() if re.search(r"_(u|s|smm|chip|hdr|data|redirtbl|fields)(_|$)", name)}
    unknown = {name for name in ours if name not in known}
    unknown |= {name for name in declared.layouts() if name not in known and name not in nested}
    for headers in sets[-1:]:
        unknown |= {key.split()[0] for key in expected_layouts(headers)[1] if key not in members}
    if unknown and len(sets) == 1:
        pytest.skip(f"the system's headers are older and do not know: {', '.join(sorted(unknown))}")
    assert not unknown, sorted(unknown)
