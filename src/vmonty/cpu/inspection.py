"""The processor's state for observers and tests: registers by name, segments, page walks, single helpers.

Nothing here is called while a guest runs.
"""

from __future__ import annotations

import cython
from cython.cimports.vmonty.cpu.boundary import poll
from cython.cimports.vmonty.cpu.breakpoints import debug_changed
from cython.cimports.vmonty.cpu.cpuid import lookup
from cython.cimports.vmonty.cpu.events import deliver
from cython.cimports.vmonty.cpu.paging import Translation, walk
from cython.cimports.vmonty.cpu.segments import load_segment, ltr
from cython.cimports.vmonty.cpu.state import raise_error, raise_exception, raise_page_fault
from cython.cimports.vmonty.cpu.tlb import flush_all, mode_changed

from vmonty.cpu.core import REGISTERS
from vmonty.cpu.walks import FAULTS, SegmentState, Walk

WIDE = (
    "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0", "star", "lstar", "cstar", "fmask",
    "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip", "debugctl", "pat", "tsc_aux", "apic_base",
    "tsc_offset", "nested_root", "physical_bits", "gdtr_base", "idtr_base", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7",
)  # fmt: skip
SHORT = (
    "cpl", "mode", "interruptibility", "activity", "interrupt_line", "nmi_line", "interrupt_vector", "pending_debug",
    "nested", "direct", "vectoring", "guest_mode", "a20_off", "gdtr_limit", "idtr_limit",
)  # fmt: skip
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
LEAVES = ("go_on", "event", "jump", "exit", "retry", "next", "careful")


def _field(s, name):
    """Where a 64-bit register is; KeyError for an unknown name."""
    if name in REGISTERS:
        return cython.address(s.gpr[REGISTERS.index(name)])
    if name == "rip":
        return cython.address(s.rip)
    if name == "rflags":
        return cython.address(s.rflags)
    if name == "cr0":
        return cython.address(s.cr0)
    if name == "cr2":
        return cython.address(s.cr2)
    if name == "cr3":
        return cython.address(s.cr3)
    if name == "cr4":
        return cython.address(s.cr4)
    if name == "cr8":
        return cython.address(s.cr8)
    if name == "efer":
        return cython.address(s.efer)
    if name == "xcr0":
        return cython.address(s.xcr0)
    if name == "star":
        return cython.address(s.star)
    if name == "lstar":
        return cython.address(s.lstar)
    if name == "cstar":
        return cython.address(s.cstar)
    if name == "fmask":
        return cython.address(s.fmask)
    if name == "kernel_gs_base":
        return cython.address(s.kernel_gs_base)
    if name == "sysenter_cs":
        return cython.address(s.sysenter_cs)
    if name == "sysenter_esp":
        return cython.address(s.sysenter_esp)
    if name == "sysenter_eip":
        return cython.address(s.sysenter_eip)
    if name == "debugctl":
        return cython.address(s.debugctl)
    if name == "pat":
        return cython.address(s.pat)
    if name == "tsc_aux":
        return cython.address(s.tsc_aux)
    if name == "apic_base":
        return cython.address(s.apic_base)
    if name == "tsc_offset":
        return cython.address(s.tsc_offset)
    if name == "nested_root":
        return cython.address(s.nested_root)
    if name == "physical_bits":
        return cython.address(s.physical_bits)
    if name == "gdtr_base":
        return cython.address(s.gdtr.base)
    if name == "idtr_base":
        return cython.address(s.idtr.base)
    if len(name) == 3 and name[:2] == "dr" and name[2] in "012367":
        return cython.address(s.dr[int(name[2])])
    raise KeyError(name)


def _short_field(s, name):
    """Where a 32-bit field is; NULL for other names."""
    if name == "cpl":
        return cython.address(s.cpl)
    if name == "mode":
        return cython.address(s.mode)
    if name == "interruptibility":
        return cython.address(s.interruptibility)
    if name == "activity":
        return cython.address(s.activity)
    if name == "interrupt_line":
        return cython.address(s.interrupt_line)
    if name == "nmi_line":
        return cython.address(s.nmi_line)
    if name == "interrupt_vector":
        return cython.address(s.interrupt_vector)
    if name == "pending_debug":
        return cython.address(s.pending_debug)
    if name == "nested":
        return cython.address(s.nested)
    if name == "direct":
        return cython.address(s.direct)
    if name == "vectoring":
        return cython.address(s.vectoring)
    if name == "guest_mode":
        return cython.address(s.guest_mode)
    if name == "a20_off":
        return cython.address(s.a20_off)
    if name == "gdtr_limit":
        return cython.address(s.gdtr.limit)
    if name == "idtr_limit":
        return cython.address(s.idtr.limit)
    return cython.NULL


def _segment(s, name):
    """Where a segment register is; KeyError for an unknown name."""
    index: cython.int = SEGMENTS.index(name)
    if index == 6:
        return cython.address(s.ldtr)
    if index == 7:
        return cython.address(s.tr)
    return cython.address(s.segs[index])


def get(cpu: Cpu, name: str) -> int:
    """Read a register or state field by name (REGISTERS, WIDE, SHORT)."""
    short: cython.pointer(uint32_t) = _short_field(cpu.s, name)
    if short != cython.NULL:
        return short[0]
    return _field(cpu.s, name)[0]


def put(cpu: Cpu, name: str, value: cython.ulonglong) -> None:
    """Write one. The mode and TLB follow."""
    short: cython.pointer(uint32_t) = _short_field(cpu.s, name)
    if short != cython.NULL:
        short[0] = cython.cast(uint32_t, value)
    else:
        _field(cpu.s, name)[0] = value
    debug_changed(cpu.s)
    mode_changed(cpu.s)
    flush_all(cpu.s)


def get_segment(cpu: Cpu, name: str) -> SegmentState:
    """Read a segment register (SEGMENTS)."""
    segment: cython.pointer(Segment) = _segment(cpu.s, name)
    return SegmentState(segment.selector, segment.base, segment.limit, segment.access_rights)


def put_segment(cpu: Cpu, name: str, value: SegmentState) -> None:
    """Write a segment register with its hidden part."""
    segment: cython.pointer(Segment) = _segment(cpu.s, name)
    segment.selector = value.selector
    segment.base = value.base
    segment.limit = value.limit
    segment.access_rights = value.access_rights
    mode_changed(cpu.s)


def set_pdptes(cpu: Cpu, values: list) -> None:
    """Load the four PDPTE registers of PAE paging."""
    k: cython.int
    for k in range(4):
        cpu.s.pdpte[k] = values[k]


def debug_state(cpu: Cpu) -> dict:
    """Every register by name."""
    state = {name: get(cpu, name) for name in (*REGISTERS, *WIDE, *SHORT)}
    state.update({name: get_segment(cpu, name) for name in SEGMENTS})
    return state


def walk_page(cpu: Cpu, va: cython.ulonglong, access: cython.uint) -> Walk:
    """Walk the page tables as an access of that kind would (ACCESS_* bits); A and D flags are set in memory."""
    t: Translation
    fault: cython.uint = walk(cpu.s, va, access, cython.address(t))
    if fault:
        return Walk(fault=FAULTS[fault], error_code=t.error_code, qualification=t.qualification,
                    fault_physical=t.fault_physical)  # fmt: skip
    return Walk(
        fault="", physical=t.physical, host=t.host, size=t.size, may_write=t.may_write != 0,
        may_execute=t.may_execute != 0, is_global=t.is_global != 0, user=t.user != 0,
    )  # fmt: skip


def raise_and_deliver(
    cpu: Cpu, vector: cython.uint, error_code: int = -1, address: cython.ulonglong = 0, kind: cython.uint = 3,
    length: cython.uint = 0,
) -> str:  # fmt: skip
    """Record an event (kind: VMX interruption type) and deliver it; what the dispatcher would be told (LEAVES)."""
    if vector == 14:
        raise_page_fault(cpu.s, address, error_code)
    elif error_code >= 0:
        raise_error(cpu.s, vector, error_code)
    else:
        raise_exception(cpu.s, vector)
    cpu.s.event.kind = kind
    cpu.s.event.instruction_length = length
    return LEAVES[deliver(cpu.s)]


def poll_events(cpu: Cpu) -> str:
    """What the dispatcher's look around would do."""
    return LEAVES[poll(cpu.s)]


def move_to_segment(cpu: Cpu, name: str, selector: cython.uint) -> str:
    """MOV to a segment register."""
    return LEAVES[load_segment(cpu.s, SEGMENTS.index(name), selector)]


def load_task_register(cpu: Cpu, selector: cython.uint) -> str:
    """LTR."""
    return LEAVES[ltr(cpu.s, selector, 3, 0, 0)]


def cpuid(cpu: Cpu, leaf: cython.uint, subleaf: cython.uint = 0) -> tuple:
    """EAX, EBX, ECX, EDX as the processor would answer."""
    out: uint32_t[4]
    lookup(cpu.s, leaf, subleaf, cython.cast(cython.pointer(uint32_t), out))
    return out[0], out[1], out[2], out[3]
