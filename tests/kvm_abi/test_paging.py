"""Guests with 32-bit and PAE paging that edit their own tables; with `ept=0` or `npt=0` those are shadowed.

Source: SDM, "32-Bit Paging", "PAE Paging", "Operations that Invalidate TLBs and Paging-Structure Caches".
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vmonty.testing.guests import CR0_PG, CR0_WP, CR4_PAE, PTE_P, PTE_PS, PTE_U, PTE_W, Mode, TinyGuest

pytestmark = pytest.mark.known_gap("legacy-paging")

# Two sets of tables, of which the second maps the window to B; two pages of data; a window at a linear address.
FIRST, SECOND, A, B, WINDOW = 0x30000, 0x38000, 0x40000, 0x41000, 0x5_0000
IN_A, IN_B = 0xAAAA_0001, 0xBBBB_0002
CR4_PSE, EFER_NX, ACCESSED, DIRTY = 1 << 4, 1 << 11, 1 << 5, 1 << 6
RW = PTE_P | PTE_W | PTE_U


@dataclass(frozen=True)
class Paging:
    """How wide entries are, and where a set of tables has its parts."""

    name: str
    width: int

    @property
    def entries(self) -> int:
        return 4096 // self.width

    @property
    def big(self) -> int:
        """What an entry of a page directory maps."""
        return self.entries << 12

    def directory(self, tables: int) -> int:
        return tables + 0x1000

    def table(self, tables: int) -> int:
        return tables + 0x2000

    def entry(self, tables: int, linear: int = WINDOW) -> int:
        """Where the last entry for *linear* is."""
        return self.table(tables) + self.width * (linear >> 12)

    def root(self, tables: int) -> int:
        return tables if self.width == 8 else self.directory(tables)

    def put(self, guest: TinyGuest, at: int, value: int) -> None:
        guest.ram.write(at, value.to_bytes(self.width, "little"))

    def get(self, guest: TinyGuest, at: int) -> int:
        return int.from_bytes(guest.ram.read(at, self.width), "little")

    def build(self, guest: TinyGuest, tables: int, window: int) -> None:
        """The first pages one to one, the window to the page at *window*; the next directory entry is a big page."""
        if self.width == 8:
            guest.ram.write_u64(tables, self.directory(tables) | PTE_P)
        self.put(guest, self.directory(tables), self.table(tables) | RW)
        self.put(guest, self.directory(tables) + self.width, RW | PTE_PS)
        for page in range(0x80):
            self.put(guest, self.table(tables) + self.width * page, page << 12 | RW)
        self.put(guest, self.entry(tables), window | RW)


PAGING = [Paging("32-bit", 4), Paging("pae", 8)]
READ = f"mov eax, [{WINDOW:#x}]\n out 0x10, eax\n"
FAULT = "pop eax\n out 0x20, eax\n mov eax, cr2\n out 0x21, eax\n hlt"


@pytest.fixture(params=PAGING, ids=[paging.name for paging in PAGING])
def paging(request: pytest.FixtureRequest) -> Paging:
    chosen: Paging = request.param
    return chosen


def start(guest: TinyGuest, paging: Paging, source: str, nx: bool = False) -> None:
    """Load *source*; paging is on at its first instruction."""
    guest.load(Mode.PROTECTED, source, {14: FAULT})
    guest.ram.write_u32(A, IN_A)
    guest.ram.write_u32(B, IN_B)
    paging.build(guest, FIRST, A)
    paging.build(guest, SECOND, B)
    sregs = guest.vcpu.get_sregs()
    sregs.cr3 = paging.root(FIRST)
    sregs.cr4 = CR4_PAE if paging.width == 8 else CR4_PSE
    sregs.cr0 |= CR0_PG | CR0_WP
    sregs.efer = EFER_NX if nx else 0
    guest.vcpu.set_sregs(sregs)


def write_entry(paging: Paging, value: int, at: int | None = None) -> str:
    """The guest changes an entry."""
    return f"mov dword [{paging.entry(FIRST) if at is None else at:#x}], {value:#x}\n"


FLUSHES = [
    ("invlpg", f"invlpg [{WINDOW:#x}]\n"),
    ("same-cr3", "mov eax, cr3\n mov cr3, eax\n"),
    ("paging-off", "mov eax, cr0\n mov ebx, eax\n btr eax, 31\n mov cr0, eax\n mov cr0, ebx\n"),
]


@pytest.mark.parametrize(
    "flush",
    [
        pytest.param(flush, id=name, marks=[pytest.mark.known_gap("pae-paging-off")] if name == "paging-off" else [])
        for name, flush in FLUSHES
    ],
)
def test_entry_that_changes(guest: TinyGuest, paging: Paging, flush: str) -> None:
    """There and back, several times: the table goes out of step and in again."""
    turn = write_entry(paging, B | RW) + flush + READ + write_entry(paging, A | RW) + flush + READ
    start(guest, paging, f"{READ} mov ecx, 5\n again: {turn} dec ecx\n jnz again")
    assert guest.outs(11) == [IN_A, *([IN_B, IN_A] * 5)]


def test_entry_that_becomes_present(guest: TinyGuest, paging: Paging) -> None:
    """No processor keeps what is not present: without INVLPG."""
    fresh, other = WINDOW + 0x1000, write_entry
    at = paging.entry(FIRST, fresh)
    start(guest, paging, other(paging, B | RW, at) + f"mov eax, [{fresh:#x}]\n out 0x10, eax")
    paging.put(guest, at, 0)
    assert guest.out() == (0x10, IN_B)


def test_missing_page(guest: TinyGuest, paging: Paging) -> None:
    start(guest, paging, write_entry(paging, 0) + f"invlpg [{WINDOW:#x}]\n" + READ)
    assert [guest.out(), guest.out()] == [(0x20, 0), (0x21, WINDOW)]


def test_accessed_and_dirty(guest: TinyGuest, paging: Paging) -> None:
    start(guest, paging, f"{READ} mov dword [{WINDOW + 4:#x}], 7\n out 0x11, al")
    at, directory = paging.entry(FIRST), paging.directory(FIRST)
    assert not paging.get(guest, at) & (ACCESSED | DIRTY)
    assert guest.out() == (0x10, IN_A)
    assert paging.get(guest, at) & (ACCESSED | DIRTY) == ACCESSED
    assert paging.get(guest, directory) & ACCESSED
    guest.out()
    assert paging.get(guest, at) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    assert guest.ram.read_u32(A + 4) == 7


def test_write_protection(guest: TinyGuest, paging: Paging) -> None:
    """CR0.WP clear: the supervisor writes to what is read-only; set: #PF."""
    protect = write_entry(paging, A | PTE_P | PTE_U) + f"invlpg [{WINDOW:#x}]\n"
    without = f"mov eax, cr0\n and eax, {~CR0_WP & 0xFFFF_FFFF:#x}\n mov cr0, eax\n"
    store = f"mov dword [{WINDOW:#x}], 5\n"
    again = f"mov eax, cr0\n or eax, {CR0_WP:#x}\n mov cr0, eax\n"
    start(guest, paging, protect + without + store + READ + again + READ + store)
    assert guest.outs(2) == [5, 5]
    assert [guest.out(), guest.out()] == [(0x20, 3), (0x21, WINDOW)]


def test_no_execute(guest: TinyGuest) -> None:
    """PAE only: bit 63."""
    pae = PAGING[1]
    start(guest, pae, f"mov ebx, {WINDOW:#x}\n call ebx\n out 0x10, al\n" + write_nx(pae) + "call ebx", nx=True)
    guest.ram.write(A, b"\xb0\x21\xc3")  # mov al, 0x21; ret
    assert guest.out() == (0x10, 0x21)
    assert [guest.out(), guest.out()] == [(0x20, 0x11), (0x21, WINDOW)]


def write_nx(paging: Paging) -> str:
    return write_entry(paging, 1 << 31, paging.entry(FIRST) + 4) + f"invlpg [{WINDOW:#x}]\n"


def test_other_tables(guest: TinyGuest, paging: Paging) -> None:
    def to(tables: int) -> str:
        return f"mov eax, {paging.root(tables):#x}\n mov cr3, eax\n"

    start(guest, paging, f"again: {READ} {to(SECOND)} {READ} {to(FIRST)} jmp again")
    assert guest.outs(8) == [IN_A, IN_B] * 4


def test_big_page_that_is_split(guest: TinyGuest, paging: Paging) -> None:
    """The big page maps the start of memory; the table that takes its place has the window at B."""
    big = f"mov eax, [{paging.big + A:#x}]\n out 0x10, eax\n mov dword [{paging.big + A + 8:#x}], 9\n"
    split = write_entry(paging, paging.table(SECOND) | RW, paging.directory(FIRST) + paging.width)
    window = f"invlpg [{paging.big + WINDOW:#x}]\n mov eax, [{paging.big + WINDOW:#x}]\n out 0x10, eax\n"
    start(guest, paging, big + split + "mov eax, cr3\n mov cr3, eax\n" + window)
    assert guest.out() == (0x10, IN_A)
    assert guest.out() == (0x10, IN_B)
    assert guest.ram.read_u32(A + 8) == 9
