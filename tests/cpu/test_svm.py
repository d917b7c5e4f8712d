"""SVM: VMRUN, intercepts, and what #VMEXIT reports. APM, "Secure Virtual Machine"."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from vmonty.cpu import vmcb
from vmonty.cpu.vmcb import INVALID, ExitCode, Field

from .svm_guest import CODE, Guest

F, X = Field, ExitCode
RCX, RDX, RBX, RSI, RDI = 1, 2, 3, 6, 7


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_declarations_are_those_of_the_table() -> None:
    assert Path(vmcb.__file__).with_suffix(".pxd").read_text() == vmcb.c_names()


def test_dump_names_every_field(guest: Guest) -> None:
    shown = vmcb.dump(guest.pages.read(0, 4096))
    assert set(shown) == {field.name for field in Field}
    assert (shown["CR3"], shown["CS_ATTRIB"], shown["CPL"]) == (0x1000, 0xA9B, 0)


def test_run_exit_and_go_on(guest: Guest) -> None:
    guest.vmcb.intercept(X.CPUID)
    assert guest.run("b878563412 0fa2 0fa2 f4".replace(" ", "")) == X.CPUID
    assert (guest[F.RIP], guest[F.NRIP], guest[F.RAX]) == (CODE + 5, CODE + 7, 0x12345678)
    guest[F.RIP], guest[F.RAX] = guest[F.NRIP], 7
    assert guest.run() == X.CPUID
    assert guest[F.RAX] == 7
    guest[F.RIP] = guest[F.NRIP]
    assert guest.run() == X.HLT
    assert guest.svm.entries == 3


@pytest.mark.parametrize(
    ("code", "exit_code", "length"),
    [
        ("0fa2", X.CPUID, 2), ("f4", X.HLT, 1), ("0f08", X.INVD, 2), ("0f01d9", X.VMMCALL, 3), ("0f33", X.RDPMC, 2),
        ("0f01d1", X.XSETBV, 3), ("0f01c8", X.MONITOR, 3), ("0f01c9", X.MWAIT, 3), ("0f31", X.RDTSC, 2),
        ("0f01f9", X.RDTSCP, 3), ("0f0138", X.INVLPG, 3), ("0f09", X.WBINVD, 2), ("0f0118", X.IDTR_WRITE, 3),
        ("0f0110", X.GDTR_WRITE, 3), ("0f0100", X.GDTR_READ, 3), ("0f0108", X.IDTR_READ, 3), ("0f00d8", X.TR_WRITE, 3),
        ("0f00d0", X.LDTR_WRITE, 3), ("0f00c8", X.TR_READ, 3), ("0f00c0", X.LDTR_READ, 3), ("9c", X.PUSHF, 1),
        ("9d", X.POPF, 1), ("48cf", X.IRET, 2), ("cd20", X.SWINT, 2), ("f390", X.PAUSE, 2), ("0f01df", X.INVLPGA, 3),
        ("0f01d8", X.VMRUN, 3), ("0f01da", X.VMLOAD, 3), ("0f01db", X.VMSAVE, 3), ("0f01dc", X.STGI, 3),
        ("0f01dd", X.CLGI, 3), ("f1", X.ICEBP, 1), ("660f388208", X.INVPCID, 5),
        ("0f20c3", X.READ_CR0, 3), ("0f20db", X.READ_CR0 + 3, 3), ("0f22e3", X.WRITE_CR0 + 4, 3),
        ("440f22c3", X.WRITE_CR0 + 8, 4), ("0f06", X.WRITE_CR0, 2), ("0f01f0", X.WRITE_CR0, 3),
        ("0f01e0", X.READ_CR0, 3), ("0f21fb", X.READ_DR0 + 7, 3), ("0f23f3", X.WRITE_DR0 + 6, 3),
    ],
)  # fmt: skip
def test_instruction_intercepts(guest: Guest, code: str, exit_code: ExitCode, length: int) -> None:
    """APM, "Instruction Intercepts": rip at the instruction, nRIP behind it; without the intercept it doesn't exit."""
    guest[F.CR4] = 0x406A0
    guest[F.RAX] = 0x6000
    guest.svm.set_gpr(RCX, 0)
    guest.svm.set_gpr(RDX, 0x6100)
    if exit_code not in (X.HLT, X.VMRUN):
        guest.run(code + "f4")
        assert guest[F.EXITCODE] != exit_code
        guest.state()
        guest[F.CR4], guest[F.RAX] = 0x406A0, 0x6000
        guest.svm.set_gpr(RCX, 0)
    guest.vmcb.intercept(exit_code)
    assert guest.run(code) == exit_code
    assert (guest[F.RIP], guest[F.NRIP]) == (CODE, CODE + length)
    assert guest[F.EXITINTINFO] == 0
    if exit_code == X.INVLPG:
        assert guest[F.EXITINFO1] == 0x6000
    if exit_code == X.SWINT:
        assert guest[F.EXITINFO1] == 0x20


@pytest.mark.parametrize(
    ("code", "information"),
    [("0f22c3", 1 << 63 | 3), ("410f22c1", 1 << 63 | 9), ("0f06", 0), ("0f01f0", 0)],
)
def test_decode_assists_of_cr_writes(guest: Guest, code: str, information: int) -> None:
    """APM, "MOV CRx/DRx Intercepts" of "Decode Assists"."""
    guest.vmcb.intercept(X.WRITE_CR0)
    assert guest.run(code) == X.WRITE_CR0
    assert guest[F.EXITINFO1] == information


def test_selective_cr0_write(guest: Guest) -> None:
    """APM, "CR0 Selective Write": TS and MP may change."""
    guest.vmcb.intercept(X.CR0_SEL_WRITE)
    guest.svm.set_gpr(RBX, 0x80050033 ^ 8 ^ 2)
    assert guest.run("0f22c3f4") == X.HLT
    assert guest[F.CR0] == 0x80050033 ^ 8 ^ 2
    guest.svm.set_gpr(RBX, 0x80040033)
    assert guest.run("0f22c3f4") == X.CR0_SEL_WRITE


def test_privilege_comes_before_the_intercept(guest: Guest) -> None:
    guest.user()
    assert guest.run("f4") == X.HLT
    assert guest.handler == 13
    assert guest[F.CPL] == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (F.ASID, 0), (F.EFER, 0xD01), (F.CR0, 0xA0050033), (F.CR0, 1 << 32 | 0x80050033), (F.CR4, 1 << 31),
        (F.CR4, 0x680), (F.DR6, 1 << 32), (F.DR7, 1 << 32), (F.EFER, 1 << 16 | 0x1D01), (F.CS_ATTRIB, 0xE9B),
        (F.INTERCEPT_WORD4, 0), (F.EVENTINJ, 1 << 31 | 3 << 8 | 2), (F.EVENTINJ, 1 << 31 | 1 << 8 | 32),
        (F.EVENTINJ, 1 << 31 | 3 << 8 | 40), (F.CR3, 1 << 60),
    ],
)  # fmt: skip
def test_consistency_checks(guest: Guest, field: Field, value: int) -> None:
    """APM, "Canonicalization and Consistency Checks": VMEXIT_INVALID, and the guest is not entered."""
    guest[field] = value
    assert guest.run("f4") == INVALID
    assert guest[F.RIP] == CODE
    assert guest.svm.entries == 0


@pytest.mark.parametrize(
    ("code", "information", "length"),
    [
        ("e471", 0x710011, 2), ("e671", 0x710010, 2), ("ec", 0x3F80011, 1), ("66ed", 0x3F80021, 2),
        ("ed", 0x3F80041, 1), ("6c", 0x3F80215, 1), ("f36f", 0x3F80E4C, 2), ("f3676e", 0x3F80D1C, 3),
    ],
)  # fmt: skip
def test_io_intercept(guest: Guest, code: str, information: int, length: int) -> None:
    """APM, "IN and OUT Behavior": EXITINFO1, and EXITINFO2 behind the instruction."""
    guest.vmcb.intercept(X.IOIO)
    for port in (0x71, 0x3FB):
        guest.intercept_port(port)
    guest.intercept_port(0x3F8)
    for register, value in ((RDX, 0x3F8), (RCX, 4), (RSI, 0x5000), (RDI, 0x6000)):
        guest.svm.set_gpr(register, value)
    assert guest.run(code) == X.IOIO
    assert guest[F.EXITINFO1] == information
    assert guest[F.EXITINFO2] == CODE + length


def test_io_map_covers_every_byte_of_the_access(guest: Guest) -> None:
    guest.vmcb.intercept(X.IOIO)
    guest.intercept_port(0x3FB)
    guest.svm.set_gpr(RDX, 0x3F8)
    assert guest.run("ed") == X.IOIO  # 3F8 to 3FB
    guest.svm.set_gpr(RDX, 0xFFFF)
    guest.intercept_port(0x10000)
    assert guest.run("66ed") == X.IOIO  # the map's bits behind the last port


@pytest.mark.parametrize("index", [0x174, 0xC0000082, 0xC0010117])
def test_msr_map(guest: Guest, index: int) -> None:
    """APM, "MSR Intercepts"."""
    guest.vmcb.intercept(X.MSR)
    guest.svm.set_gpr(RCX, index)
    guest.svm.set_gpr(RDX, 0)
    guest[F.RAX] = 0
    assert guest.run("0f320f30f4") == X.HLT
    guest.intercept_msr(index, write=True)
    assert guest.run("0f320f30f4") == X.MSR
    assert (guest[F.RIP], guest[F.EXITINFO1], guest[F.NRIP]) == (CODE + 2, 1, CODE + 4)
    guest.intercept_msr(index, write=False)
    assert guest.run("0f320f30f4") == X.MSR
    assert (guest[F.RIP], guest[F.EXITINFO1]) == (CODE, 0)
    guest.svm.set_gpr(RCX, 0x4B564D01)
    assert guest.run("0f32f4") == X.MSR  # outside the map


@pytest.mark.parametrize(
    ("code", "vector", "error", "address"),
    [("0f0b", 6, 0, 0), ("8b042500004000", 14, 0, 0x400000), ("668ed8", 13, 0xFFF8, 0), ("cc", 3, 0, 0)],
)
def test_exception_intercepts(guest: Guest, code: str, vector: int, error: int, address: int) -> None:
    """APM, "Exception Intercepts": EXITINFO1 has the error code, EXITINFO2 of #PF the address; CR2 stays."""
    guest[F.RAX] = 0xFFFB
    guest[F.CR2] = 0x77
    guest.vmcb.intercept(X.EXCEPTION_DE + vector)
    assert guest.run(code) == X.EXCEPTION_DE + vector
    assert (guest[F.RIP], guest[F.EXITINFO1], guest[F.EXITINFO2], guest[F.CR2]) == (CODE, error, address, 0x77)
    if vector == 3:
        assert guest[F.NRIP] == CODE + 1
    if vector == 14:
        assert guest.vmcb.instruction_bytes()[:7] == bytes.fromhex(code)


def test_single_step_intercept_comes_after_dr6(guest: Guest) -> None:
    """APM, "#DB (Debug)"."""
    guest.vmcb.intercept(X.EXCEPTION_DE + 1)
    guest[F.RFLAGS] = 0x102
    assert guest.run("90f4") == X.EXCEPTION_DE + 1
    assert (guest[F.RIP], guest[F.DR6] & 0x4000) == (CODE + 1, 0x4000)


def test_shutdown(guest: Guest) -> None:
    guest[F.IDTR_LIMIT] = 0
    assert guest.run("0f0b") == X.SHUTDOWN


@pytest.mark.parametrize(
    ("event", "frame"),
    [
        (1 << 31 | 0x40, [CODE, 8, 2]),  # external interrupt
        (1 << 31 | 2 << 8 | 2, [CODE, 8, 2]),  # NMI
        (1 << 31 | 1 << 11 | 3 << 8 | 13 | 0x1234 << 32, [0x1234, CODE, 8, 0x10002]),  # #GP
        (1 << 31 | 4 << 8 | 0x20, [CODE + 2, 8, 2]),  # INT 20h, to nRIP
    ],
)
def test_event_injection(guest: Guest, event: int, frame: list[int]) -> None:
    """APM, "Event Injection": through the guest's IDT, whatever is intercepted."""
    guest.vmcb.intercept(X.EXCEPTION_DE + 13)
    guest.vmcb.intercept(X.SWINT)
    guest[F.EVENTINJ], guest[F.NRIP] = event, CODE + 2
    assert guest.run() == X.HLT
    assert guest.handler == event & 0xFF
    assert guest.stack(len(frame)) == frame
    assert guest[F.EVENTINJ] >> 31 & 1 == 0


def test_an_exit_on_the_way_to_a_handler_tells_the_event(guest: Guest) -> None:
    """APM, "EXITINTINFO"; and it can be injected again as it is."""
    guest.map(0xA, 0)  # the IDT
    guest[F.EVENTINJ] = event = 1 << 31 | 1 << 11 | 3 << 8 | 13 | 0x88 << 32
    assert guest.run() == X.NPF
    assert guest[F.EXITINTINFO] == event
    assert guest[F.EXITINFO2] == 0xA0D0
    guest.map(0xA)
    guest[F.EVENTINJ] = guest[F.EXITINTINFO]
    assert guest.run() == X.HLT
    assert guest.handler == 13


@pytest.mark.parametrize(
    ("code", "flags", "information"),
    [
        ("8b042500a00900", 0, 1 << 32 | 4), ("89042500a00900", 5, 1 << 32 | 7), ("8b042500a00900f4", 5, None),
        ("e800600900", 1 << 63 | 7, 1 << 32 | 0x15),
    ],
)  # fmt: skip
def test_nested_page_fault(guest: Guest, code: str, flags: int, information: int | None) -> None:
    """APM, "Nested versus Guest Page Faults, Fault Ordering": EXITINFO1 and the guest-physical address."""
    guest.map(0x9A, flags)
    if information is None:
        assert guest.run(code) == X.HLT
        return
    assert guest.run(code.replace("e800600900", "e9fb5f0900")) == X.NPF
    assert guest[F.EXITINFO1] == information
    assert guest[F.EXITINFO2] >> 12 == 0x9A


def test_nested_page_fault_of_a_table_walk(guest: Guest) -> None:
    guest.map(3, 5)  # the page directory is read-only: its accessed bit can't be set
    assert guest.run("f4") == X.NPF
    assert guest[F.EXITINFO1] >> 32 == 2
    assert guest[F.EXITINFO2] >> 12 == 3


def test_interrupt_from_another_thread(guest: Guest) -> None:
    """#VMEXIT(INTR): whatever the guest's IF is under V_INTR_MASKING."""
    guest[F.INT_CTL] = 1 << 24

    def soon() -> None:
        time.sleep(0.05)  # while the guest spins; a kick before it is not lost either
        guest.svm.kick()

    thread = threading.Thread(target=soon)
    thread.start()
    assert guest.run("ebfe") == X.INTR
    thread.join()
    guest.svm.kick()
    assert guest.run("ebfe") == X.INTR


def test_virtual_interrupt(guest: Guest) -> None:
    """APM, "Virtual Interrupts": taken when IF allows it, with the vector of the VMCB; V_IRQ is clear then."""
    guest[F.INT_CTL], guest[F.INT_VECTOR] = 1 << 24 | 1 << 20 | 1 << 8, 0x55
    assert guest.run("90fb90f4") == X.HLT  # nop, sti, (shadow) nop
    assert guest.handler == 0x55
    assert guest.stack(1) == [CODE + 3]
    assert guest[F.INT_CTL] & 0x100 == 0


def test_interrupt_window(guest: Guest) -> None:
    guest.vmcb.intercept(X.VINTR)
    guest[F.INT_CTL] = 1 << 24 | 1 << 20 | 1 << 8
    assert guest.run("90fb90f4") == X.VINTR
    assert guest[F.RIP] == CODE + 3


def test_virtual_tpr_holds_back_lower_priorities(guest: Guest) -> None:
    """V_INTR_PRIO against V_TPR, which CR8 is."""
    guest[F.INT_CTL], guest[F.INT_VECTOR] = 1 << 24 | 5 << 16 | 1 << 8, 0x55
    guest[F.RAX] = 5
    guest.svm.set_gpr(RBX, 4)
    # mov cr8, rax; sti; nop; nop; mov cr8, rbx; nop
    assert guest.run("440f22c0fb9090440f22c390f4") == X.HLT
    assert guest.handler == 0x55
    assert guest.stack(1) == [CODE + 11]
    assert guest[F.INT_CTL] & 0xFF == 4


def test_interrupt_shadow(guest: Guest) -> None:
    """INT_STATE bit 0: set at an exit behind STI, and honoured at VMRUN."""
    guest.vmcb.intercept(X.CPUID)
    assert guest.run("fb0fa2f4") == X.CPUID
    assert guest[F.INT_STATE] == 1
    guest[F.INT_CTL], guest[F.INT_VECTOR] = 1 << 24 | 1 << 20 | 1 << 8, 0x55
    guest.vmcb.intercept(X.CPUID, False)
    assert guest.run() == X.HLT
    assert guest.stack(1) == [CODE + 3]


def test_pause_filter(guest: Guest) -> None:
    """APM, "Pause Intercept Filtering"."""
    guest.vmcb.intercept(X.PAUSE)
    guest[F.PAUSE_FILTER_COUNT] = 10
    guest.svm.set_gpr(RCX, 1000)
    assert guest.run("f390e2fc") == X.PAUSE
    assert guest.svm.gpr(RCX) == 1000 - 10


def test_task_switch_in_protected_mode(guest: Guest) -> None:
    """APM, "Task Switch Intercept"."""
    guest.vmcb.intercept(X.TASK_SWITCH)
    guest[F.CR0], guest[F.CR4], guest[F.EFER] = 0x33, 0, 0x1000
    guest.segment("CS", 8, 0xC9B)
    guest.ram.write_u64(0xB000 + 0x18, 0x0000890000000067 | 0xD000 << 16)
    assert guest.run("ea000000001800") == X.TASK_SWITCH
    assert (guest[F.EXITINFO1], guest[F.EXITINFO2]) == (0x18, 1 << 38)


def test_pae_tables_are_read_when_they_are_used(guest: Guest) -> None:
    """APM, "Legacy PAE Mode": a PDPTE changed without a load of CR3 counts at the next walk."""
    guest[F.CR4], guest[F.EFER] = 0x6A0, 0x1000
    guest.segment("CS", 8, 0xC9B)
    for at, value in ((0x7000, 0x3001), (0x3000, 0x87)):
        guest.ram.write_u64(at, value)
    guest[F.CR3] = 0x7000
    guest.vmcb.intercept(X.EXCEPTION_DE + 14)
    assert guest.run("a100001040f4") == X.EXCEPTION_DE + 14
    assert guest[F.EXITINFO2] == 0x40100000
    guest.ram.write_u64(0x7008, 0x3001)
    guest.ram.write_u32(0x100000, 0xCAFE)
    assert guest.run("a100001040f4") == X.HLT
    assert guest[F.RAX] == 0xCAFE


def test_vmload_and_vmsave_move_the_rest(guest: Guest) -> None:
    guest[F.STAR], guest[F.KERNEL_GS_BASE], guest[F.GS_BASE] = 0x1234, 0x5678, 0x9ABC
    guest.svm.vmload(guest.vmcb.address)
    assert (guest.svm.rdmsr(0xC0000081), guest.svm.rdmsr(0xC0000102)) == (0x1234, 0x5678)
    guest.svm.wrmsr(0xC0000082, 0xFFFF800000000000)
    guest.svm.vmsave(guest.vmcb.address)
    assert guest[F.LSTAR] == 0xFFFF800000000000
    assert guest[F.GS_BASE] == 0x9ABC


def test_emulate_reports_missing_memory(guest: Guest) -> None:
    guest.ram.write(CODE, bytes.fromhex("8b0425 00a00900 8904250 8a00900 f4".replace(" ", "")))
    guest.map(0x9A, 0)
    assert guest.svm.emulate(guest.vmcb.address) == "mmio"
    assert guest.svm.mmio[:3] == (0x9A000, 4, False)
    guest.svm.answer_mmio(0x11223344)
    assert guest.svm.emulate(guest.vmcb.address, resume=True) == "budget"
    assert guest[F.RAX] == 0x11223344
    assert guest.svm.emulate(guest.vmcb.address) == "mmio"
    assert guest.svm.mmio == (0x9A008, 4, True, 0x11223344)
    assert guest[F.RIP] == CODE + 14


def test_addresses_that_raise_gp(guest: Guest) -> None:
    with pytest.raises(ValueError, match="VMRUN"):
        guest.svm.vmrun(guest.vmcb.address + 8)
