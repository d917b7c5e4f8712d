"""Fuzz of the processor: random code in every mode, with random tables, registers and controls.

    python -m tests.cpu.fuzz --seconds 60 --seed 1

A case is made from its seed alone. Its guest is executed instruction by instruction, translated with exact flags (a
fault in other translations pushes any value for the arithmetic flags that its instruction overwrites), and
translated as usual in memory at two host addresses, at one with room for 16 return predictions. All that the guest
can see has to be the same: a difference is host state that leaked, or a translation that does not do what its
instructions do. RAM stands between pages that nobody may touch, and cases run in a child process whose watchdog
clears the run flag; a crash, or a guest that does not come out then, is a failure as well. The failing seed is
printed; ``--case N`` runs one, and tells more.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from vmonty.cpu import inspection
from vmonty.cpu.core import Cpu
from vmonty.cpu.observe import Access, Event, Instruction, Observer
from vmonty.cpu.vmcs import Field as F
from vmonty.cpu.vmx import Vmx
from vmonty.cpu.vmx_errors import VmxError
from vmonty.cpu.walks import SegmentState

SIZE = 128 << 10
ENDS = ("halt", "shutdown", "internal", "stopped", "exit 214", "exit 1 ", "run_flag", "vmfail")
STEPS = 400  # of the run instruction by instruction; the other two go on until their watchdog
HANGING = 20.0  # seconds after which a guest whose run flag was cleared counts as hanging
MODES = ("real", "vm86", "prot16", "prot32", "pae", "compat16", "compat32", "long", "vmx")
CODE, IDT, GDT, TSS, TABLES = 0x8000, 0x1000, 0x2000, 0x2800, 0x10000
REGISTERS = inspection.REGISTERS

# Instructions that mutation starts from: moves, stack, strings, branches, system, x87, vectors.
SEEDS = [
    bytes.fromhex(line)
    for line in [
        "01d8",
        "29c3",
        "0fafc1",
        "f7e1",
        "f7f1",
        "83c001",
        "c1e005",
        "d3c0",
        "0fc8",
        "88c4",
        "8a07",
        "8907",
        "8b4304",
        "894500",
        "0fb606",
        "0fbe07",
        "870f",
        "0fb10f",
        "f00fc107",
        "50",
        "58",
        "6a05",
        "ff7610",
        "8f0424",
        "9c",
        "9d",
        "c8100001",
        "c9",
        "60",
        "61",
        "e800000000",
        "e8fbffffff",
        "e8f0ffffff",
        "c3",
        "cb",
        "cf",
        "c20400",
        "eb00",
        "7502",
        "74fc",
        "e2fe",
        "e302",
        "ffe0",
        "ffd3",
        "ff10",
        "a4",
        "a5",
        "aa",
        "ab",
        "ac",
        "ae",
        "f3a4",
        "f3ab",
        "f2ae",
        "f3a6",
        "f3ac",
        "e440",
        "e641",
        "ec",
        "ee",
        "6c",
        "6e",
        "f4",
        "fa",
        "fb",
        "fc",
        "fd",
        "f8",
        "f9",
        "98",
        "99",
        "9e",
        "9f",
        "d7",
        "27",
        "2f",
        "37",
        "3f",
        "cc",
        "cd20",
        "ce",
        "f1",
        "0f0b",
        "0f05",
        "0f07",
        "0f34",
        "0f35",
        "0f20c0",
        "0f22c0",
        "0f20d8",
        "0f22d8",
        "0f20e0",
        "0f22e0",
        "0f21f8",
        "0f23f8",
        "0f2300",
        "0f0117",
        "0f011f",
        "0f01e0",
        "0f01f0",
        "0f0138",
        "0f01f8",
        "0f01ca",
        "0f01d0",
        "0f06",
        "0f09",
        "0f32",
        "0f30",
        "0fa2",
        "0f00d8",
        "0f00d0",
        "0f02c1",
        "0f03c1",
        "0f00e0",
        "8ed8",
        "8ec0",
        "8ed0",
        "8cd8",
        "1e",
        "1f",
        "06",
        "07",
        "16",
        "17",
        "0fa0",
        "0fa1",
        "c507",
        "c407",
        "0fb207",
        "ea00800800",
        "9a00800800",
        "66ea00800800",
        "ff2f",
        "ff1f",
        "d9e8",
        "d9ee",
        "dec1",
        "d806",
        "dd07",
        "dd1f",
        "d97e08",
        "d96e08",
        "dd37",
        "d937",
        "0fae07",
        "0fae0f",
        "0fae17",
        "0fae1f",
        "0f77",
        "dbe3",
        "9b",
        "0f10c1",
        "0f1107",
        "0f2807",
        "660f6f07",
        "660fefc0",
        "f20f58c1",
        "f30f5e07",
        "0f5807",
        "660f38000f",
        "660f3a0f0705",
        "c5fc100f",
        "c5f458c2",
        "c4e271b8c2",
        "0fc707",
        "0fa3c8",
        "0fab0f",
        "0fbcc1",
        "f30fb8c1",
        "0fa4c105",
        "0f44c1",
        "0f94c0",
        "0f1f00",
        "90",
        "f390",
        "0f1800",
        "0faee8",
    ]
]
# What no two runs agree on: RDTSC, RDTSCP, RDRAND, RDSEED, RDMSR, RDPMC, and RDPID of host numbers there is none.
CLOCKS = (b"\x0f\x31", b"\x0f\x01\xf9", b"\x0f\x32")


class GuardedRam:
    """Guest memory between two pages that fault, at a host address of its own."""

    def __init__(self, size: int, skew: int) -> None:
        self._hold = [mmap.mmap(-1, 4096 * (1 + skew))]  # other addresses in each run
        self._map = mmap.mmap(-1, size + 8192)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + 4096
        libc = ctypes.CDLL(None, use_errno=True)
        for guard in (self.address - 4096, self.address + size):
            if libc.mprotect(ctypes.c_void_p(guard), 4096, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self.bytes = (ctypes.c_ubyte * size).from_address(self.address)


@dataclass
class Case:
    """All that a guest starts from."""

    mode: str
    memory: bytearray
    values: dict[str, int] = field(default_factory=dict)
    segments: dict[str, SegmentState] = field(default_factory=dict)
    registers: list[int] = field(default_factory=list)
    controls: int = 0
    exceptions: int = 0


def _code(rng: random.Random, size: int) -> bytes:
    """Random bytes, valid instructions, or those with bits turned."""
    kind = rng.randrange(4)
    out = bytearray()
    while len(out) < size:
        if kind == 0:
            out += rng.randbytes(16)
            continue
        piece = bytearray(rng.choice(SEEDS))
        if rng.randrange(4) == 0:
            piece = bytearray([rng.choice(b"\x66\x67\xf2\xf3\xf0\x2e\x36\x64\x65\x40\x41\x44\x48\x49\x4c")]) + piece
        if kind == 3 and rng.randrange(3) == 0:
            piece[rng.randrange(len(piece))] ^= 1 << rng.randrange(8)
        out += piece
    return bytes(out[:size])


def _calls(rng: random.Random, wide: bool) -> bytes:
    """Calls that go deeper than the processor predicts returns, with random code on the way down and up."""
    down, up = (_code(rng, rng.choice((0, 0, 0, 3, 8, 20))) for _ in range(2))
    count = rng.choice((b"\xff\xc9", b"\xfe\xc9"))  # dec ecx, dec cl
    call = 5 if wide else 3
    body = down + count + b"\x74" + bytes([call])
    body += b"\xe8" + (-(len(body) + call) & (1 << 8 * call - 8) - 1).to_bytes(call - 1, "little")
    start = b"\xb9" + rng.choice((20, 60, 200)).to_bytes(call - 1, "little")
    return start + b"\xe8" + (1).to_bytes(call - 1, "little") + b"\xf4" + body + up + b"\xc3"


def _number(rng: random.Random) -> int:
    return rng.choice(
        (rng.getrandbits(64), rng.randrange(SIZE), rng.randrange(SIZE), rng.randrange(SIZE), rng.randrange(256),
         SIZE - rng.randrange(32), 0x8000 - rng.randrange(32), (1 << 64) - 1 - rng.randrange(4096),
         1 << rng.randrange(64))
    )  # fmt: skip


def _descriptor(rng: random.Random) -> int:
    if rng.randrange(8) == 0:
        return rng.getrandbits(64)
    access = rng.choice(
        (0x93, 0x91, 0x97, 0x95, 0x9B, 0x9F, 0x99, 0xFB, 0xF3, 0xF7, 0x89, 0x81, 0x82, 0x8C, 0xEC, 0x85, 0x84)
    )
    flags = rng.choice((0, 4, 8, 12, 10, 2))
    limit = rng.choice((0xFFFFF, 0xFFFF, 0xFFF, 0x67, rng.getrandbits(20)))
    base = rng.choice((0, 0, 0, TSS, rng.randrange(SIZE)))
    return (
        limit & 0xFFFF | (base & 0xFFFFFF) << 16 | access << 40 | (limit >> 16) << 48 | flags << 52 | (base >> 24) << 56
    )


def _tables(rng: random.Random, case: Case, levels: int) -> None:
    """Page tables that mostly map the first megabytes one to one."""

    def put(at: int, value: int, size: int) -> None:
        case.memory[at : at + size] = value.to_bytes(size, "little")

    wide = 8 if levels > 2 else 4
    for level in range(levels - 1):
        put(TABLES + 4096 * level, TABLES + 4096 * (level + 1) | (1 if levels == 3 and level == 0 else 7), wide)
    last = TABLES + 4096 * (levels - 1)
    for page in range(SIZE >> 12):
        flags = 0x67 if rng.randrange(8) else rng.choice((0, 1, 3, 5, 7, 0x21, 0x161, 0x167))
        entry = page << 12 | flags
        if wide == 8 and rng.randrange(16) == 0:
            entry |= 1 << 63
        if rng.randrange(24) == 0:
            entry = rng.getrandbits(8 * wide) if rng.randrange(2) else rng.randrange(4 * SIZE) & ~0xFFF | flags
        if page == CODE >> 12:
            entry = CODE | 0x67
        put(last + wide * page, entry, wide)


def make(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    mode = rng.choice(MODES)
    case = Case(mode, bytearray(SIZE))
    memory, v = case.memory, case.values
    if rng.randrange(2):
        memory[:] = rng.randbytes(SIZE)
    memory[CODE : CODE + 512] = _code(rng, 512)
    if rng.randrange(4) == 0:
        calls = _calls(rng, mode in ("prot32", "pae", "compat32", "long", "vmx"))
        memory[CODE : CODE + len(calls)] = calls
    for at in range(0x4000, 0x5000, 16):  # handlers
        memory[at : at + 16] = _code(rng, 15) + b"\xf4" if rng.randrange(2) else b"\xf4" * 16
    wide = mode in ("compat16", "compat32", "long", "vmx")
    gdt = [0] + [_descriptor(rng) for _ in range(31)]
    gdt[1] = {True: 0x00AF9B000000FFFF, False: 0x00CF9B000000FFFF}[wide]
    gdt[2], gdt[3], gdt[4] = 0x00CF93000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF
    memory[GDT : GDT + 256] = b"".join(entry.to_bytes(8, "little") for entry in gdt)
    for vector in range(64):
        handler = 0x4000 + 16 * vector
        kind = rng.choice((0x8E, 0x8E, 0x8F, 0xEE, 0x86, 0x85, rng.randrange(256)))
        gate = handler | 8 << 16 | kind << 40
        if mode == "real":
            memory[4 * vector : 4 * vector + 4] = handler.to_bytes(4, "little")
        elif wide:
            memory[IDT + 16 * vector : IDT + 16 * vector + 16] = gate.to_bytes(16, "little")
        else:
            memory[IDT + 8 * vector : IDT + 8 * vector + 8] = gate.to_bytes(8, "little")
    for at in range(4, 0x64, 8):
        memory[TSS + at : TSS + at + 8] = rng.choice((0x7000, 0x10_0000_7000)).to_bytes(8, "little")
    v["gdtr_base"], v["gdtr_limit"] = GDT, rng.choice((255, 255, 0xFFFF, 39))
    v["idtr_base"], v["idtr_limit"] = (0, 0x3FF) if mode == "real" else (IDT, rng.choice((0x3FF, 0xFFF, 0x7F)))
    v["cr0"] = {"real": 0x10, "vm86": 0x11, "prot16": 0x11, "prot32": 0x11}.get(mode, 0x80000011)
    if mode in ("prot32", "vm86") and rng.randrange(2):
        v["cr0"] |= 0x80000000
    v["cr0"] |= rng.choice((0, 0x20, 0x10022, 0x5002E & 0x50022, 0x8, 0x4))
    v["cr4"] = rng.choice((0x600, 0x40600, 0x640, 0x30640, 0, 0x40689, 0x300600)) | rng.choice(
        (0, 0, 3, 4, 8, 0x10, 0x80)
    )
    user = mode == "vm86" or (mode != "real" and rng.randrange(3) == 0)
    if wide:
        v["efer"] = 0xD01 if rng.randrange(4) else 0x501
        v["cr4"] |= 0x20
        _tables(rng, case, 4)
    else:
        v["efer"] = 0
        v["cr4"] &= ~0x20020
        if mode == "pae":
            v["cr4"] |= 0x20
            v["efer"] = 0x800
        _tables(rng, case, 3 if mode == "pae" else 2)
    v["cr3"], v["xcr0"], v["cpl"] = TABLES, rng.choice((1, 3, 7)), 3 if user else 0
    if v["cr4"] & 0x40000 == 0:
        v["xcr0"] = 7
    v["rflags"] = 2 | rng.getrandbits(12) & 0xCD5 | rng.choice((0, 0x200, 0x3000, 0x100, 0x40000))
    if mode == "vm86":
        v["rflags"] |= 0x20000
    v["star"], v["lstar"], v["fmask"] = 0x0013_0008 << 32, 0x4000, rng.choice((0, 0x700))
    v["sysenter_cs"], v["sysenter_esp"], v["sysenter_eip"] = 8, 0x7000, 0x4000
    v["rip"] = CODE + rng.choice((0, 0, 1, 3))
    if rng.randrange(6) == 0:
        v["dr0"], v["dr1"], v["dr7"] = (
            CODE + rng.randrange(32),
            rng.randrange(SIZE),
            rng.getrandbits(32) & 0xFFFF03FF | 0x400,
        )
    case.registers = [_number(rng) for _ in range(16)]
    case.registers[4] = rng.choice((0x7000, 0x7000, 0x7FF8, _number(rng)))
    rights = 0xF3 if user else 0x93
    for name in ("es", "ss", "ds", "fs", "gs"):
        if mode in ("real", "vm86"):
            selector = rng.choice((0, 0, 0x100, rng.randrange(0x2000)))
            case.segments[name] = SegmentState(selector, selector << 4, 0xFFFF, 0xF3 if mode == "vm86" else 0x93)
            continue
        base, limit, kind = 0, 0xFFFFFFFF, 0xC000 | rights
        if not wide and rng.randrange(3) == 0:
            base, limit = rng.randrange(SIZE) & ~15, rng.choice((0xFFFF, rng.randrange(SIZE), 0x1000))
            kind = rng.choice((0, 0x4000)) | rights | rng.choice((0, 0, 4))
        if mode in ("prot16", "compat16") and name == "ss":
            kind &= ~0x4000
        if name != "ss" and rng.randrange(12) == 0:
            kind |= 0x10000
        case.segments[name] = SegmentState(0x1B if user else 0x10, base, limit, kind)
    code = {
        "real": 0x9B,
        "vm86": 0xF3,
        "prot16": 0x9B,
        "prot32": 0xC09B,
        "pae": 0xC09B,
        "compat16": 0x9B,
        "compat32": 0xC09B,
    }
    kind = code.get(mode, 0xA09B)
    if user and mode != "vm86":
        kind |= 0x60
    limit = (
        0xFFFF if mode in ("real", "vm86", "prot16") or (rng.randrange(6) == 0 and not kind & 0x2000) else 0xFFFFFFFF
    )
    case.segments["cs"] = SegmentState(0 if mode in ("real", "vm86") else 0x23 if user else 8, 0, limit, kind)
    case.segments["tr"] = SegmentState(0x38, TSS, rng.choice((0x67, 0x67, 0x1FF)), 0x8B)
    case.controls = rng.getrandbits(32)
    case.exceptions = rng.choice((0, 0, rng.getrandbits(32)))
    return case


class Machine:
    """One incarnation of a case."""

    def __init__(self, case: Case, skew: int) -> None:
        self.case = case
        self.ram = GuardedRam(SIZE, skew)
        ctypes.memmove(self.ram.address, bytes(case.memory), SIZE)
        self.cpu = Cpu(4 << 20)
        self.vmx: Vmx | None = None
        if case.mode == "vmx":
            self._enter_vmx(skew)
        else:
            self.cpu.add_region(0, self.ram.bytes)
            for name, segment in case.segments.items():
                inspection.put_segment(self.cpu, name, segment)
            for name, value in case.values.items():
                inspection.put(self.cpu, name, value)
            inspection.put(self.cpu, "mode", 0)
        for number, register in enumerate(REGISTERS):
            if case.mode != "vmx" or number != 4:
                self.cpu[register] = case.registers[number]

    def _enter_vmx(self, skew: int) -> None:
        """Under VMX with EPT: RAM is mapped, but for some pages; the controls are random within what is offered."""
        case = self.case
        self.pages = GuardedRam(16 * 4096, skew + 1)
        at = self.pages.address
        for page in (0, 1):
            ctypes.c_uint32.from_address(at + page * 4096).value = 0x766D6F6E & 0x7FFFFFFF
        self.vmx = vmx = Vmx(self.cpu)
        revision = vmx.capability(0x480) & 0x7FFFFFFF
        for page in (0, 1):
            ctypes.c_uint32.from_address(at + page * 4096).value = revision
        vmx.vmxon(at)
        vmx.vmclear(at + 4096)
        vmx.vmptrld(at + 4096)
        for level in range(3):
            ctypes.c_uint64.from_address(at + (6 + level) * 4096).value = at + (7 + level) * 4096 | 7
        rng = random.Random(case.controls)
        for gfn in range(SIZE >> 12):
            flags = 0x37 if rng.randrange(12) else rng.choice((0x35, 0x33, 0x31, 0x30, 0x34, 0x32))
            ctypes.c_uint64.from_address(at + 9 * 4096 + 8 * gfn).value = self.ram.address + 4096 * gfn | flags
        ctypes.memset(at + 2 * 4096, rng.choice((0, 0xFF)), 4096)
        ctypes.memset(at + 3 * 4096, 0xFF, 8192)  # the host has no ports to lend

        def control(msr: int, wanted: int) -> int:
            value = vmx.capability(msr)
            return wanted & (value >> 32) | value & 0xFFFFFFFF

        w = vmx.vmwrite
        w(F.PIN_BASED_VM_EXEC_CONTROL, control(0x48D, 0x29))
        # RDTSC exits: no clock in what is compared. No TPR shadow, bitmaps as they are.
        w(
            F.CPU_BASED_VM_EXEC_CONTROL,
            control(
                0x48E, (case.controls | 1 << 12 | 1 << 24 | 1 << 31 | 1 << 28) & ~(1 << 21 | 1 << 22 | 4 | 1 << 27)
            ),
        )
        w(F.SECONDARY_VM_EXEC_CONTROL, control(0x48B, 0x2 | 0x80 | 0x20 | rng.getrandbits(21) & ~0x400 | 0x10800))
        w(F.VM_EXIT_CONTROLS, control(0x48F, 0x300204 | 0x40000))
        w(F.VM_ENTRY_CONTROLS, control(0x490, 0x8204))
        w(F.EXCEPTION_BITMAP, case.exceptions)
        for name, page in (("MSR_BITMAP", 2), ("IO_BITMAP_A", 3), ("IO_BITMAP_B", 4)):
            w(F[name], at + page * 4096)
        w(F.EPT_POINTER, at + 6 * 4096 | 0x1E)
        w(F.VIRTUAL_PROCESSOR_ID, 1)
        w(F.VMCS_LINK_POINTER, (1 << 64) - 1)
        w(F.GUEST_CR0, case.values["cr0"] | 0x21)
        w(F.GUEST_CR3, case.values["cr3"])
        w(F.GUEST_CR4, case.values["cr4"] & 0x3727FF | 0x2020)
        w(F.CR4_GUEST_HOST_MASK, 0x2000)
        w(F.GUEST_IA32_EFER, 0xD01)
        w(F.GUEST_DR7, 0x400)
        for name, segment in case.segments.items():
            rights = segment.access_rights
            for part, value in (("SELECTOR", segment.selector), ("BASE", segment.base), ("LIMIT", segment.limit),
                                ("AR_BYTES", rights)):  # fmt: skip
                w(F[f"GUEST_{name.upper()}_{part}"], value)
        w(F.GUEST_LDTR_AR_BYTES, 0x10000)
        for name in ("gdtr", "idtr"):
            w(F[f"GUEST_{name.upper()}_BASE"], case.values[f"{name}_base"])
            w(F[f"GUEST_{name.upper()}_LIMIT"], case.values[f"{name}_limit"])
        w(F.GUEST_RSP, case.registers[4])
        w(F.GUEST_RIP, CODE)
        w(F.GUEST_RFLAGS, case.values["rflags"] & 0x3F7FD7 & ~0x20000 | 2)

    def run(self) -> str:
        """Until something is reported, or the watchdog clears the run flag; in words."""
        stopper = threading.Timer(2, self.vmx.kick if self.vmx else self.cpu.kick)
        stopper.start()
        try:
            return self._run()
        finally:
            stopper.cancel()

    def _run(self) -> str:
        if self.vmx is None:
            return self.cpu.run()
        try:
            reason = self.vmx.run()
        except VmxError as error:
            return f"vmfail {error.number}"
        except RuntimeError as error:
            return f"stopped: {error}" if "reason 8" not in str(error) else "debug"
        vmx = self.vmx
        fields = (F.EXIT_QUALIFICATION, F.VM_EXIT_INTR_INFO, F.VM_EXIT_INTR_ERROR_CODE, F.IDT_VECTORING_INFO_FIELD)
        information = [vmx.vmread(field) for field in fields]
        return f"exit {reason} {information}"

    def answer(self) -> None:
        """What a device would do: reads give zero."""
        if self.vmx is None:
            self.cpu.answer(0)
        else:
            self.vmx.vmwrite(F.GUEST_RIP, self.vmx.vmread(F.GUEST_RIP) + self.vmx.vmread(F.VM_EXIT_INSTRUCTION_LEN))

    def visible(self) -> dict[str, object]:
        """All that the guest could see."""
        state: dict[str, object] = inspection.debug_state(self.cpu)
        for name in (
            "tsc_offset",
            "nested_root",
            "vectoring",
            "interrupt_line",
            "direct",
            "nested",
            "mode",
            "guest_mode",
        ):
            state.pop(name, None)
        state["rflags"] = inspection.get(self.cpu, "rflags") & ~0x10000  # RF stays behind iterations that run alone
        state["xsave"] = settled(self.cpu.xsave)
        state["memory"] = bytes(self.ram.bytes)
        return state


def settled(image: bytes) -> bytes:
    """An XSAVE area whose bit of XMM registers tells whether they are zeroes.

    Processors may call that state in use (SDM, 13.6 "Processor Tracking of XSAVE-Managed State"), and those of AMD do
    so from one context switch of the host's to another.
    """
    out = bytearray(image)
    out[512] = out[512] & ~2 | 2 * any(out[160:416])
    return bytes(out)


def difference(one: dict[str, object], two: dict[str, object]) -> str:
    """In which names two states differ, and how."""
    found = []
    for name in one:
        if one[name] == two.get(name):
            continue
        a, b = one[name], two.get(name)
        if isinstance(a, bytes) and isinstance(b, bytes):
            at = next(n for n in range(len(a)) if a[n] != b[n])
            found.append(f"{name}+{at:#x}: {a[at : at + 8].hex()} {b[at : at + 8].hex()}")
        elif isinstance(a, int) and isinstance(b, int):
            found.append(f"{name}: {a:#x} {b:#x}")
        else:
            found.append(f"{name}: {a} {b}")
    return "; ".join(found)


class Uncertain(Exception):
    """The guest looked at a clock or at random numbers; or did what the manual leaves open."""


def compares(trace: list[Instruction]) -> bool:
    """Is the last instruction a repeated CMPS or SCAS?"""
    return bool(trace) and trace[-1].text.startswith(("repe ", "repne ")) and trace[-1].text[-5:-1] in ("cmps", "scas")


def run_case(seed: int, tell: bool = False) -> str:
    """Run one case; what is wrong with it, or ""."""
    case = make(seed)
    stepped, count, trace = Machine(case, 0), 0, list[Instruction]()

    def watch(i: Instruction) -> None:
        body = i.code.lstrip(b"\x66\x67\xf2\xf3\xf0\x2e\x3e\x26\x36\x64\x65")
        while i.bits == 64 and body and body[0] >> 4 == 4:
            body = body[1:]
        trace.append(i)
        if (
            body.startswith(CLOCKS)
            or (body[:2] == b"\x0f\xc7" and body[2:3] >= b"\xf0")
            or body.startswith(b"\x0f\x33")
        ):
            raise Uncertain

    def fault(e: Event) -> None:
        """Of repeated comparisons: the flags are those from before, and by steps each iteration has its own."""
        if e.kind == "exception" and compares(trace):
            raise Uncertain

    def touch(a: Access) -> None:
        """Page tables that change without INVLPG; a repeated string instruction that overwrites itself."""
        physical = a.physical - stepped.ram.address if a.physical >= stepped.ram.address else a.physical
        if a.write and TABLES <= physical < TABLES + 0x4000:
            raise Uncertain
        if a.write and not a.implicit and trace and trace[-1].rip == a.rip and (a.linear ^ trace[-1].linear) < 0x2000:
            raise Uncertain

    reasons: list[str] = []
    try:
        with Observer(stepped.cpu, on_instruction=watch, on_memory=touch, on_event=fault) as observer:
            while count < 40 and observer.instructions < STEPS:
                reason = stepped.run()
                reasons.append(reason)
                count += 1
                if reason.startswith(ENDS):
                    break
                stepped.answer()
    except Uncertain:
        return ""
    if reasons[-1] == "run_flag" or reasons[-1].startswith("exit 1 "):
        return ""  # an endless guest
    if reasons[-1] == "mmio" and compares(trace):
        return ""  # in its middle
    ended = stepped.visible()
    if tell:
        for i in trace[-60:]:
            print(f"{i.rip:#x} {i.code.hex()} {i.text}")
        print(case.mode, reasons)
    if reasons[-1].startswith(("internal", "stopped")):
        return f"the processor stopped: {reasons[-1]}"
    states = []
    for exact, skew in ((True, 1), (False, 2), (False, 7)):
        machine = Machine(case, skew)
        machine.cpu.keep_flags(exact)
        if skew == 7:
            machine.cpu.predict_returns(16)
        seen = _follow(machine, len(reasons))
        states.append((seen, machine.visible()))
        if exact and seen != reasons:
            number = next(n for n in range(len(reasons)) if seen[n : n + 1] != reasons[n : n + 1])
            return f"exit {number}: {reasons[number]} stepped, {seen[number : number + 1]} translated"
        if exact and (wrong := difference(ended, states[0][1])):
            return f"stepped and translated: {wrong}"
    if states[1][0] != states[2][0]:
        return f"exits at two addresses: {states[1][0]} {states[2][0]}"
    if wrong := difference(states[1][1], states[2][1]):
        return f"at two addresses: {wrong}"
    return ""


def _follow(machine: Machine, exits: int) -> list[str]:
    """Run up to that many exits, as the run by steps did."""
    seen: list[str] = []
    while len(seen) < exits:
        seen.append(machine.run())
        if seen[-1].startswith(ENDS):
            break
        machine.answer()
    return seen


def _worker(connection: Connection, seeds: Iterator[int], until: float) -> None:
    for seed in seeds:
        if time.monotonic() > until:
            break
        connection.send((seed, None))
        connection.send((seed, run_case(seed)))
    connection.send((None, None))


def fuzz(seconds: float, first: int, cases: int = 1 << 40, out: object = None) -> tuple[int, list[tuple[int, str]]]:
    """Run cases for a time; how many, and what failed."""
    until = time.monotonic() + seconds
    failures: list[tuple[int, str]] = []
    seed, done = first, 0
    context = multiprocessing.get_context("fork")
    while time.monotonic() < until and seed < first + cases:
        mine, theirs = context.Pipe()
        child = context.Process(target=_worker, args=(theirs, iter(range(seed, first + cases)), until))
        child.start()
        theirs.close()
        current: int | None = seed
        wrong: str | None = None
        while True:
            try:
                if not mine.poll(HANGING):
                    wrong = "it hangs, and clearing the run flag does not end it"
                    break
                current, result = mine.recv()
            except EOFError:
                child.join()
                wrong = f"the process died: exit code {child.exitcode}"
                break
            if current is None:
                break
            seed = current
            if result is not None:
                done += 1
                if result:
                    failures.append((current, result))
                    print(f"case {current} ({make(current).mode}): {result}", file=sys.stderr, flush=True)
        child.kill()
        child.join()
        if wrong is None:
            break
        failures.append((seed, wrong))
        print(f"case {seed} ({make(seed).mode}): {wrong}", file=sys.stderr, flush=True)
        seed += 1
    return done, failures


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="run this one and show its last instructions")
    options = parser.parse_args()
    if options.case is not None:
        wrong = run_case(options.case, tell=True)
        print(wrong or "nothing is wrong")
        return bool(wrong)
    done, failures = fuzz(options.seconds, options.seed << 32)
    print(f"{done} cases, {len(failures)} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
