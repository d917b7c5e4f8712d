"""Each VMX control that the capability MSRs offer. SDM, "VM-Execution Control Fields", "VM-Exit Control Fields"."""

from __future__ import annotations

import time

import pytest

from vmonty.cpu.vmcs import Field
from vmonty.testing.nasm import assemble

from . import test_vmx
from .vmx_guest import CODE, HANDLERS, PROCESSOR, SECONDARY, STACK, Guest

F = Field
HLT, TIMER, PAUSE, MONITOR_TRAP, RDRAND, RDSEED, TABLES, SELECTORS = 12, 52, 40, 37, 57, 61, 46, 47
RAX, RCX = 0, 1
TF, IF = 1 << 8, 1 << 9
AT = 0x60000
PIN = 0x16 | 1 | 8 | 0x20

# Which test shows that a control is honoured, by capability MSR and bit.
HONOURED = {
    0x48D: {
        0: "test_kick_ends_a_running_guest", 3: "test_nmi_exits", 5: "test_nmi_window_opens_after_iret",
        6: "test_preemption_timer_interrupts_code",
    },
    0x48E: {
        2: "test_interrupt_window_and_sti_shadow", 3: "test_rdtsc_offset", 7: "test_instructions_that_exit",
        9: "test_instructions_that_exit", 10: "test_instructions_that_exit", 11: "test_instructions_that_exit",
        12: "test_instructions_that_exit", 15: "test_cr3_targets_and_cr8", 16: "test_cr3_store",
        19: "test_cr3_targets_and_cr8", 20: "test_cr3_targets_and_cr8", 21: "test_tpr_shadow",
        22: "test_nmi_window_opens_after_iret", 23: "test_debug_register_accesses", 24: "test_io_exit",
        25: "test_io_bitmaps", 27: "test_monitor_trap_behind_each_instruction", 28: "test_msr_bitmap",
        29: "test_instructions_that_exit", 30: "test_pause", 31: "test_ept_violation_and_fill",
    },
    0x48B: {
        1: "test_ept_violation_and_fill", 2: "test_descriptor_tables", 3: "test_instructions_that_need_a_control",
        5: "test_tlb_follows_vpid_and_invvpid", 6: "test_instructions_that_exit", 7: "test_unrestricted_guest",
        10: "test_pause_loop", 11: "test_random_numbers", 12: "test_instructions_that_need_a_control",
        16: "test_random_numbers", 20: "test_instructions_that_need_a_control", 25: "test_tsc_scaling",
    },
    0x48F: {
        2: "test_debug_controls", 9: "test_launch_resume_and_what_stays", 15: "test_acknowledged_interrupt",
        18: "test_guest_state_comes_back", 19: "test_host_is_not_loaded", 20: "test_guest_state_comes_back",
        21: "test_host_is_not_loaded", 22: "test_preemption_timer_value_is_saved",
    },
    0x490: {
        2: "test_debug_controls", 9: "test_launch_resume_and_what_stays", 14: "test_pat_is_loaded",
        15: "test_guest_state_comes_back",
    },
}  # fmt: skip


@pytest.fixture
def guest() -> Guest:
    return Guest()


def code(source: str) -> str:
    return assemble(f"default abs\n{source}", 64, CODE).hex()


@pytest.mark.parametrize("msr", HONOURED, ids=hex)
def test_every_offered_control_has_a_test(guest: Guest, msr: int) -> None:
    value = guest.vmx.capability(msr)
    optional = value >> 32 & ~value & 0xFFFFFFFF
    assert {bit for bit in range(32) if optional >> bit & 1} == set(HONOURED[msr])
    for name in HONOURED[msr].values():
        assert name in globals() or hasattr(test_vmx, name), name


# ---- the preemption timer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["jmp $", "mov ecx, -1\nrep lodsb", "hlt"])
def test_preemption_timer_interrupts_code(guest: Guest, source: str) -> None:
    """SDM, "VMX-Preemption Timer": it counts down in non-root operation, also in HLT."""
    guest[F.PIN_BASED_VM_EXEC_CONTROL] = PIN | 0x40
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR & ~(1 << 7)
    guest[F.VMX_PREEMPTION_TIMER_VALUE] = 1_000_000
    assert guest.run(code(f"{source}\n jmp $")) == TIMER
    assert guest[F.GUEST_RIP] <= CODE + 8
    assert guest[F.GUEST_ACTIVITY_STATE] == (source == "hlt")


def test_preemption_timer_value_is_saved(guest: Guest) -> None:
    guest[F.PIN_BASED_VM_EXEC_CONTROL] = PIN | 0x40
    guest[F.VM_EXIT_CONTROLS] |= 1 << 22
    guest[F.VMX_PREEMPTION_TIMER_VALUE] = 1 << 30
    assert guest.run("f4") == HLT
    assert 0 < guest[F.VMX_PREEMPTION_TIMER_VALUE] < 1 << 30


def test_timer_that_never_ran_out_disturbs_nobody(guest: Guest) -> None:
    """It is stopped at the exit."""
    guest[F.PIN_BASED_VM_EXEC_CONTROL] = PIN | 0x40
    guest[F.VMX_PREEMPTION_TIMER_VALUE] = 100_000
    assert guest.run("f4") == HLT
    guest[F.PIN_BASED_VM_EXEC_CONTROL] = PIN
    time.sleep(0.01)
    assert guest.run("f4") == HLT


def test_tsc_scaling(guest: Guest) -> None:
    """SDM, "Time-Stamp Counter Multiplier": 48 bits of fraction, then the offset."""
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 8
    guest[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY | 1 << 25
    guest[F.TSC_MULTIPLIER] = 1 << 38  # one tick for 1024
    guest[F.TSC_OFFSET] = 1 << 62
    before = guest.vmx.rdmsr(0x10)
    assert guest.run(code("rdtsc\n hlt")) == HLT
    read = guest.vmx.gpr(2) << 32 | guest.vmx.gpr(0)
    assert before >> 10 <= read - (1 << 62) <= guest.vmx.rdmsr(0x10) >> 10


# ---- the monitor trap flag ---------------------------------------------------------------------------------------


@pytest.fixture
def trapping(guest: Guest) -> Guest:
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 27
    return guest


def test_monitor_trap_behind_each_instruction(trapping: Guest) -> None:
    """SDM, "Monitor Trap Flag"."""
    assert trapping.run("90" * 3) == MONITOR_TRAP
    assert trapping[F.GUEST_RIP] == CODE + 1
    assert trapping.run() == MONITOR_TRAP
    assert trapping[F.GUEST_RIP] == CODE + 2


def test_monitor_trap_behind_an_iteration(trapping: Guest) -> None:
    trapping.vmx.set_gpr(RCX, 3)
    assert trapping.run("f3ac") == MONITOR_TRAP
    assert (trapping[F.GUEST_RIP], trapping.vmx.gpr(RCX)) == (CODE, 2)


def test_monitor_trap_behind_a_delivery(trapping: Guest) -> None:
    """Injected or raised: before the handler's first instruction."""
    trapping[F.VM_ENTRY_INTR_INFO_FIELD] = 0x80000020
    trapping[F.GUEST_RFLAGS] = 2 | IF
    assert trapping.run("90") == MONITOR_TRAP
    assert trapping[F.GUEST_RIP] == HANDLERS + 16 * 0x20
    assert trapping.run("0f0b") == MONITOR_TRAP
    assert trapping[F.GUEST_RIP] == HANDLERS + 16 * 6


def test_monitor_trap_comes_before_the_debug_trap(trapping: Guest) -> None:
    """The single step waits in the pending debug exceptions."""
    trapping[F.GUEST_RFLAGS] = 2 | TF
    assert trapping.run("9090") == MONITOR_TRAP
    assert trapping[F.GUEST_PENDING_DBG_EXCEPTIONS] == 1 << 14
    trapping[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR
    assert trapping.run() == HLT
    assert trapping.handler == 1


def test_injected_monitor_trap(guest: Guest) -> None:
    """SDM, "Injection of Pending MTF VM Exits"."""
    guest[F.VM_ENTRY_INTR_INFO_FIELD] = 0x80000700
    assert guest.run("90") == MONITOR_TRAP
    assert guest[F.GUEST_RIP] == CODE


# ---- instructions ------------------------------------------------------------------------------------------------


def test_pause(guest: Guest) -> None:
    assert guest.run("f390f4") == HLT
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 30
    assert guest.run("f390f4") == PAUSE
    assert (guest[F.GUEST_RIP], guest[F.VM_EXIT_INSTRUCTION_LEN]) == (CODE, 2)
    assert guest.run("90f4") == HLT


def test_pause_loop(guest: Guest) -> None:
    """SDM, "Changes to Instruction Behavior in VMX Non-Root Operation": at CPL 0 only, in a loop only."""
    guest[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY | 1 << 10
    guest[F.PLE_GAP], guest[F.PLE_WINDOW] = 0xFFFFFFFF, 4096
    assert guest.run("f390f4") == HLT
    assert guest.run("f390ebfc") == PAUSE
    guest[F.PLE_GAP] = 0
    guest.vmx.set_gpr(RCX, 1000)
    assert guest.run(code("again: pause\n loop again\n hlt")) == HLT
    guest.user()
    guest[F.PLE_GAP], guest[F.PLE_WINDOW] = 0xFFFFFFFF, 0
    guest.vmx.set_gpr(RCX, 1000)
    assert guest.run(code("again: pause\n loop again\n hlt")) == HLT
    assert guest.handler == 13


@pytest.mark.parametrize(
    ("source", "bit", "reason", "information"),
    [
        ("rdrand rbx", 11, RDRAND, 3 << 3 | 2 << 11), ("rdrand r9d", 11, RDRAND, 9 << 3 | 1 << 11),
        ("rdseed cx", 16, RDSEED, 1 << 3),
    ],
)  # fmt: skip
def test_random_numbers(guest: Guest, source: str, bit: int, reason: int, information: int) -> None:
    instruction = code(source)
    assert guest.run(instruction + "f4") == HLT
    guest[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY | 1 << bit
    assert guest.run(instruction + "f4") == reason
    assert (guest[F.GUEST_RIP], guest[F.VMX_INSTRUCTION_INFO]) == (CODE, information)
    guest[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY | (1 << 11 | 1 << 16) & ~(1 << bit)
    assert guest.run(instruction + "f4") == HLT


@pytest.mark.parametrize(
    ("source", "bit"),
    [("rdtscp", 3), ("rdpid rax", 3), ("xor eax, eax\n invpcid rax, [0x6000]", 12), ("xsaves [0x6000]", 20)],
)
def test_instructions_that_need_a_control(guest: Guest, source: str, bit: int) -> None:
    """SDM, "Secondary Processor-Based VM-Execution Controls": #UD while the control that enables them is 0."""
    guest[F.GUEST_CR4] = 0x426A0
    guest[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY & ~(1 << bit)
    assert guest.run(code(f"{source}\n hlt")) == HLT
    assert guest.handler == 6
    if bit != 20:
        guest[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY | 1 << bit
        guest[F.GUEST_RSP] = STACK
        assert guest.run(code(f"{source}\n hlt")) == HLT
        assert guest[F.GUEST_RIP] < CODE + 64


@pytest.mark.parametrize(
    ("source", "reason", "identity"),
    [
        ("sgdt [rax]", TABLES, 0), ("sidt [rax]", TABLES, 1), ("lgdt [rax]", TABLES, 2), ("lidt [rax]", TABLES, 3),
        ("sldt [rax]", SELECTORS, 0), ("str ax", SELECTORS, 1), ("lldt ax", SELECTORS, 2), ("ltr ax", SELECTORS, 3),
    ],
)  # fmt: skip
def test_descriptor_tables(guest: Guest, source: str, reason: int, identity: int) -> None:
    """SDM, "Format of the VM-Exit Instruction-Information Field": bits 29:28 name the instruction."""
    guest[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY | 4
    guest.vmx.set_gpr(RAX, AT)
    assert guest.run(code(source)) == reason
    assert guest[F.VMX_INSTRUCTION_INFO] >> 28 & 3 == identity


def test_cr3_store(guest: Guest) -> None:
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 16
    assert guest.run("0f20d8") == 28
    assert guest.qualification == 3 | 1 << 4


@pytest.mark.parametrize(
    ("source", "qualification"), [("mov dr3, rcx", 3 | 1 << 8), ("mov rbx, dr6", 6 | 1 << 4 | 3 << 8)]
)
def test_debug_register_accesses(guest: Guest, source: str, qualification: int) -> None:
    """SDM, "Exit Qualification for MOV DR": before general detect."""
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR | 1 << 23
    guest[F.GUEST_DR7] = 0x2400
    assert guest.run(code(source)) == 29
    assert guest.qualification == qualification
    guest[F.CPU_BASED_VM_EXEC_CONTROL] = PROCESSOR
    assert guest.run(code(source)) == HLT
    assert guest.handler == 1


def test_unrestricted_guest(guest: Guest) -> None:
    """SDM, "Secondary Processor-Based VM-Execution Controls": unpaged code, only with the control."""
    guest[F.VM_ENTRY_CONTROLS] &= ~(1 << 9)
    guest[F.GUEST_CR0], guest[F.GUEST_IA32_EFER] = 0x20, 0
    for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        guest.segment(name, 0, 0x9B if name == "CS" else 0x93, 0, 0xFFFF)
    assert guest.run("f4") == HLT
    guest[F.SECONDARY_VM_EXEC_CONTROL] = SECONDARY & ~0x80
    assert guest.run("f4") & 0xFFFF == 33


# ---- entry and exit controls -------------------------------------------------------------------------------------


def test_acknowledged_interrupt(guest: Guest) -> None:
    """SDM, "VM-Exit Controls": acknowledge interrupt on exit."""
    guest.vmx.kick()
    assert guest.run("90") == 1
    assert guest[F.VM_EXIT_INTR_INFO] == 0
    guest[F.VM_EXIT_CONTROLS] |= 1 << 15
    guest.vmx.kick()
    assert guest.run("90") == 1
    assert guest[F.VM_EXIT_INTR_INFO] >> 31 == 1


def test_debug_controls(guest: Guest) -> None:
    guest[F.GUEST_DR7] = 0x455
    assert guest.run("0f21f8f4") == HLT
    assert guest.vmx.gpr(RAX) == 0x455
    guest[F.VM_ENTRY_CONTROLS] &= ~4
    guest[F.GUEST_DR7] = 0x400
    assert guest.run("0f21f8f4") == HLT
    assert (guest.vmx.gpr(RAX), guest[F.GUEST_DR7]) == (0x455, 0x455)
    guest[F.VM_EXIT_CONTROLS] &= ~4
    guest[F.GUEST_DR7] = 0x401
    assert guest.run("f4") == HLT
    assert guest[F.GUEST_DR7] == 0x401


def test_pat_is_loaded(guest: Guest) -> None:
    guest[F.VM_ENTRY_CONTROLS] |= 1 << 14
    guest[F.GUEST_IA32_PAT] = 0x0606060606060606
    guest.vmx.set_gpr(RCX, 0x277)
    assert guest.run("0f32f4") == HLT
    assert guest.vmx.gpr(RAX) == 0x06060606


def test_host_is_not_loaded(guest: Guest) -> None:
    """Host software that is Python has no state to load: the controls are accepted, the guest's values stay."""
    guest[F.VM_EXIT_CONTROLS] |= 1 << 19
    guest[F.HOST_IA32_PAT], guest[F.HOST_IA32_EFER] = 0, 0
    assert guest.run("f4") == HLT
    assert guest[F.GUEST_IA32_EFER] == 0xD01


# ---- debug exceptions --------------------------------------------------------------------------------------------


def test_pending_debug_exceptions_come_first(guest: Guest) -> None:
    """SDM, "Delivery of Pending Debug Exceptions after VM Entry"."""
    guest[F.GUEST_PENDING_DBG_EXCEPTIONS] = 1 << 14
    assert guest.run("9090f4") == HLT
    assert (guest.handler, guest.vmx.dr(6) & 0x4000, guest.ram.read_u64(guest[F.GUEST_RSP])) == (1, 0x4000, CODE)
    assert guest[F.GUEST_PENDING_DBG_EXCEPTIONS] == 0


def test_pending_bits_without_the_enabling_one_are_none(guest: Guest) -> None:
    guest[F.GUEST_PENDING_DBG_EXCEPTIONS] = 3
    assert guest.run("90f4") == HLT
    assert guest[F.GUEST_RIP] == CODE + 1


def test_injection_drops_pending_debug_exceptions(guest: Guest) -> None:
    guest[F.GUEST_PENDING_DBG_EXCEPTIONS] = 1 << 14
    guest[F.VM_ENTRY_INTR_INFO_FIELD] = 0x80000306
    assert guest.run("90f4") == HLT
    assert (guest.handler, guest.vmx.dr(6) & 0x4000) == (6, 0)


@pytest.mark.parametrize(("flags", "pending"), [(2 | TF, 0), (2, 1 << 14), (2, 1 << 5)])
def test_entry_refuses_a_wrong_pending_step(guest: Guest, flags: int, pending: int) -> None:
    """SDM, "Checks on Guest Non-Register State"."""
    guest[F.GUEST_INTERRUPTIBILITY_INFO] = 2
    guest[F.GUEST_RFLAGS], guest[F.GUEST_PENDING_DBG_EXCEPTIONS] = flags, pending
    assert guest.run("90") == 0x80000021


def test_breakpoint_waits_over_mov_ss_and_the_exit(guest: Guest) -> None:
    """What MOV SS read traps behind the next instruction; that one exits first."""
    guest.ram.write(AT, b"\x10\0")
    guest.vmx.set_dr(0, AT)
    guest[F.GUEST_DR7] = 0x400 | 1 | 3 << 16 | 1 << 18
    assert guest.run(code(f"mov ss, [{AT}]\n cpuid\n hlt")) == 10
    assert guest[F.GUEST_INTERRUPTIBILITY_INFO] == 2
    assert guest[F.GUEST_PENDING_DBG_EXCEPTIONS] == 0x1001
    guest.skip()
    guest[F.GUEST_INTERRUPTIBILITY_INFO] = 0
    assert guest.run() == HLT
    assert (guest.handler, guest.vmx.dr(6) & 15) == (1, 1)


def test_intercepted_debug_exception(guest: Guest) -> None:
    """SDM, "Exit Qualification for Debug Exceptions": DR6 and DR7 keep their values."""
    guest[F.EXCEPTION_BITMAP] = 2
    guest.vmx.set_dr(1, AT)
    guest.vmx.set_dr(6, 0xFFFF0FF0)
    guest[F.GUEST_DR7] = 0x400 | 4 | 1 << 20
    assert guest.run(code(f"mov byte [{AT}], 1\n hlt")) == 0
    assert (guest[F.VM_EXIT_INTR_INFO], guest.qualification) == (0x80000301, 2)
    assert (guest.vmx.dr(6), guest[F.GUEST_RIP]) == (0xFFFF0FF0, CODE + 8)
    guest[F.GUEST_DR7] = 0x2400
    assert guest.run(code("mov rax, dr0")) == 0
    assert (guest.qualification, guest[F.GUEST_DR7], guest[F.GUEST_RIP]) == (0x2000, 0x2400, CODE)


def test_icebp(guest: Guest) -> None:
    """INT1 is a privileged software exception; its gate's DPL does not matter."""
    guest.user()
    assert guest.run("f1") == HLT
    assert guest.handler == 1
    assert guest.ram.read_u64(guest[F.GUEST_RSP]) == CODE + 1
    guest.user()
    guest[F.GUEST_RSP] = STACK
    guest[F.EXCEPTION_BITMAP] = 2
    assert guest.run("f1") == 0
    assert (guest[F.VM_EXIT_INTR_INFO], guest[F.VM_EXIT_INSTRUCTION_LEN], guest[F.GUEST_RIP]) == (0x80000501, 1, CODE)
