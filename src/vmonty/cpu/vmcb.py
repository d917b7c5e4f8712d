"""The VMCB: one table of fields, from which access, dumps, documentation and the C names are made.

A VMCB is a 4 KiB page with the layout of the APM, "Layout of VMCB": the control area in its first KiB, the state save
area behind it. A field's number here says all about it::

    15..12 size in bytes (1, 2, 4, 8) | 11..0 offset in the page

A segment takes 16 bytes: selector, attributes (descriptor bits 55:52 and 47:40 side by side), limit in bytes, base.
Exit codes up to A6h are bits of the six intercept words: word = code / 32.

``python -m vmonty.cpu.vmcb`` prints ``vmcb.pxd``; a test compares it with the file.
"""

from __future__ import annotations

from enum import IntEnum

from vmonty.base.ram import Ram

PAGE_SIZE = 4096
IOPM_SIZE, MSRPM_SIZE = 3 * PAGE_SIZE, 2 * PAGE_SIZE


class Field(IntEnum):
    """Fields by size and offset. APM, "VMCB Layout, Control Area" and "VMCB Layout, State Save Area"."""

    # Control area: what is intercepted. A bit of these six words is an exit code. APM, "Intercept Operation"
    INTERCEPT_CR = 0x4000
    INTERCEPT_DR = 0x4004
    INTERCEPT_EXCEPTIONS = 0x4008
    INTERCEPT_WORD3 = 0x400C
    INTERCEPT_WORD4 = 0x4010
    INTERCEPT_WORD5 = 0x4014
    PAUSE_FILTER_THRESHOLD = 0x203C
    PAUSE_FILTER_COUNT = 0x203E
    IOPM_BASE_PA = 0x8040
    MSRPM_BASE_PA = 0x8048
    TSC_OFFSET = 0x8050
    ASID = 0x4058
    TLB_CONTROL = 0x105C
    INT_CTL = 0x4060
    INT_VECTOR = 0x4064
    INT_STATE = 0x8068
    EXITCODE = 0x8070
    EXITINFO1 = 0x8078
    EXITINFO2 = 0x8080
    EXITINTINFO = 0x8088
    NP_ENABLE = 0x8090
    EVENTINJ = 0x80A8
    N_CR3 = 0x80B0
    VIRT_EXT = 0x80B8
    CLEAN = 0x40C0
    NRIP = 0x80C8
    INSTRUCTION_BYTES = 0x10D0
    # State save area
    ES_SELECTOR = 0x2400
    ES_ATTRIB = 0x2402
    ES_LIMIT = 0x4404
    ES_BASE = 0x8408
    CS_SELECTOR = 0x2410
    CS_ATTRIB = 0x2412
    CS_LIMIT = 0x4414
    CS_BASE = 0x8418
    SS_SELECTOR = 0x2420
    SS_ATTRIB = 0x2422
    SS_LIMIT = 0x4424
    SS_BASE = 0x8428
    DS_SELECTOR = 0x2430
    DS_ATTRIB = 0x2432
    DS_LIMIT = 0x4434
    DS_BASE = 0x8438
    FS_SELECTOR = 0x2440
    FS_ATTRIB = 0x2442
    FS_LIMIT = 0x4444
    FS_BASE = 0x8448
    GS_SELECTOR = 0x2450
    GS_ATTRIB = 0x2452
    GS_LIMIT = 0x4454
    GS_BASE = 0x8458
    GDTR_LIMIT = 0x4464
    GDTR_BASE = 0x8468
    LDTR_SELECTOR = 0x2470
    LDTR_ATTRIB = 0x2472
    LDTR_LIMIT = 0x4474
    LDTR_BASE = 0x8478
    IDTR_LIMIT = 0x4484
    IDTR_BASE = 0x8488
    TR_SELECTOR = 0x2490
    TR_ATTRIB = 0x2492
    TR_LIMIT = 0x4494
    TR_BASE = 0x8498
    CPL = 0x14CB
    EFER = 0x84D0
    CR4 = 0x8548
    CR3 = 0x8550
    CR0 = 0x8558
    DR7 = 0x8560
    DR6 = 0x8568
    RFLAGS = 0x8570
    RIP = 0x8578
    RSP = 0x85D8
    RAX = 0x85F8
    STAR = 0x8600
    LSTAR = 0x8608
    CSTAR = 0x8610
    SFMASK = 0x8618
    KERNEL_GS_BASE = 0x8620
    SYSENTER_CS = 0x8628
    SYSENTER_ESP = 0x8630
    SYSENTER_EIP = 0x8638
    CR2 = 0x8640
    G_PAT = 0x8668
    DBGCTL = 0x8670
    BR_FROM = 0x8678
    BR_TO = 0x8680
    LAST_EXCEPTION_FROM = 0x8688
    LAST_EXCEPTION_TO = 0x8690


class ExitCode(IntEnum):
    """#VMEXIT codes. APM, "SVM Intercept Exit Codes". CR, DR and exception codes are ranges from the first of each."""

    READ_CR0 = 0x00
    WRITE_CR0 = 0x10
    READ_DR0 = 0x20
    WRITE_DR0 = 0x30
    EXCEPTION_DE = 0x40
    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    CR0_SEL_WRITE = 0x65
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    PUSHF = 0x70
    POPF = 0x71
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SWINT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    IOIO = 0x7B
    MSR = 0x7C
    TASK_SWITCH = 0x7D
    FERR_FREEZE = 0x7E
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    RDTSCP = 0x87
    ICEBP = 0x88
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    MWAIT_CONDITIONAL = 0x8C
    XSETBV = 0x8D
    RDPRU = 0x8E
    INVPCID = 0xA2
    NPF = 0x400


INVALID = 0xFFFF_FFFF_FFFF_FFFF  # VMEXIT_INVALID: the consistency checks refused the VMCB


class Vmcb:
    """The VMCB at an offset of a Ram, field by field."""

    def __init__(self, ram: Ram, offset: int = 0) -> None:
        self.address = ram.address + offset
        self._ram = ram
        self._at = offset
        self._read = {1: ram.read_u8, 2: ram.read_u16, 4: ram.read_u32, 8: ram.read_u64}
        self._write = {1: ram.write_u8, 2: ram.write_u16, 4: ram.write_u32, 8: ram.write_u64}

    def __getitem__(self, field: Field) -> int:
        return self._read[field >> 12](self._at + (field & 0xFFF))

    def __setitem__(self, field: Field, value: int) -> None:
        self._write[field >> 12](self._at + (field & 0xFFF), value)

    def intercept(self, code: int, on: bool = True) -> None:
        """Set or clear the intercept whose exit code is *code*."""
        at = self._at + (code >> 5) * 4
        bit = 1 << (code & 31)
        old = self._ram.read_u32(at)
        self._ram.write_u32(at, old | bit if on else old & ~bit)

    def intercepts(self, code: int) -> bool:
        """Whether it is intercepted."""
        return bool(self._ram.read_u32(self._at + (code >> 5) * 4) >> (code & 31) & 1)

    def instruction_bytes(self) -> bytes:
        """What decode assists fetched: up to 15 bytes of code at RIP."""
        at = self._at + (Field.INSTRUCTION_BYTES & 0xFFF)
        return self._ram.read(at + 1, self._ram.read_u8(at))


def dump(page: bytes | bytearray | memoryview) -> dict[str, int]:
    """Read every field of a VMCB, by name: what ``dump_vmcb`` shows."""
    return {
        field.name: int.from_bytes(page[field & 0xFFF : (field & 0xFFF) + (field >> 12)], "little") for field in Field
    }


def msrpm_bit(index: int) -> int | None:
    """The bit for reads of an MSR in the permission map (the next one is for writes); None: always intercepted.

    APM, "MSR Intercepts".
    """
    for block, base in enumerate((0, 0xC000_0000, 0xC001_0000)):
        if base <= index < base + 0x2000:
            return block * 0x4000 + 2 * (index - base)
    return None


def c_names() -> str:
    """Give the text of ``vmcb.pxd``."""
    lines = [
        '"""Made by ``python -m vmonty.cpu.vmcb`` from the tables in vmcb.py; a test compares them."""',
        "",
        "from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t",
        "",
        "cdef enum:",
        *(f"    VMCB_{field.name} = {field & 0xFFF:#05x}" for field in Field),
        "",
        "# Exit codes",
        "cdef enum:",
        *(f"    SVM_{code.name} = {code:#05x}" for code in ExitCode),
    ]
    for bits in (8, 16, 32, 64):
        kind = f"uint{bits}_t"
        lines += [
            "", "",
            f"cdef inline {kind} get{bits}(uint8_t *vmcb, uint32_t offset) noexcept nogil:",
            f"    return (<{kind} *> (vmcb + offset))[0]",
            "", "",
            f"cdef inline void put{bits}(uint8_t *vmcb, uint32_t offset, {kind} value) noexcept nogil:",
            f"    (<{kind} *> (vmcb + offset))[0] = value",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(c_names(), end="")
