"""VMX: entries, exits and what they report. SDM, "VMX Non-Root Operation", "VM Entries", "VM Exits"."""

from __future__ import annotations

import threading
import time

import pytest

from vmonty.cpu.vmcs import Field
from vmonty.cpu.vmx_errors import VmxError

from .vmx_guest import CODE, GDT, PROCESSOR, SECONDARY, STACK, Guest

F = Field
HLT, CPUID, EXTERNAL, EPT = 12, 10, 1, 48
RAX, RCX, RDX, RBX = 0, 1, 2, 3


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_launch_resume_and_what_stays(guest: Guest) -> None:
    assert guest.run("b878563412 0fa2 0fa2 f4".replace(" ", "")) == CPUID
    assert (guest[F.GUEST_RIP], guest[F.VM_EXIT_INSTRUCTION_LEN], guest.vmx.gpr(RAX)) == (CODE + 5, 2, 0x12345678)
    guest.skip()
    guest.vmx.set_gpr(RAX, 7)
    assert guest.vmx.vmresume() == CPUID
    assert guest.vmx.gpr(RAX) == 7
    guest.skip()
    assert guest.run() == HLT
    with pytest.raises(VmxError) as caught:
        guest.vmx.vmlaunch()
    assert caught.value.number == 4
    guest.vmx.vmclear(guest.page(1))
    guest.vmx.vmptrld(guest.page(1))
    with pytest.raises(VmxError) as caught:
        guest.vmx.vmresume()
    assert caught.value.number == 5


@pytest.mark.parametrize(
    ("code", "reason", "length"),
    [
        ("0fa2", 10, 2), ("f4", 12, 1), ("0f08", 13, 2), ("0f01c1", 18, 3), ("0f33", 15, 2), ("0f01d1", 55, 3),
        ("0f01c8", 39, 3), ("0f01c9", 36, 3), ("0f31", 16, 2), ("0f01f9", 51, 3), ("0f0138", 14, 3), ("0f09", 54, 2),
        ("0f0118", 46, 3), ("0f00d8", 47, 3),
    ],
)  # fmt: skip
def test_instructions_that_exit(guest: Guest, code: str, reason: int, length: int) -> None:
    """SDM, "Instructions That Cause VM Exits"."""
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 29
    guest[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY | 4 | 8 | 0x40
    guest[F.GUEST_CR4] = 0x2426A0 - 0x200000
    guest.vmx.set_gpr(RAX, 0x6000)
    guest.vmx.set_gpr(RCX, 0)
    assert guest.run(code) == reason
    assert (guest[F.GUEST_RIP], guest[F.VM_EXIT_INSTRUCTION_LEN]) == (CODE, length)
    assert guest[F.VM_EXIT_INTR_INFO] == 0
    if reason == 14:
        assert guest.qualification == 0x6000


def test_privilege_comes_before_the_exit(guest: Guest) -> None:
    """SDM, "Relative Priority of Faults and VM Exits": #GP for CPL."""
    guest.user()
    assert guest.run("f4") == HLT
    assert guest.handler == 13


def test_rdtsc_offset(guest: Guest) -> None:
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 8
    guest[F.TSC_OFFSET] = 1 << 62
    assert guest.run("0f31f4") == HLT
    assert guest.vmx.gpr(RDX) >> 30 == 1
    assert guest.vmx.rdmsr(0x10) < 1 << 62


@pytest.mark.parametrize(
    ("code", "qualification", "information"),
    [
        ("e471", 0x710048, None), ("e671", 0x710040, None), ("ec", 0x3F80008, None), ("66ed", 0x3F80009, None),
        ("ed", 0x3F8000B, None), ("ee", 0x3F80000, None), ("ef", 0x3F80003, None), ("6c", 0x3F80018, 0x100),
        ("f36f", 0x3F80033, 0x18100), ("f3676e", 0x3F80030, 0x18080),
    ],
)  # fmt: skip
def test_io_exit(guest: Guest, code: str, qualification: int, information: int | None) -> None:
    """SDM, "Exit Qualification for I/O Instructions"."""
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 24
    guest.vmx.set_gpr(RDX, 0x3F8)
    guest.vmx.set_gpr(RCX, 4)
    guest.vmx.set_gpr(6, 0x5000)
    guest.vmx.set_gpr(7, 0x6000)
    assert guest.run(code) == 30
    assert guest.qualification == qualification
    assert guest[F.VM_EXIT_INSTRUCTION_LEN] == len(code) // 2
    if information is not None:
        assert guest[F.VMX_INSTRUCTION_INFO] & 0x38380 == information
        assert guest[F.GUEST_LINEAR_ADDRESS] == (0x6000 if qualification & 8 else 0x5000)


def test_io_bitmaps(guest: Guest) -> None:
    """Bitmap A has ports 0000–7FFF, B 8000–FFFF; any byte of the access counts."""
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 25
    guest.pages.write_u8(3 * 4096 + (0x73 >> 3), 1 << 3)
    guest.pages.write_u8(4 * 4096, 1)
    for port, code in ((0x73, "ec"), (0x70, "ed"), (0x8000, "ec"), (0x7FFD, "ed")):
        guest.vmx.set_gpr(RDX, port)
        assert guest.run(code) == 30
        assert guest.qualification >> 16 == port


def test_msr_bitmap(guest: Guest) -> None:
    """SDM, "MSR-Bitmap Address"."""
    guest.vmx.set_gpr(RCX, 0xC0000102)
    guest.vmx.set_gpr(RAX, 0x1000)
    guest.vmx.set_gpr(RDX, 0)
    assert guest.run("0f30 0f32 f4".replace(" ", "")) == HLT
    assert guest.vmx.rdmsr(0xC0000102) == 0x1000
    guest.msr_intercept(0xC0000102, write=True)
    assert guest.run("0f32 0f30 f4".replace(" ", "")) == 32
    assert guest[F.GUEST_RIP] == CODE + 2
    guest.vmx.set_gpr(RCX, 0x12345)
    assert guest.run("0f32") == 31
    guest.vmx.set_gpr(RCX, 0x7FF)
    assert guest.run("0f32f4") == HLT
    assert guest.handler == 13


def test_cr0_mask_and_shadow(guest: Guest) -> None:
    """SDM, "Guest/Host Masks and Read Shadows for CR0 and CR4"."""
    guest[F.CR0_GUEST_HOST_MASK], guest[F.CR0_READ_SHADOW] = 8 | 1 << 16, 8
    assert guest.run("0f20c0f4") == HLT  # mov rax, cr0
    assert guest.vmx.gpr(RAX) == (0x80050033 & ~(1 << 16)) | 8
    guest.vmx.set_gpr(RBX, 0x80050033)
    assert guest.run("0f22c3") == 28  # mov cr0, rbx
    assert guest.qualification == 3 << 8
    guest.vmx.set_gpr(RBX, 0x80040033 & ~4 | 8)
    assert guest.run("0f22c3f4") == HLT  # the shadow's values: no exit, host bits stay
    assert guest[F.GUEST_CR0] == 0x80050033
    assert guest.run("0f06") == 28  # clts
    assert guest.qualification == 2 << 4
    guest[F.CR0_READ_SHADOW] = 0
    assert guest.run("0f06f4") == HLT
    assert guest.run("0f01f0") == 28  # lmsw ax
    assert guest.qualification & 0x3F == 3 << 4


def test_cr4_reserved_bit_faults_only_without_exit(guest: Guest) -> None:
    guest.vmx.set_gpr(RAX, 1 << 31 | 0x6A0)
    assert guest.run("0f22e0f4") == HLT
    assert guest.handler == 13
    guest[F.CR4_GUEST_HOST_MASK] = 0x2000 | 1 << 31
    guest[F.GUEST_RSP] = STACK - 0x100
    assert guest.run("0f22e0") == 28
    assert guest.qualification == 4


def test_cr3_targets_and_cr8(guest: Guest) -> None:
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 15 | 1 << 16 | 1 << 19 | 1 << 20
    guest[F.CR3_TARGET_COUNT], guest[F.CR3_TARGET_VALUE0] = 1, 0x1000
    guest.vmx.set_gpr(RAX, 0x1000)
    assert guest.run("0f22d8f4") == HLT
    guest.vmx.set_gpr(RAX, 0x2000)
    assert guest.run("0f22d8") == 28
    assert guest.qualification == 3
    assert guest.run("0f20da") == 28  # mov rdx, cr3
    assert guest.qualification == 3 | 1 << 4 | 2 << 8
    assert guest.run("440f22c0") == 28  # mov cr8, rax
    assert guest.qualification == 8
    assert guest.run("440f20c3") == 28
    assert guest.qualification == 8 | 1 << 4 | 3 << 8


def test_tpr_shadow(guest: Guest) -> None:
    """SDM, "TPR Virtualization": a write below the threshold exits after the instruction."""
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 21
    guest.pages.write_u8(5 * 4096 + 0x80, 0x50)
    guest[F.TPR_THRESHOLD] = 3
    guest.vmx.set_gpr(RAX, 4)
    assert guest.run("440f22c0 440f20c3 f4".replace(" ", "")) == HLT
    assert guest.vmx.gpr(RBX) == 4
    guest.vmx.set_gpr(RAX, 2)
    assert guest.run("440f22c0") == 43
    assert guest[F.GUEST_RIP] == CODE + 4
    guest[F.GUEST_RIP] = CODE
    with pytest.raises(VmxError) as caught:
        guest.vmx.run()
    assert caught.value.number == 7


def test_ept_violation_and_fill(guest: Guest) -> None:
    guest.map(0x50, 0x30)
    assert guest.run("8b042500000500f4") == EPT  # mov eax, [0x50000]
    assert (guest.qualification, guest[F.GUEST_PHYSICAL_ADDRESS], guest[F.GUEST_LINEAR_ADDRESS]) == (
        0x181,
        0x50000,
        0x50000,
    )
    assert guest[F.GUEST_RIP] == CODE
    guest.map(0x50)
    guest.ram.write_u32(0x50000, 0xCAFE)
    assert guest.run() == HLT
    assert guest.vmx.gpr(RAX) == 0xCAFE
    guest.map(0x50, 0x36)
    assert guest.run("8b042500000500f4") == 49
    assert guest[F.GUEST_PHYSICAL_ADDRESS] == 0x50000


def test_ept_violation_of_a_fetch(guest: Guest) -> None:
    guest.map(CODE >> 12, 0x33)
    assert guest.run("f4") == EPT
    assert guest.qualification & 0x1BF == 0x19C & 0x1BF


def test_write_protection_by_ept_seen_after_a_read(guest: Guest) -> None:
    guest.map(0x50, 0x35)
    assert guest.run("8b042500000500 89042500000500 f4".replace(" ", "")) == EPT
    assert guest.qualification == 0x1AA
    assert guest[F.GUEST_RIP] == CODE + 7


@pytest.mark.parametrize(
    ("mask", "match", "bit", "exits"), [(0, 0, 1, 1), (0, 0, 0, 0), (2, 2, 1, 1), (2, 0, 1, 0), (2, 0, 0, 1)]
)
def test_page_fault_mask_and_match(guest: Guest, mask: int, match: int, bit: int, exits: int) -> None:
    """SDM, "Page-Fault Error-Code Mask and Match"."""
    guest[F.EXCEPTION_BITMAP] = bit << 14
    guest[F.PAGE_FAULT_ERROR_CODE_MASK], guest[F.PAGE_FAULT_ERROR_CODE_MATCH] = mask, match
    guest.vmx.cr2 = 0x77
    reason = guest.run("890425000040 00".replace(" ", ""))  # mov [0x400000], eax: not mapped
    if exits:
        assert (reason, guest[F.VM_EXIT_INTR_INFO], guest[F.VM_EXIT_INTR_ERROR_CODE]) == (0, 0x80000B0E, 2)
        assert (guest.qualification, guest.vmx.cr2) == (0x400000, 0x77)
    else:
        assert (reason, guest.handler, guest.vmx.cr2) == (HLT, 14, 0x400000)


@pytest.mark.parametrize(
    ("code", "info", "length"), [("cc", 0x80000603, 1), ("f1", 0x80000501, 1), ("0f0b", 0x80000306, 0)]
)
def test_exception_bitmap(guest: Guest, code: str, info: int, length: int) -> None:
    guest[F.EXCEPTION_BITMAP] = 0xFFFFFFFF & ~(1 << 14)
    assert guest.run(code) == 0
    assert guest[F.VM_EXIT_INTR_INFO] == info
    if length:
        assert guest[F.VM_EXIT_INSTRUCTION_LEN] == length
    assert guest[F.GUEST_RIP] == CODE


def test_triple_fault(guest: Guest) -> None:
    guest[F.GUEST_IDTR_LIMIT] = 0
    assert guest.run("0f0b") == 2


def test_double_fault_can_be_intercepted(guest: Guest) -> None:
    """#DE has no gate, nor has the #GP that follows: contributory after contributory."""
    guest[F.EXCEPTION_BITMAP] = 1 << 8
    guest.vmx.set_gpr(RCX, 0)
    guest[F.GUEST_IDTR_LIMIT] = 0
    assert guest.run("f7f1") == 0
    assert guest[F.VM_EXIT_INTR_INFO] == 0x80000B08
    assert guest[F.IDT_VECTORING_INFO_FIELD] >> 31 == 0


def test_vectoring_information(guest: Guest) -> None:
    """An EPT violation while #UD is delivered (its stack isn't mapped)."""
    guest.map((STACK - 0x100) >> 12, 0x30)
    assert guest.run("0f0b") == EPT
    assert guest[F.IDT_VECTORING_INFO_FIELD] == 0x80000306
    assert guest[F.GUEST_RIP] == CODE
    guest.map((STACK - 0x100) >> 12)
    guest[F.VM_ENTRY_INTR_INFO_FIELD] = guest[F.IDT_VECTORING_INFO_FIELD]
    assert guest.run() == HLT
    assert guest.handler == 6


def test_vectoring_information_of_int_n(guest: Guest) -> None:
    guest.map((STACK - 0x100) >> 12, 0x30)
    assert guest.run("cd20") == EPT
    assert guest[F.IDT_VECTORING_INFO_FIELD] == 0x80000420
    assert guest[F.VM_EXIT_INSTRUCTION_LEN] == 2
    guest.map((STACK - 0x100) >> 12)
    guest[F.VM_ENTRY_INTR_INFO_FIELD] = 0x80000420
    guest[F.VM_ENTRY_INSTRUCTION_LEN] = 2
    assert guest.run() == HLT
    assert guest.handler == 0x20
    assert guest.ram.read_u64(guest[F.GUEST_RSP]) == CODE + 2


@pytest.mark.parametrize(
    ("info", "error", "vector", "frame_error"),
    [
        (0x80000030, None, 0x30, None),
        (0x80000202, None, 2, None),
        (0x80000B0D, 0x10, 13, 0x10),
        (0x80000306, None, 6, None),
    ],
)
def test_event_injection(guest: Guest, info: int, error: int | None, vector: int, frame_error: int | None) -> None:
    """SDM, "Event Injection"; the exception bitmap doesn't apply."""
    guest[F.EXCEPTION_BITMAP] = 0xFFFFFFFF
    guest[F.GUEST_RFLAGS] = 0x202
    guest[F.VM_ENTRY_INTR_INFO_FIELD] = info
    if error is not None:
        guest[F.VM_ENTRY_EXCEPTION_ERROR_CODE] = error
    assert guest.run("90f4") == HLT
    assert guest.handler == vector
    rsp = guest[F.GUEST_RSP]
    if frame_error is not None:
        assert guest.ram.read_u64(rsp) == frame_error
        rsp += 8
    assert guest.ram.read_u64(rsp) == CODE
    assert guest[F.VM_ENTRY_INTR_INFO_FIELD] >> 31 == 0
    if vector == 2:
        assert guest[F.GUEST_INTERRUPTIBILITY_INFO] & 8


def test_kick_ends_a_running_guest(guest: Guest) -> None:
    started = time.monotonic()
    threading.Timer(0.05, guest.vmx.kick).start()
    assert guest.run("ebfe") == EXTERNAL
    assert time.monotonic() - started < 5
    guest.vmx.kick()
    assert guest.run("ebfe") == EXTERNAL  # before the entry: exits at once
    assert guest.run("f4") == HLT  # taken


def test_interrupt_window_and_sti_shadow(guest: Guest) -> None:
    """The window opens after the instruction that follows STI."""
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 4
    assert guest.run("9090fb9090f4") == 7
    assert guest[F.GUEST_RIP] == CODE + 4
    guest[F.GUEST_RFLAGS] = 2
    assert guest.run("fbf4") == HLT
    assert guest[F.GUEST_INTERRUPTIBILITY_INFO] == 1


def test_nmi_window_opens_after_iret(guest: Guest) -> None:
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 22
    guest[F.GUEST_INTERRUPTIBILITY_INFO] = 8
    # push ss, rsp, flags, cs, rip by hand: iretq to CODE + 0x20
    code = "6a10 68007f0000 6a02 6a08 6820400000 48cf".replace(" ", "")
    guest.ram.write(CODE + 0x20, b"\x90\xf4")
    assert guest.run(code) == 8
    assert guest[F.GUEST_RIP] == CODE + 0x20
    assert guest[F.GUEST_INTERRUPTIBILITY_INFO] == 0


def test_nmi_exits(guest: Guest) -> None:
    guest.vmx.nmi()
    assert guest.run("ebfe") == 0
    assert guest[F.VM_EXIT_INTR_INFO] == 0x80000202


def test_preemption_timer_at_entry(guest: Guest) -> None:
    guest[F.PIN_BASED_VM_EXEC_CONTROL] = 0x16 | 1 | 8 | 0x20 | 0x40
    guest[F.VMX_PREEMPTION_TIMER_VALUE] = 0
    assert guest.run("90f4") == 52
    assert guest[F.GUEST_RIP] == CODE


def test_msr_areas(guest: Guest) -> None:
    """SDM, "Loading MSRs" and "Saving MSRs"."""
    area = guest.page(10)
    guest.pages.write_u32(10 * 4096, 0xC0000103)
    guest.pages.write_u64(10 * 4096 + 8, 0x1234)
    guest.pages.write_u32(10 * 4096 + 16, 0xC0000100)
    guest[F.VM_ENTRY_MSR_LOAD_ADDR], guest[F.VM_ENTRY_MSR_LOAD_COUNT] = area, 1
    guest[F.VM_EXIT_MSR_STORE_ADDR], guest[F.VM_EXIT_MSR_STORE_COUNT] = area, 1
    assert guest.run("f4") == HLT
    assert guest.vmx.rdmsr(0xC0000103) == 0x1234
    guest[F.VM_ENTRY_MSR_LOAD_COUNT] = 2
    assert guest.run("f4") == 34 | 1 << 31
    assert guest.qualification == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (F.PIN_BASED_VM_EXEC_CONTROL, 0), (F.CPU_BASED_VM_EXEC_CONTROL, 0xFFFFFFFF), (F.CR3_TARGET_COUNT, 5),
        (F.SECONDARY_VM_EXEC_CONTROL, 0x80), (F.VIRTUAL_PROCESSOR_ID, 0), (F.EPT_POINTER, 0x1E),
        (F.VM_EXIT_CONTROLS, 0),
        (F.VM_ENTRY_CONTROLS, 0), (F.MSR_BITMAP, 0x123), (F.VM_ENTRY_INTR_INFO_FIELD, 0x80000103),
        (F.VM_ENTRY_INTR_INFO_FIELD, 0x8000030E), (F.VM_ENTRY_INTR_INFO_FIELD, 0x80000203),
    ],
)  # fmt: skip
def test_bad_controls(guest: Guest, field: Field, value: int) -> None:
    """SDM, "Checks on VMX Controls": VMfailValid 7."""
    guest[field] = value
    with pytest.raises(VmxError) as caught:
        guest.run("f4")
    assert caught.value.number == 7
    assert guest[F.VM_INSTRUCTION_ERROR] == 7


@pytest.mark.parametrize(
    ("field", "value", "qualification"),
    [
        (F.GUEST_CR0, 0x80050013, 0), (F.GUEST_CR4, 0x6A0, 0), (F.GUEST_CR4, 0x2680, 0), (F.GUEST_CR3, 1 << 47, 0),
        (F.GUEST_IA32_EFER, 0x901, 0), (F.GUEST_RFLAGS, 0, 0), (F.GUEST_RIP, 1 << 50, 0),
        (F.GUEST_CS_AR_BYTES, 0x93, 0),
        (F.GUEST_CS_AR_BYTES, 0xE09B, 0), (F.GUEST_TR_AR_BYTES, 0x10000, 0), (F.GUEST_TR_AR_BYTES, 0x89, 0),
        (F.GUEST_ACTIVITY_STATE, 4, 0), (F.GUEST_INTERRUPTIBILITY_INFO, 3, 0), (F.GUEST_INTERRUPTIBILITY_INFO, 1, 0),
        (F.VMCS_LINK_POINTER, 0, 4), (F.GUEST_GDTR_BASE, 1 << 50, 0), (F.GUEST_DS_AR_BYTES, 0xC013, 0),
        (F.GUEST_LDTR_AR_BYTES, 0x83, 0), (F.VM_ENTRY_INTR_INFO_FIELD, 0x80000020, 0),
    ],
)  # fmt: skip
def test_bad_guest_state(guest: Guest, field: Field, value: int, qualification: int) -> None:
    """SDM, "Checks on the Guest State Area": exit reason 33 with bit 31."""
    guest.ram.write(CODE, b"\xf4")
    guest[field] = value
    assert guest.vmx.run() == 33 | 1 << 31
    assert guest.qualification == qualification


def test_guest_state_comes_back(guest: Guest) -> None:
    guest.vmx.set_gpr(RAX, 0xABCDEF)
    # lgdt [0x7000]; mov ds, ebx; mov fs base by wrmsr is elsewhere; std; stac isn't there; hlt
    guest.ram.write(0x7000, (0x27).to_bytes(2, "little") + GDT.to_bytes(8, "little"))
    guest.vmx.set_gpr(RBX, 0x1B)
    assert guest.run("0f01142500700000 8edb fd f4".replace(" ", "")) == HLT
    assert (guest[F.GUEST_GDTR_LIMIT], guest[F.GUEST_GDTR_BASE]) == (0x27, GDT)
    assert (guest[F.GUEST_DS_SELECTOR], guest[F.GUEST_DS_AR_BYTES], guest[F.GUEST_DS_LIMIT]) == (
        0x1B,
        0xC0F3,
        0xFFFFFFFF,
    )
    assert guest[F.GUEST_RFLAGS] & 0x400


def test_user_code_syscall_and_back(guest: Guest) -> None:
    """A guest kernel and a guest user: SYSRET to CPL 3, SYSCALL back, all without an exit."""
    guest.vmx.wrmsr(0xC0000081, 0x0010 << 48 | 0x0008 << 32)
    guest.vmx.wrmsr(0xC0000082, CODE + 0x40)
    guest.vmx.wrmsr(0xC0000084, 0x200)
    guest.vmx.set_gpr(RCX, CODE + 0x20)
    guest.vmx.set_gpr(11, 0x202)
    guest.ram.write(CODE + 0x20, bytes.fromhex("0f05"))
    guest.ram.write(CODE + 0x40, bytes.fromhex("f4"))
    assert guest.run("480f07") == HLT
    assert guest[F.GUEST_RIP] == CODE + 0x40
    assert guest[F.GUEST_CS_SELECTOR] == 8
    assert guest.vmx.gpr(RCX) == CODE + 0x22
    assert guest.vmx.gpr(11) & 0x200
    assert not guest[F.GUEST_RFLAGS] & 0x200


def test_capabilities_allow_what_the_entry_accepts(guest: Guest) -> None:
    """SDM, "VMX Capability Reporting Facility"."""
    basic = guest.vmx.capability(0x480)
    assert basic & 0x7FFFFFFF == 0x766D6F6E
    assert basic >> 32 & 0x1FFF == 4096
    assert basic >> 55 & 1
    for true, plain in ((0x48D, 0x481), (0x48E, 0x482), (0x48F, 0x483), (0x490, 0x484)):
        low, high = guest.vmx.capability(true) & 0xFFFFFFFF, guest.vmx.capability(true) >> 32
        assert low & ~high == 0
        assert guest.vmx.capability(plain) >> 32 == high
        assert guest.vmx.capability(plain) & 0xFFFFFFFF & low == low
    with pytest.raises(KeyError):
        guest.vmx.capability(0x492)


def test_tlb_follows_vpid_and_invvpid(guest: Guest) -> None:
    guest.ram.write_u64(0x3008, 0x87)  # va 2 MiB = physical 0 as well
    guest.ram.write_u32(0x60000, 1)
    assert guest.run("8b042500006000 8b042500002600 f4".replace("6000 ", "0600 ").replace(" ", "")) == HLT
    guest.ram.write_u64(0x3008, 0)
    guest.vmx.invvpid(1, 1)
    assert guest.run("8b042500002600f4") == HLT
    assert guest.handler == 14


def test_rip_may_be_off_the_canonical_half_by_one_bit(guest: Guest) -> None:
    """SDM, "Checks on Guest RIP, RFLAGS, and SSP": bits 63:48 are identical, bit 47 may differ; the fetch faults."""
    assert guest.run("0fa2 f4".replace(" ", "")) == CPUID
    guest[F.EXCEPTION_BITMAP] = 1 << 13
    guest[F.GUEST_RIP] = 1 << 47
    assert guest.vmx.vmresume() == 0
    assert (guest[F.VM_EXIT_INTR_INFO] & 0xFF, guest[F.GUEST_RIP]) == (13, 1 << 47)
    guest[F.GUEST_RIP] = 1 << 48
    assert guest.vmx.vmresume() == 33 | 1 << 31
