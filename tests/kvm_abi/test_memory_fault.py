"""Host memory of a slot that is gone: KVM_RUN gives EFAULT, nobody crashes, and the guest goes on when it is back.

Source: api.rst, KVM_EXIT_MEMORY_FAULT; kvm_handle_error_pfn().
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

import pytest

from vmonty.base.errors import KvmError
from vmonty.base.ram import PAGE_SIZE, Ram
from vmonty.kvm.uapi import Cap, Exit, Requests
from vmonty.kvm.uapi.vm import kvm_userspace_memory_region
from vmonty.testing.guests import CR4_PAE, DATA, MMIO, PML4, Mode, TinyGuest, identity_map
from vmonty.testing.nasm import assemble

pytestmark = pytest.mark.known_gap("memory-fault")

# A slot of two pages; the second one goes away and comes back.
EXTRA, LOST, VALUE = 0x200000, 0x201000, 0x5A
# What the guest does with the second page; EAX becomes VALUE if it has been there.
ACCESSES = [
    ("load", f"mov eax, [{LOST:#x}]"),
    ("store", f"mov eax, {VALUE}\n mov [{LOST + 8:#x}], eax\n mov ebx, [{LOST + 8:#x}]"),
    ("read-modify-write", f"inc dword [{LOST + 8:#x}]\n mov eax, [{LOST:#x}]"),
    ("locked", f"xor eax, eax\n lock xadd [{LOST:#x}], eax\n mov [{LOST:#x}], eax"),
    ("crosses", f"mov eax, [{LOST - 2:#x}]\n shr eax, 16"),
    ("crossing store", f"mov dword [{LOST - 2:#x}], {VALUE << 16:#x}\n movzx eax, word [{LOST:#x}]"),
    ("vector", f"movups xmm0, [{LOST:#x}]\n movd eax, xmm0"),
    ("string", f"mov esi, {LOST:#x}\n mov edi, {EXTRA:#x}\n mov ecx, 16\n rep movsb\n mov eax, [{EXTRA:#x}]"),
    ("stack", f"mov rbx, rsp\n mov esp, {LOST + 0x100:#x}\n push {VALUE}\n pop rax\n mov rsp, rbx"),
    ("helper", f"fxsave [{LOST + 0x400:#x}]\n mov eax, [{LOST:#x}]"),
    ("code", f"mov ebx, {LOST + 0x800:#x}\n call rbx"),
    (
        "table",
        f"sgdt [{EXTRA:#x}]\n lgdt [{LOST + 0x900:#x}]\n mov ecx, 0x10\n mov ds, ecx\n lgdt [{EXTRA:#x}]\n"
        f"mov eax, [{LOST:#x}]",
    ),
    ("port string", f"mov edx, 0x11\n mov esi, {LOST:#x}\n outsb\n mov eax, [{LOST:#x}]"),
]  # fmt: skip
FLAT_DATA = 0x00CF_9300_0000_FFFF


class Slot:
    """Memory in a slot that can be taken away and given back."""

    def __init__(self, guest: TinyGuest) -> None:
        self.ram = Ram(2 * PAGE_SIZE)
        guest.vm.set_user_memory_region(1, EXTRA, self.ram)
        self.fill()

    def fill(self) -> None:
        self.ram.write_u32(PAGE_SIZE, VALUE)
        self.ram.write(PAGE_SIZE + 0x800, assemble(f"mov eax, {VALUE}\n ret", 64, 0))
        self.ram.write(PAGE_SIZE + 0x900, (0x1F).to_bytes(2, "little") + (LOST + 0xA00).to_bytes(8, "little"))
        self.ram.write_u64(PAGE_SIZE + 0xA10, FLAT_DATA)

    def take_away(self, guest: TinyGuest, announce: bool = False) -> None:
        """*announce*: code that is translated already does not need its memory."""
        os.ftruncate(self.ram.fileno(), PAGE_SIZE)
        if announce:
            guest.vm.provider.memory_written(self.ram.address + PAGE_SIZE, PAGE_SIZE)

    def give_back(self, guest: TinyGuest) -> None:
        os.ftruncate(self.ram.fileno(), 2 * PAGE_SIZE)
        self.fill()
        guest.vm.provider.memory_written(self.ram.address, 2 * PAGE_SIZE)


def expect_fault(guest: TinyGuest, gpa: int = LOST) -> None:
    with pytest.raises(KvmError) as raised:
        guest.run()
    assert raised.value.errno == errno.EFAULT
    if guest.vm.check_extension(Cap.MEMORY_FAULT_INFO) and guest.vcpu.kvm_run.exit_reason == Exit.MEMORY_FAULT:
        assert guest.vcpu.kvm_run.u.memory_fault.gpa & ~0xFFF == gpa


@pytest.mark.parametrize("warm", [False, True], ids=["first", "again"])
@pytest.mark.parametrize(
    "access",
    [
        pytest.param(access, id=name, marks=[pytest.mark.known_gap("string-io-fault")] if name == "port string" else [])
        for name, access in ACCESSES
    ],
)
def test_file_that_ends_before_the_slot(guest: TinyGuest, access: str, warm: bool) -> None:
    """*warm*: the guest has used the memory before, so processors know it."""
    slot = Slot(guest)
    guest.load(Mode.LONG, f"default abs\n again:\n {access}\n out 0x10, eax\n jmp again")
    ports = 0x11, 0x10

    def to_the_end() -> int:
        while True:
            port, value = guest.out()
            assert port in ports
            if port == 0x10:
                return value

    if warm:
        for _ in range(3):
            assert to_the_end() == VALUE
    slot.take_away(guest, announce="call" in access)
    for _ in range(2):
        expect_fault(guest)
    slot.give_back(guest)
    assert to_the_end() == VALUE
    assert to_the_end() == VALUE


@pytest.mark.parametrize("warm", [False, True], ids=["first", "again"])
def test_unmapped(guest: TinyGuest, warm: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    # In the middle of nothing, so that nobody else gets the address meanwhile.
    at = libc.mmap(None, 16 * PAGE_SIZE, 0, 0x22, -1, 0) + 8 * PAGE_SIZE
    assert libc.mmap(at, PAGE_SIZE, 3, 0x32, -1, 0) == at
    region = kvm_userspace_memory_region(slot=1, guest_phys_addr=LOST, memory_size=PAGE_SIZE, userspace_addr=at)
    guest.vm.ioctl(Requests.KVM_SET_USER_MEMORY_REGION, region)
    guest.load(Mode.LONG, f"default abs\n again: mov eax, [{LOST:#x}]\n out 0x10, eax\n jmp again")
    if warm:
        assert guest.outs(3) == [0, 0, 0]
    assert libc.munmap(at, PAGE_SIZE) == 0
    expect_fault(guest)
    assert libc.mmap(at, PAGE_SIZE, 3, 0x32, -1, 0) == at
    ctypes.c_uint32.from_address(at).value = VALUE
    assert guest.outs(2) == [VALUE, VALUE]
    region.memory_size = 0
    guest.vm.ioctl(Requests.KVM_SET_USER_MEMORY_REGION, region)
    libc.munmap(at - 8 * PAGE_SIZE, 16 * PAGE_SIZE)


@pytest.mark.known_gap("lost-page-table")
def test_page_table_that_is_gone(guest: TinyGuest) -> None:
    """The processor's own walk meets it."""
    slot = Slot(guest)
    guest.load(
        Mode.LONG,
        f"default abs\n mov rbx, cr3\n mov rcx, [rbx]\n mov [{LOST:#x}], rcx\n mov al, 1\n out 0x10, al\n"
        f" mov ecx, {LOST:#x}\n mov cr3, rcx\n mov al, 2\n out 0x10, al",
    )
    assert guest.out() == (0x10, 1)
    slot.take_away(guest)
    expect_fault(guest)


def test_delivery_to_a_stack_that_is_gone(guest: TinyGuest) -> None:
    """The exception is delivered when the stack is back."""
    slot = Slot(guest)
    guest.load(Mode.LONG, f"mov esp, {LOST + 0x800:#x}\n ud2", {6: "mov al, 0x66\n out 0x10, al"})
    slot.take_away(guest)
    expect_fault(guest)
    expect_fault(guest)
    slot.give_back(guest)
    assert guest.out() == (0x10, 0x66)
    assert guest.vcpu.get_regs().rsp == LOST + 0x800 - 40


@pytest.mark.known_gap("lost-page-table")
@pytest.mark.parametrize("by_user", [False, True], ids=["mov-cr3", "set-sregs"])
def test_page_directory_pointers_that_are_gone(guest: TinyGuest, by_user: bool) -> None:
    """PAE paging loads four entries with CR3, or reads them when it needs them: nobody crashes over either."""
    slot = Slot(guest)
    pointers = [PML4 + 0x2000 + 0x1000 * number | 1 for number in range(4)]
    guest.ram.write(PML4, identity_map() + struct.pack("<4Q", *pointers))
    slot.ram.write(PAGE_SIZE, struct.pack("<4Q", *pointers))
    guest.load(
        Mode.PROTECTED,
        f"mov eax, cr4\n or eax, {CR4_PAE}\n mov cr4, eax\n mov eax, {PML4 + 0x6000}\n mov cr3, eax\n mov eax, cr0\n"
        f"or eax, 0x80000000\n mov cr0, eax\n mov al, 1\n out 0x10, al\n mov eax, {LOST}\n mov cr3, eax\n"
        f"mov eax, [{DATA}]\n mov al, 2\n out 0x10, al",
    )
    assert guest.out() == (0x10, 1)
    slot.take_away(guest)
    if by_user:
        guest.vcpu.complete_io()
        sregs = guest.vcpu.get_sregs()
        sregs.cr3 = LOST
        guest.vcpu.set_sregs(sregs)
    try:
        # What could not be read counts as not present, or as reserved bits, and there is no handler.
        assert guest.run() is Exit.SHUTDOWN
    except KvmError as error:
        assert error.errno == errno.EFAULT  # noqa: PT017


@pytest.mark.parametrize("move", ["mov [rbx], ecx", "mov ecx, [rbx]"])
def test_code_that_talks_to_a_device(guest: TinyGuest, move: str) -> None:
    """What it does needs none of its own memory, but to know what it does does."""
    slot = Slot(guest)
    code = assemble(f"again: {move}\n jmp again", 64, LOST + 0xB00)
    slot.ram.write(PAGE_SIZE + 0xB00, code)
    guest.load(Mode.LONG, f"mov ebx, {MMIO:#x}\n mov eax, {LOST + 0xB00:#x}\n jmp rax")
    for _ in range(5):
        assert guest.run() is Exit.MMIO
    slot.take_away(guest)
    expect_fault(guest)
    expect_fault(guest)
    slot.give_back(guest)
    slot.ram.write(PAGE_SIZE + 0xB00, code)
    for _ in range(5):
        assert guest.run() is Exit.MMIO
