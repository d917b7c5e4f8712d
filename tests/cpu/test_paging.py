"""The page walker against a model of it in plain Python, and against the manual's rules one by one.

SDM, "Paging"; "The Extended Page-Table Mechanism (EPT)". APM, "Nested Paging".
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmonty.base.ram import Ram
from vmonty.cpu import inspection
from vmonty.cpu.core import Cpu
from vmonty.cpu.walks import ACCESS_EXEC, ACCESS_IMPLICIT, ACCESS_READ, ACCESS_USER, ACCESS_WRITE

PAGES = 48
ADDRESS = 0xFFFFFFFFFF000
WIDTH = 46
PG, WP, PAE, PSE, PGE, SMEP, SMAP = 1 << 31, 1 << 16, 1 << 5, 1 << 4, 1 << 7, 1 << 20, 1 << 21
LA57 = 1 << 12
NXE, LME_LMA, AC = 1 << 11, 0x500, 1 << 18

CPU = Cpu(1 << 20)
MEMORY = Ram(PAGES * 4096)
CPU.add_region(0, MEMORY.view(0, PAGES * 4096))
HOST = MEMORY.address


@dataclass(frozen=True)
class Setting:
    """What the model reads of the processor."""

    kind: str  # "32", "pae", "4", "5"
    wp: bool
    smep: bool
    smap: bool
    nxe: bool
    pse: bool
    pge: bool
    ac: bool

    def apply(self) -> None:
        cr4 = (self.smep and SMEP) | (self.smap and SMAP) | (self.pse and PSE) | (self.pge and PGE)
        cr4 |= 0 if self.kind == "32" else PAE
        cr4 |= LA57 if self.kind == "5" else 0
        inspection.put(CPU, "cr0", 0x11 | PG | (self.wp and WP))
        inspection.put(CPU, "cr4", cr4)
        inspection.put(CPU, "efer", (self.nxe and NXE) | (LME_LMA if self.kind in "45" else 0))
        inspection.put(CPU, "rflags", 2 | (self.ac and AC))
        inspection.put(CPU, "cr3", 0)


class Fault(Exception):
    """What the model found instead of a page."""


def model_walk(memory: bytearray, setting: Setting, pdptes: list[int], va: int, access: int) -> tuple[int, ...]:
    """Give (physical page, size, may_write, is_global, user), or raise Fault(error code). Sets A and D in *memory*."""
    user_access = bool(access & ACCESS_USER) and not access & ACCESS_IMPLICIT
    code = (2 if access & ACCESS_WRITE else 0) | (4 if user_access else 0)
    wide = setting.kind != "32"
    if access & ACCESS_EXEC and (setting.smep or (wide and setting.nxe)):
        code |= 16
    size, index_bits, entry_bytes = (8, 9, 8) if wide else (4, 10, 4)
    table, reserved = 0, 0
    if setting.kind in "45":
        shifts = [48, 39, 30, 21, 12][5 - int(setting.kind) :]
    elif setting.kind == "pae":
        va &= 0xFFFFFFFF
        shifts = [21, 12]
        if not pdptes[va >> 30] & 1:
            raise Fault(code)
        table = pdptes[va >> 30] & ADDRESS
        reserved |= 0x7FF << 52
    else:
        va &= 0xFFFFFFFF
        shifts = [22, 12]
    if wide:
        reserved |= ((1 << 52) - 1) & ~((1 << WIDTH) - 1)
        if not setting.nxe:
            reserved |= 1 << 63
    writable = user_page = True
    executable = True
    path = []
    for shift in shifts:
        at = table + (va >> shift & (1 << index_bits) - 1) * entry_bytes
        raw = memory[at : at + size] if at + size <= len(memory) else b"\xff" * size
        entry = int.from_bytes(raw, "little")
        if not entry & 1:
            raise Fault(code)
        large = entry & 0x80 and shift != 12 and (wide or setting.pse)
        bad = entry & reserved
        if wide and entry & 0x80 and shift != 12:
            bad |= 1 if shift >= 39 else entry & ((1 << shift) - 1) & ~0x1FFF
        if not wide and large:
            bad |= entry & 1 << 21
        if bad:
            raise Fault(code | 9)
        writable &= bool(entry & 2)
        user_page &= bool(entry & 4)
        executable &= not entry >> 63
        path.append((at, entry))
        if large or shift == 12:
            break
        table = entry & (ADDRESS if wide else 0xFFFFF000)

    def allowed(kind: int) -> bool:
        if user_access:
            if not user_page or (kind & ACCESS_WRITE and not writable):
                return False
            return not kind & ACCESS_EXEC or executable
        if kind & ACCESS_EXEC:
            return executable and not (user_page and setting.smep)
        if user_page and setting.smap and (access & ACCESS_IMPLICIT or not setting.ac):
            return False
        return not kind & ACCESS_WRITE or writable or not setting.wp

    if not allowed(access):
        raise Fault(code | 1)
    leaf = 0
    for at, entry in path:
        leaf = entry | 0x20 | (0x40 if (at, entry) == path[-1] and access & ACCESS_WRITE else 0)
        if at + size <= len(memory):
            memory[at : at + size] = leaf.to_bytes(size, "little")
    mask = (1 << shift) - 1
    base = leaf & (ADDRESS if wide else 0xFFFFF000) & ~mask
    if not wide and shift == 22:
        base |= (leaf >> 13 & 0xFF) << 32
    may_write = bool(leaf & 0x40) and not access & ACCESS_EXEC and allowed(access | ACCESS_WRITE)
    return (base | va & mask) & ~0xFFF, 1 << shift, may_write, setting.pge and bool(leaf & 0x100), user_page


settings_strategy = st.builds(Setting, st.sampled_from(["32", "pae", "4", "5"]), *(st.booleans() for _ in range(7)))
accesses = st.sampled_from(
    [a | u for a in (ACCESS_READ, ACCESS_WRITE, ACCESS_EXEC) for u in (0, ACCESS_USER)]
    + [ACCESS_IMPLICIT, ACCESS_IMPLICIT | ACCESS_WRITE, ACCESS_IMPLICIT | ACCESS_USER]
)


def random_tables(rng: random.Random, wide: bool) -> bytearray:
    """Tables in the first pages that mostly point at each other, with every kind of flag and defect."""
    memory = bytearray(PAGES * 4096)
    for page in range(12):
        for index in range(512 if wide else 1024):
            flags = rng.choice((7, 7, 3, 5, 0x67, 0x63, 0x27, 0x107, 0x87, 0xE7, 0x187, 0, 6))
            target = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 30, 47, 512, 1024)) << 12
            entry = target | flags
            if rng.random() < 0.05:
                entry |= 1 << rng.choice((13, 21, 22, 30) if not wide else (13, 20, 21, 29, 30, 46, 51, 52, 62, 63))
            if wide:
                memory[page * 4096 + index * 8 : page * 4096 + index * 8 + 8] = struct.pack("<Q", entry)
            else:
                memory[page * 4096 + index * 4 : page * 4096 + index * 4 + 4] = struct.pack("<I", entry & 0xFFFFFFFF)
    return memory


@settings(max_examples=40, deadline=None)
@given(setting=settings_strategy, seed=st.integers(0, 2**32), access=accesses)
def test_walk_is_the_models(setting: Setting, seed: int, access: int) -> None:
    rng = random.Random(seed)
    memory = random_tables(rng, setting.kind != "32")
    MEMORY.write(0, memory)
    setting.apply()
    pdptes = [rng.choice((0, 0x1001, 0x2001, 0x3001)) for _ in range(4)]
    inspection.set_pdptes(CPU, pdptes)
    for _ in range(60):
        va = rng.getrandbits({"4": 47, "5": 56}.get(setting.kind, 32))
        expected: tuple[int, ...] | Fault
        try:
            expected = model_walk(memory, setting, pdptes, va, access)
        except Fault as fault:
            expected = fault
        found = inspection.walk_page(CPU, va, access)
        if isinstance(expected, Fault):
            assert (found.fault, found.error_code) == ("page fault", expected.args[0]), hex(va)
        else:
            assert found.fault == ""
            physical, size, may_write, is_global, user = expected
            inside = physical < PAGES * 4096
            assert found.host == (HOST + physical if inside else 0)
            assert (found.physical, found.may_write, found.is_global, found.user) == (
                physical, may_write, is_global, user,
            )  # fmt: skip
            assert found.size == min(size, 4096)  # Regions promise one page
    assert MEMORY.read(0, PAGES * 4096) == bytes(memory)  # the same A and D flags


def fresh_cpu(kind: int = 0, root: int = 0) -> Cpu:
    """A processor without Regions whose physical addresses go through EPT (1), NPT (2), or nothing (0)."""
    cpu = Cpu(1 << 20)
    for name, value in (
        ("cr0", 0x80010011), ("cr4", 0x20), ("efer", 0xD00), ("cr3", 0), ("nested", kind), ("direct", 1),
        ("nested_root", root), ("guest_mode", 2 if kind == 2 else 0),
    ):  # fmt: skip
        inspection.put(cpu, name, value)
    return cpu


class TwoDimensions:
    """Guest tables in guest pages 0–3 (identity of va 0 … 2 MiB), the guest's pages spread over host memory."""

    def __init__(self, kind: int, a_d: bool = True) -> None:
        self.ram = Ram(64 * 4096)
        self.kind = kind
        self.root = 0
        self.a_d = a_d
        self.table = {level: 60 - level for level in range(4)}  # host pages of the nested tables
        link = 7
        for level in (3, 2, 1):
            self.write_host(self.table[level], 0, self.host(self.table[level - 1]) | link)
        for gfn in range(32):
            self.map(gfn)
        for level in range(3):
            self.write_guest(level, 0, (level + 1) << 12 | 7)
        for page in range(32):
            self.write_guest(3, page, page << 12 | 7)
        self.cpu = fresh_cpu(kind, self.host(self.table[3]) | ((0x1E | (0x40 if a_d else 0)) if kind == 1 else 0))

    def host(self, page: int) -> int:
        return self.ram.address + page * 4096

    def spread(self, gfn: int) -> int:
        return (gfn * 7 + 3) % 32

    def map(self, gfn: int, flags: int = 0x37) -> None:
        self.write_host(self.table[0], gfn, self.host(self.spread(gfn)) | (flags if self.kind == 1 else flags & 7))

    def entry(self, gfn: int) -> int:
        return self.ram.read_u64(self.table[0] * 4096 + 8 * gfn)

    def set_entry(self, gfn: int, value: int) -> None:
        self.write_host(self.table[0], gfn, value)

    def write_host(self, page: int, index: int, value: int) -> None:
        self.ram.write_u64(page * 4096 + 8 * index, value)

    def write_guest(self, gfn: int, index: int, value: int) -> None:
        self.write_host(self.spread(gfn), index, value)

    def read_guest(self, gfn: int, index: int) -> int:
        return self.ram.read_u64(self.spread(gfn) * 4096 + 8 * index)

    def walk(self, va: int, access: int):  # type: ignore[no-untyped-def]
        return inspection.walk_page(self.cpu, va, access)


@pytest.mark.parametrize("kind", [1, 2])
def test_two_dimensions_find_the_page(kind: int) -> None:
    two = TwoDimensions(kind)
    for page in range(4, 32):
        found = two.walk(page << 12, ACCESS_WRITE)
        assert (found.fault, found.physical, found.host) == ("", page << 12, two.host(two.spread(page)))
        assert found.may_write
        assert two.read_guest(3, page) & 0x60 == 0x60
    assert two.read_guest(0, 0) & 0x60 == 0x20


def test_read_fill_must_not_permit_writes_until_dirty() -> None:
    """SDM, "Accessed and Dirty Flags": a write must find the dirty flag set."""
    two = TwoDimensions(1)
    assert not two.walk(0x5000, ACCESS_READ).may_write
    assert not two.read_guest(3, 5) & 0x40
    assert two.walk(0x5000, ACCESS_WRITE).may_write
    assert two.walk(0x5000, ACCESS_READ).may_write


def test_ept_dirty_flag_alone_forbids_a_writable_fill() -> None:
    """SDM, "Accessed and Dirty Flags for EPT"."""
    two = TwoDimensions(1)
    two.write_guest(3, 6, 6 << 12 | 0x67)
    found = two.walk(0x6000, ACCESS_READ)
    assert not found.may_write
    assert two.entry(6) & 0x300 == 0x100
    assert two.walk(0x6000, ACCESS_WRITE).may_write
    assert two.entry(6) & 0x300 == 0x300
    assert two.entry(3) & 0x300 == 0x300  # guest paging structures count as written


def test_ept_without_a_d_leaves_its_entries_alone() -> None:
    two = TwoDimensions(1, a_d=False)
    assert two.walk(0x6000, ACCESS_WRITE).may_write
    assert two.entry(6) & 0x300 == 0


@pytest.mark.parametrize(
    ("flags", "access", "qualification"),
    [
        (0x30, ACCESS_READ, 0x181),  # not present
        (0x31, ACCESS_WRITE, 0x18A),  # read-only: W, readable
        (0x33, ACCESS_EXEC, 0x19C),  # R, W, no X
        (0x34, ACCESS_READ, 0x1A1),  # execute-only
    ],
)
def test_ept_violation_of_the_page(flags: int, access: int, qualification: int) -> None:
    """SDM, "Exit Qualification for EPT Violations": bits 7 and 8, the access, the entries' permissions."""
    two = TwoDimensions(1)
    two.map(9, flags)
    found = two.walk(0x9123, access)
    assert (found.fault, found.qualification, found.fault_physical) == ("EPT violation", qualification, 0x9123)


@pytest.mark.parametrize(("a_d", "qualification"), [(True, 0x83), (False, 0x81)])
def test_ept_violation_of_a_paging_structure(a_d: bool, qualification: int) -> None:
    """Bit 8 clear: the access was to a guest paging-structure entry, at its guest-physical address."""
    two = TwoDimensions(1, a_d)
    two.map(3, 0x30)
    found = two.walk(0x9123, ACCESS_READ)
    assert (found.fault, found.qualification, found.fault_physical) == ("EPT violation", qualification, 0x3048)


def test_setting_a_guest_flag_needs_ept_write_permission() -> None:
    two = TwoDimensions(1, a_d=False)
    two.map(3, 0x35)
    found = two.walk(0x9000, ACCESS_READ)
    assert (found.fault, found.qualification & 0x1FF, found.fault_physical) == ("EPT violation", 0x83 | 0x28, 0x3048)


@pytest.mark.parametrize("flags", [0x36, 0x32, 0x17, 0x1F, 0x3F])
def test_ept_misconfiguration(flags: int) -> None:
    """SDM, "EPT Misconfigurations": writable but not readable, reserved memory type."""
    two = TwoDimensions(1)
    two.map(9, flags)
    found = two.walk(0x9000, ACCESS_READ)
    assert (found.fault, found.fault_physical) == ("EPT misconfiguration", 0x9000)


def test_guest_fault_comes_before_the_page_in_ept() -> None:
    two = TwoDimensions(1)
    two.map(9, 0x30)
    two.write_guest(3, 9, 9 << 12 | 5)
    found = two.walk(0x9000, ACCESS_WRITE | ACCESS_USER)
    assert (found.fault, found.error_code) == ("page fault", 7)


@pytest.mark.parametrize(
    ("flags", "access", "info"),
    [
        (0, ACCESS_READ, 1 << 32 | 4),
        (5, ACCESS_WRITE, 1 << 32 | 7),
        (1 << 63 | 7, ACCESS_EXEC, 1 << 32 | 0x15),
        (3, ACCESS_READ, 1 << 32 | 5),
    ],
)
def test_nested_page_fault(flags: int, access: int, info: int) -> None:
    """APM, "Nested versus Guest Page Faults, Fault Ordering": EXITINFO1."""
    two = TwoDimensions(2)
    two.set_entry(9, two.host(two.spread(9)) | flags)
    found = two.walk(0x9010, access)
    assert (found.fault, found.qualification, found.fault_physical) == ("nested page fault", info, 0x9010)


def test_nested_page_fault_in_the_guest_table_walk() -> None:
    two = TwoDimensions(2)
    two.set_entry(3, 0)
    found = two.walk(0x9010, ACCESS_READ)
    assert (found.fault, found.qualification, found.fault_physical) == ("nested page fault", 2 << 32 | 6, 0x3048)


def test_large_ept_page_gives_its_size() -> None:
    ram = Ram(4 << 20)
    base = -(-ram.address // (2 << 20)) * (2 << 20)
    tables = Ram(4 * 4096)
    a = tables.address
    tables.write_u64(0, a + 4096 | 7)
    tables.write_u64(4096, a + 8192 | 7)
    tables.write_u64(8192, base | 0xB7)
    cpu = fresh_cpu(1, a | 0x1E)
    inspection.put(cpu, "cr0", 0x11)
    found = inspection.walk_page(cpu, 0x12345, ACCESS_WRITE)
    assert (found.host, found.size, found.may_write) == (base + 0x12000, 2 << 20, True)


def test_physical_addresses_of_host_tables_may_have_47_bits() -> None:
    """Shadow tables of host software name addresses of this process: no reserved bit stops them."""
    ram = Ram(8 * 4096)
    a = ram.address
    for level in range(3):
        ram.write_u64(level * 4096, a + (level + 1) * 4096 | 7)
    ram.write_u64(3 * 4096, a + 4 * 4096 | 7)
    cpu = fresh_cpu()
    inspection.put(cpu, "cr3", a)
    assert inspection.walk_page(cpu, 0, ACCESS_WRITE).host == a + 4 * 4096


def test_read_only_region_is_no_memory_to_write() -> None:
    rom = Ram(4096)
    cpu = Cpu(1 << 20)
    cpu.add_region(0x1000, rom.view(0, 4096), readonly=True)
    inspection.put(cpu, "cr0", 0x11)
    assert inspection.walk_page(cpu, 0x1000, ACCESS_READ).host == rom.address
    assert not inspection.walk_page(cpu, 0x1000, ACCESS_READ).may_write
    assert inspection.walk_page(cpu, 0x1000, ACCESS_WRITE).host == 0
    assert inspection.walk_page(cpu, 0x5000, ACCESS_READ).host == 0


def test_a20_gate() -> None:
    ram = Ram(2 << 20)
    cpu = Cpu(1 << 20)
    cpu.add_region(0, ram.view(0, 2 << 20))
    inspection.put(cpu, "cr0", 0x11)
    inspection.put(cpu, "a20_off", 1)
    assert inspection.walk_page(cpu, 0x100000, ACCESS_READ).host == ram.address
