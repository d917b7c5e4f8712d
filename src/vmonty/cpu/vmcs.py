"""The VMCS: one table of fields, from which access, dumps, documentation and the C names are made.

A VMCS is a 4 KiB region with a layout of our own. The encoding of a field says all about it. SDM, "Field Encoding in
VMCS"::

    14..13 width (0: 16 bits, 1: 64, 2: 32, 3: natural) | 11..10 kind (0 control, 1 exit information, 2 guest, 3 host)
    9..1 index | 0 high half of a 64-bit field

Exit information is read-only. Each field has a slot of 8 bytes at ``offset(encoding)``; the slots of the combination
that has no
fields (16-bit exit information) come first and hold the header: revision identifier, abort indicator, launch state.

``python -m vmonty.cpu.vmcs`` prints ``vmcs.pxd``; a test compares it with the file.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import NamedTuple

REVISION = 0x766D6F6E  # IA32_VMX_BASIC bits 30:0
REGION_SIZE = 4096

# Header, offsets in the region.
HEADER_REVISION = 0
HEADER_ABORT = 4
HEADER_LAUNCHED = 8


class Field(IntEnum):
    """Fields by their SDM encodings. SDM, "Field Encoding in VMCS"; names as the Linux kernel has them."""

    # 16-bit
    VIRTUAL_PROCESSOR_ID = 0x0000
    GUEST_ES_SELECTOR = 0x0800
    GUEST_CS_SELECTOR = 0x0802
    GUEST_SS_SELECTOR = 0x0804
    GUEST_DS_SELECTOR = 0x0806
    GUEST_FS_SELECTOR = 0x0808
    GUEST_GS_SELECTOR = 0x080A
    GUEST_LDTR_SELECTOR = 0x080C
    GUEST_TR_SELECTOR = 0x080E
    HOST_ES_SELECTOR = 0x0C00
    HOST_CS_SELECTOR = 0x0C02
    HOST_SS_SELECTOR = 0x0C04
    HOST_DS_SELECTOR = 0x0C06
    HOST_FS_SELECTOR = 0x0C08
    HOST_GS_SELECTOR = 0x0C0A
    HOST_TR_SELECTOR = 0x0C0C
    # 64-bit
    IO_BITMAP_A = 0x2000
    IO_BITMAP_B = 0x2002
    MSR_BITMAP = 0x2004
    VM_EXIT_MSR_STORE_ADDR = 0x2006
    VM_EXIT_MSR_LOAD_ADDR = 0x2008
    VM_ENTRY_MSR_LOAD_ADDR = 0x200A
    TSC_OFFSET = 0x2010
    VIRTUAL_APIC_PAGE_ADDR = 0x2012
    APIC_ACCESS_ADDR = 0x2014
    EPT_POINTER = 0x201A
    TSC_MULTIPLIER = 0x2032
    GUEST_PHYSICAL_ADDRESS = 0x2400
    VMCS_LINK_POINTER = 0x2800
    GUEST_IA32_DEBUGCTL = 0x2802
    GUEST_IA32_PAT = 0x2804
    GUEST_IA32_EFER = 0x2806
    GUEST_PDPTR0 = 0x280A
    GUEST_PDPTR1 = 0x280C
    GUEST_PDPTR2 = 0x280E
    GUEST_PDPTR3 = 0x2810
    HOST_IA32_PAT = 0x2C00
    HOST_IA32_EFER = 0x2C02
    # 32-bit
    PIN_BASED_VM_EXEC_CONTROL = 0x4000
    CPU_BASED_VM_EXEC_CONTROL = 0x4002
    EXCEPTION_BITMAP = 0x4004
    PAGE_FAULT_ERROR_CODE_MASK = 0x4006
    PAGE_FAULT_ERROR_CODE_MATCH = 0x4008
    CR3_TARGET_COUNT = 0x400A
    VM_EXIT_CONTROLS = 0x400C
    VM_EXIT_MSR_STORE_COUNT = 0x400E
    VM_EXIT_MSR_LOAD_COUNT = 0x4010
    VM_ENTRY_CONTROLS = 0x4012
    VM_ENTRY_MSR_LOAD_COUNT = 0x4014
    VM_ENTRY_INTR_INFO_FIELD = 0x4016
    VM_ENTRY_EXCEPTION_ERROR_CODE = 0x4018
    VM_ENTRY_INSTRUCTION_LEN = 0x401A
    TPR_THRESHOLD = 0x401C
    SECONDARY_VM_EXEC_CONTROL = 0x401E
    PLE_GAP = 0x4020
    PLE_WINDOW = 0x4022
    VM_INSTRUCTION_ERROR = 0x4400
    VM_EXIT_REASON = 0x4402
    VM_EXIT_INTR_INFO = 0x4404
    VM_EXIT_INTR_ERROR_CODE = 0x4406
    IDT_VECTORING_INFO_FIELD = 0x4408
    IDT_VECTORING_ERROR_CODE = 0x440A
    VM_EXIT_INSTRUCTION_LEN = 0x440C
    VMX_INSTRUCTION_INFO = 0x440E
    GUEST_ES_LIMIT = 0x4800
    GUEST_CS_LIMIT = 0x4802
    GUEST_SS_LIMIT = 0x4804
    GUEST_DS_LIMIT = 0x4806
    GUEST_FS_LIMIT = 0x4808
    GUEST_GS_LIMIT = 0x480A
    GUEST_LDTR_LIMIT = 0x480C
    GUEST_TR_LIMIT = 0x480E
    GUEST_GDTR_LIMIT = 0x4810
    GUEST_IDTR_LIMIT = 0x4812
    GUEST_ES_AR_BYTES = 0x4814
    GUEST_CS_AR_BYTES = 0x4816
    GUEST_SS_AR_BYTES = 0x4818
    GUEST_DS_AR_BYTES = 0x481A
    GUEST_FS_AR_BYTES = 0x481C
    GUEST_GS_AR_BYTES = 0x481E
    GUEST_LDTR_AR_BYTES = 0x4820
    GUEST_TR_AR_BYTES = 0x4822
    GUEST_INTERRUPTIBILITY_INFO = 0x4824
    GUEST_ACTIVITY_STATE = 0x4826
    GUEST_SMBASE = 0x4828
    GUEST_SYSENTER_CS = 0x482A
    VMX_PREEMPTION_TIMER_VALUE = 0x482E
    HOST_IA32_SYSENTER_CS = 0x4C00
    # natural width
    CR0_GUEST_HOST_MASK = 0x6000
    CR4_GUEST_HOST_MASK = 0x6002
    CR0_READ_SHADOW = 0x6004
    CR4_READ_SHADOW = 0x6006
    CR3_TARGET_VALUE0 = 0x6008
    CR3_TARGET_VALUE1 = 0x600A
    CR3_TARGET_VALUE2 = 0x600C
    CR3_TARGET_VALUE3 = 0x600E
    EXIT_QUALIFICATION = 0x6400
    GUEST_LINEAR_ADDRESS = 0x640A
    GUEST_CR0 = 0x6800
    GUEST_CR3 = 0x6802
    GUEST_CR4 = 0x6804
    GUEST_ES_BASE = 0x6806
    GUEST_CS_BASE = 0x6808
    GUEST_SS_BASE = 0x680A
    GUEST_DS_BASE = 0x680C
    GUEST_FS_BASE = 0x680E
    GUEST_GS_BASE = 0x6810
    GUEST_LDTR_BASE = 0x6812
    GUEST_TR_BASE = 0x6814
    GUEST_GDTR_BASE = 0x6816
    GUEST_IDTR_BASE = 0x6818
    GUEST_DR7 = 0x681A
    GUEST_RSP = 0x681C
    GUEST_RIP = 0x681E
    GUEST_RFLAGS = 0x6820
    GUEST_PENDING_DBG_EXCEPTIONS = 0x6822
    GUEST_SYSENTER_ESP = 0x6824
    GUEST_SYSENTER_EIP = 0x6826
    HOST_CR0 = 0x6C00
    HOST_CR3 = 0x6C02
    HOST_CR4 = 0x6C04
    HOST_FS_BASE = 0x6C06
    HOST_GS_BASE = 0x6C08
    HOST_TR_BASE = 0x6C0A
    HOST_GDTR_BASE = 0x6C0C
    HOST_IDTR_BASE = 0x6C0E
    HOST_IA32_SYSENTER_ESP = 0x6C10
    HOST_IA32_SYSENTER_EIP = 0x6C12
    HOST_RSP = 0x6C14
    HOST_RIP = 0x6C16


KINDS = ("control", "exit information", "guest state", "host state")
WIDTHS = (16, 64, 32, 64)


class FieldInfo(NamedTuple):
    """What an encoding says: width in bits, kind (one of KINDS), read-only, byte offset in our region."""

    name: str
    encoding: int
    width: int
    natural: bool
    kind: str
    read_only: bool
    offset: int


def offset(encoding: int) -> int:
    """Byte offset of a field's slot in the region."""
    group = (encoding >> 10 & 3) | (encoding >> 13 & 3) << 2
    return (group ^ 1) << 8 | (encoding >> 1 & 31) << 3


@cache
def info(field: Field) -> FieldInfo:
    """Describe one field."""
    width, kind = field >> 13 & 3, field >> 10 & 3
    return FieldInfo(field.name, int(field), WIDTHS[width], width == 3, KINDS[kind], kind == 1, offset(field))


def dump(region: bytes | bytearray | memoryview) -> dict[str, int]:
    """Read every field of a region, by name: what ``dump_vmcs`` shows."""
    values = {}
    for field in Field:
        description = info(field)
        at, size = description.offset, description.width // 8
        values[field.name] = int.from_bytes(region[at : at + size], "little")
    return values


def c_names() -> str:
    """Give the text of ``vmcs.pxd``."""
    lines = [
        '"""Made by ``python -m vmonty.cpu.vmcs`` from the table in vmcs.py; a test compares them."""',
        "",
        "from libc.stdint cimport uint8_t, uint32_t, uint64_t",
        "",
        "cdef enum:",
        f"    VMCS_REVISION = {REVISION:#x}",
        f"    HEADER_REVISION = {HEADER_REVISION}",
        f"    HEADER_ABORT = {HEADER_ABORT}",
        f"    HEADER_LAUNCHED = {HEADER_LAUNCHED}",
        *(f"    {field.name} = {field:#06x}" for field in Field),
        "",
        "",
        "cdef inline uint64_t *slot(uint8_t *region, uint32_t encoding) noexcept nogil:",
        '    """Where a field is; with a constant encoding the compiler folds this to one address."""',
        "    return <uint64_t *> (",
        "        region + (((((encoding >> 10) & 3) | (((encoding >> 13) & 3) << 2)) ^ 1) << 8)"
        " + (((encoding >> 1) & 31) << 3))",
        "",
        "",
        "cdef inline uint64_t get(uint8_t *region, uint32_t encoding) noexcept nogil:",
        '    """Read a field without checks."""',
        "    return slot(region, encoding)[0]",
        "",
        "",
        "cdef inline void put(uint8_t *region, uint32_t encoding, uint64_t value) noexcept nogil:",
        '    """Write a field without checks; the value must fit its width."""',
        "    slot(region, encoding)[0] = value",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(c_names(), end="")
