"""Instructions that are executed by compiled helpers: which function does which, with what operands.

``execute`` is called by the dispatcher or by translated code with the guest's state complete and rip at the
instruction. What the instructions mean is in ``segments``, ``control``, ``information``, ``events``, ``syscalls``,
``ports``, ``strings``, ``fpu``; here is only where their operands come from and go to.
"""

import cython
from cython.cimports.vmonty.cpu import (
    control,
    events,
    information,
    ports,
    segments,
    syscalls,
    transfers,
)
from cython.cimports.vmonty.cpu.decode import (
    C_CLI,
    C_DF,
    C_FPU,
    C_GATHER,
    C_MASKED,
    C_MASKMOV,
    C_POPF,
    C_PUSHF,
    C_STRING,
    ROW,
)
from cython.cimports.vmonty.cpu.fpu import fpu_instruction
from cython.cimports.vmonty.cpu.gather import gather_instruction, masked_bytes, masked_instruction
from cython.cimports.vmonty.cpu.legacy import legacy_instruction
from cython.cimports.vmonty.cpu.modrm import (
    displacement,
    get_register,
    instruction_info,
    put_register,
    read_rm,
    write_rm,
)
from cython.cimports.vmonty.cpu.segmentation import effective_address, linear_address, operand_address
from cython.cimports.vmonty.cpu.state import (
    ACCESS_READ,
    ACCESS_WRITE,
    CS,
    DS,
    ES,
    EVENT_PRIVILEGED,
    EVENT_SOFT_EXCEPTION,
    EVENT_SOFT_INTERRUPT,
    FLAG_AC,
    FLAG_DF,
    FLAG_OF,
    FLAG_ZF,
    FS,
    GS,
    LEAVE_NEXT,
    MODE_LONG64,
    RAX,
    RBP,
    RDX,
    RSP,
    SHADOW_MOV_SS,
    SS,
    is_register_canonical,
    raise_error,
    raise_exception,
)
from cython.cimports.vmonty.cpu.strings import string_instruction
from cython.cimports.vmonty.cpu.svm_exit import svm_exit, svm_wants
from cython.cimports.vmonty.cpu.tlb import mode_changed, probe_write, read_value, write_value
from cython.cimports.vmonty.cpu.virtualization import (
    svm_instruction,
    vmx_field,
    vmx_invalidate,
    vmx_pointer,
    vmx_register,
)
from cython.cimports.vmonty.cpu.vmcb import SVM_POPF, SVM_PUSHF

# ---- the stack -------------------------------------------------------------------------------------------


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _stack_address(s: cython.pointer(CpuState), offset: uint64_t, size: cython.int, write: cython.int,
                   linear: cython.pointer(uint64_t)) -> cython.int:  # fmt: skip
    return linear_address(s, SS, offset & segments.stack_mask(s), size, write, linear)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _move_rsp(s: cython.pointer(CpuState), by: uint64_t) -> cython.void:
    mask: uint64_t = segments.stack_mask(s)
    s.gpr[RSP] = (s.gpr[RSP] & ~mask) | ((s.gpr[RSP] + by) & mask)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _push(s: cython.pointer(CpuState), value: uint64_t, size: cython.int) -> cython.int:
    linear: uint64_t = 0
    r: cython.int = _stack_address(s, s.gpr[RSP] - size, size, 1, cython.address(linear))
    if not r:
        r = write_value(s, linear, size, ACCESS_WRITE, value)
    if not r:
        _move_rsp(s, 0 - cython.cast(uint64_t, size))
    return r


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _top(s: cython.pointer(CpuState), size: cython.int, value: cython.pointer(uint64_t)) -> cython.int:
    """Read the top of the stack; rsp stays."""
    linear: uint64_t = 0
    r: cython.int = _stack_address(s, s.gpr[RSP], size, 0, cython.address(linear))
    if r:
        return r
    return read_value(s, linear, size, ACCESS_READ, value)


# ---- flags and stack ----------------------------------------------------------------------------------------


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _pushf(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    value: uint64_t = 0
    r: cython.int
    if svm_wants(s, SVM_PUSHF):
        return svm_exit(s, SVM_PUSHF, 0, 0, i.length)
    r = events.pushf(s, i.operand_size, cython.address(value))
    if r:
        return r
    return _push(s, value, i.operand_size)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _popf(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    value: uint64_t = 0
    r: cython.int
    if svm_wants(s, SVM_POPF):
        return svm_exit(s, SVM_POPF, 0, 0, i.length)
    r = _top(s, i.operand_size, cython.address(value))
    if r:
        return r
    r = events.popf(s, value, i.operand_size)
    if r == 0 or r == LEAVE_NEXT:
        _move_rsp(s, i.operand_size)
    return r


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _enter(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    """ENTER. SDM, "ENTER - Make Stack Frame for Procedure Parameters"."""
    size: cython.int = i.operand_size
    bytes_: uint64_t = i.immediate & 0xFFFF
    level: cython.int = (i.immediate >> 16) & 31
    old: uint64_t = s.gpr[RSP]
    frame: uint64_t
    value: uint64_t = 0
    linear: uint64_t = 0
    k: cython.int
    r: cython.int = _push(s, s.gpr[RBP], size)
    if r:
        return r
    frame = s.gpr[RSP]
    for k in range(1, level):
        r = _stack_address(s, s.gpr[RBP] - k * size, size, 0, cython.address(linear))
        if not r:
            r = read_value(s, linear, size, ACCESS_READ, cython.address(value))
        if not r:
            r = _push(s, value, size)
        if r:
            s.gpr[RSP] = old
            return r
    if level:
        r = _push(s, frame, size)
    if not r:
        r = _stack_address(s, s.gpr[RSP] - bytes_, size, 1, cython.address(linear))
    if not r:
        r = probe_write(s, linear, size, ACCESS_WRITE)
    if r:
        s.gpr[RSP] = old
        return r
    put_register(s, RBP, frame, size)
    _move_rsp(s, 0 - bytes_)
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _push_segment(s: cython.pointer(CpuState), i: cython.pointer(Insn), index: cython.int) -> cython.int:
    return _push(s, s.segs[index].selector, i.operand_size)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _pop_segment(s: cython.pointer(CpuState), i: cython.pointer(Insn), index: cython.int) -> cython.int:
    value: uint64_t = 0
    mask: uint64_t = segments.stack_mask(s)  # of the stack that is popped from, also for POP SS
    r: cython.int = _top(s, i.operand_size, cython.address(value))
    if not r:
        r = segments.load_segment(s, index, cython.cast(uint32_t, value & 0xFFFF))
    if not r:
        s.gpr[RSP] = (s.gpr[RSP] & ~mask) | ((s.gpr[RSP] + i.operand_size) & mask)
        if index == SS:
            s.interruptibility |= SHADOW_MOV_SS
    return r


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _load_far(s: cython.pointer(CpuState), i: cython.pointer(Insn), offset: cython.pointer(uint64_t),
              selector: cython.pointer(uint64_t)) -> cython.int:  # fmt: skip
    """Read the m16:16, m16:32 or m16:64 operand."""
    linear: uint64_t = 0
    r: cython.int = operand_address(s, i, i.operand_size + 2, 0, cython.address(linear))
    if not r:
        r = read_value(s, linear, i.operand_size, ACCESS_READ, offset)
    if not r:
        r = read_value(s, linear + i.operand_size, 2, ACCESS_READ, selector)
    return r


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _load_pointer(s: cython.pointer(CpuState), i: cython.pointer(Insn), index: cython.int) -> cython.int:
    """LES, LDS, LSS, LFS, LGS."""
    offset: uint64_t = 0
    selector: uint64_t = 0
    r: cython.int = _load_far(s, i, cython.address(offset), cython.address(selector))
    if not r:
        r = segments.load_segment(s, index, cython.cast(uint32_t, selector))
    if not r:
        put_register(s, i.reg, offset, i.operand_size)
    return r


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _arpl(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    """ARPL. SDM, "ARPL—Adjust RPL Field of Segment Selector"."""
    selector: uint64_t = 0
    rpl: uint64_t = s.gpr[i.reg] & 3
    r: cython.int
    if s.mode < 2:  # real and virtual-8086 mode
        return raise_exception(s, 6)
    r = read_rm(s, i, 2, cython.address(selector))
    if not r and (selector & 3) < rpl:
        r = write_rm(s, i, 2, (selector & ~cython.cast(uint64_t, 3)) | rpl)
        if not r:
            s.rflags |= FLAG_ZF
    elif not r:
        s.rflags &= ~cython.cast(uint64_t, FLAG_ZF)
    return r


# ---- by opcode ------------------------------------------------------------------------------------------------


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _one_byte(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    op: cython.int = i.opcode
    size: cython.int = 1 if not op & 1 else (2 if i.operand_size == 2 else 4)
    value: uint64_t = 0
    selector: uint64_t = 0
    r: cython.int
    if op == 0x90:
        return information.pause(s, i.length)
    if op == 0xFB:
        return events.sti(s)
    if op == 0xFA:
        return events.cli(s)
    if op == 0xCF:
        return transfers.iret(s, i.operand_size, i.length)
    if op == 0xF4:
        return events.hlt(s, i.length)
    if op == 0xE4 or op == 0xE5:
        return ports.port_in(s, i.immediate & 0xFF, size, 1, i.length)
    if op == 0xE6 or op == 0xE7:
        return ports.port_out(s, i.immediate & 0xFF, size, 1, i.length)
    if op == 0xEC or op == 0xED:
        return ports.port_in(s, s.gpr[RDX] & 0xFFFF, size, 0, i.length)
    if op == 0xEE or op == 0xEF:
        return ports.port_out(s, s.gpr[RDX] & 0xFFFF, size, 0, i.length)
    if op == 0x6C or op == 0x6D:
        return ports.string_in(s, size, i.address_size, i.rep, i.length)
    if op == 0x6E or op == 0x6F:
        return ports.string_out(s, size, i.address_size, i.rep, i.segment if i.segment_override else DS, i.length)
    if op == 0x8E:
        r = read_rm(s, i, 2, cython.address(value))
        if r:
            return r
        if (i.modrm >> 3 & 7) == CS or (i.modrm >> 3 & 7) > GS:
            return raise_exception(s, 6)
        r = segments.load_segment(s, i.modrm >> 3 & 7, cython.cast(uint32_t, value))
        if not r and (i.modrm >> 3 & 7) == SS:
            s.interruptibility |= SHADOW_MOV_SS
        return r
    if op == 0x8C:
        if (i.modrm >> 3 & 7) > GS:
            return raise_exception(s, 6)
        return write_rm(s, i, 2 if i.has_memory else i.operand_size, s.segs[i.modrm >> 3 & 7].selector)
    if op == 0xCC:
        return events.software_interrupt(s, 3, EVENT_SOFT_EXCEPTION, i.length)
    if op == 0xCD:
        return events.software_interrupt(s, i.immediate & 0xFF, EVENT_SOFT_INTERRUPT, i.length)
    if op == 0xCE:
        return events.software_interrupt(s, 4, EVENT_SOFT_EXCEPTION, i.length) if s.rflags & FLAG_OF else 0
    if op == 0xF1:
        return events.software_interrupt(s, 1, EVENT_PRIVILEGED, i.length)
    if op == 0xCA or op == 0xCB:
        return transfers.far_return(s, i.operand_size, i.immediate & 0xFFFF)
    if op == 0x9A or op == 0xEA:
        value = i.immediate & (0xFFFF if i.operand_size == 2 else cython.cast(uint64_t, 0xFFFFFFFF))
        selector = (i.immediate >> (8 * i.operand_size)) & 0xFFFF
        if op == 0x9A:
            return transfers.far_call(s, cython.cast(uint32_t, selector), value, i.operand_size, i.length)
        return transfers.far_jump(s, cython.cast(uint32_t, selector), value, i.operand_size, i.length)
    if op == 0xFF:
        r = _load_far(s, i, cython.address(value), cython.address(selector))
        if r:
            return r
        if (i.modrm >> 3 & 7) == 3:
            return transfers.far_call(s, cython.cast(uint32_t, selector), value, i.operand_size, i.length)
        return transfers.far_jump(s, cython.cast(uint32_t, selector), value, i.operand_size, i.length)
    if op == 0xC8:
        return _enter(s, i)
    if op == 0x63:
        return _arpl(s, i)
    if op == 0x90:
        return information.pause(s, i.length)
    if op == 0xC4:
        return _load_pointer(s, i, ES)
    if op == 0xC5:
        return _load_pointer(s, i, DS)
    if op < 0x20 and (op & 7) == 6:
        return _push_segment(s, i, op >> 3)
    if op < 0x20 and (op & 7) == 7:
        return _pop_segment(s, i, op >> 3)
    return legacy_instruction(s, i)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _group_6(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    reg: cython.int = i.modrm >> 3 & 7
    value: uint64_t = 0
    r: cython.int
    if s.mode < 2:  # real and virtual-8086 mode
        return raise_exception(s, 6)
    if reg < 2:
        r = segments.store_selector(s, reg, cython.address(value), i.length, instruction_info(i), displacement(i))
        if r:
            return r
        return write_rm(s, i, 2 if i.has_memory else i.operand_size, value)
    if reg < 4 and s.cpl:
        return raise_error(s, 13, 0)
    r = read_rm(s, i, 2, cython.address(value))
    if r:
        return r
    if reg == 2:
        return segments.lldt(s, cython.cast(uint32_t, value), i.length, instruction_info(i), displacement(i))
    if reg == 3:
        return segments.ltr(s, cython.cast(uint32_t, value), i.length, instruction_info(i), displacement(i))
    return segments.verify(s, cython.cast(uint32_t, value), reg == 5)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _group_7_register(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    byte: cython.int = i.modrm
    value: uint64_t = 0
    r: cython.int
    if byte == 0xF8:
        return syscalls.swapgs(s)
    if byte == 0xF9:
        return information.rdtscp(s, i.length)
    if byte == 0xCA or byte == 0xCB:
        if s.cpl:  # CR4.SMAP does not matter. SDM, "STAC—Set AC Flag in EFLAGS Register"
            return raise_exception(s, 6)
        if byte == 0xCB:
            s.rflags |= FLAG_AC
        else:
            s.rflags &= ~cython.cast(uint64_t, FLAG_AC)
        mode_changed(s)
        return 0
    if byte == 0xD0:
        return control.xgetbv(s)
    if byte == 0xD1:
        return control.xsetbv(s, i.length)
    if byte == 0xC8:
        value = get_register(s, RAX, i.address_size)
        r = linear_address(s, i.segment if i.segment_override else DS, value, 1, 0, cython.address(value))
        if r:
            return r
        return information.monitor(s, value, i.length)
    if byte == 0xC9:
        return information.mwait(s, i.length)
    if byte >= 0xC1 and byte <= 0xC4:
        return vmx_register(s, i)
    if byte >= 0xD8 and byte <= 0xDF:
        return svm_instruction(s, i)
    if (byte & 0x38) == 0x20:
        r = control.smsw(s, i.length, cython.address(value))
        if r:
            return r
        return write_rm(s, i, i.operand_size, value)
    if (byte & 0x38) == 0x30:
        return control.lmsw(s, cython.cast(uint32_t, get_register(s, i.rm, 2)), 0, 0, i.length)
    return raise_exception(s, 6)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _group_7(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    reg: cython.int = i.modrm >> 3 & 7
    size: cython.int = 8 if s.mode == MODE_LONG64 else i.operand_size
    linear: uint64_t = 0
    value: uint64_t = 0
    r: cython.int
    if not i.has_memory:
        return _group_7_register(s, i)
    if reg == 7:
        if s.mode == MODE_LONG64 and i.segment < FS:
            return control.invlpg(s, effective_address(s, i), i.length)
        return control.invlpg(s, effective_address(s, i) + s.segs[i.segment].base, i.length)
    if (reg == 2 or reg == 3 or reg == 6) and s.cpl:
        return raise_error(s, 13, 0)
    r = operand_address(s, i, 2 if reg >= 4 else (10 if size == 8 else 6), reg < 2 or reg == 4, cython.address(linear))
    if r:
        return r
    if reg < 2:
        return segments.store_table(s, reg, linear, i.length, instruction_info(i), displacement(i))
    if reg < 4:
        return segments.load_table(s, reg == 3, linear, size, i.length, instruction_info(i), displacement(i))
    if reg == 4:
        r = control.smsw(s, i.length, cython.address(value))
        if r:
            return r
        return write_value(s, linear, 2, ACCESS_WRITE, value)
    r = read_value(s, linear, 2, ACCESS_READ, cython.address(value))
    if r:
        return r
    return control.lmsw(s, cython.cast(uint32_t, value), 1, linear, i.length)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _fs_gs_base(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    """RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE."""
    reg: cython.int = i.modrm >> 3 & 7
    k: cython.int = FS + (reg & 1)
    value: uint64_t
    if not s.cr4 >> 16 & 1:
        return raise_exception(s, 6)
    if reg < 2:
        put_register(s, i.rm, s.segs[k].base, 8 if i.w else 4)
        return 0
    value = get_register(s, i.rm, 8 if i.w else 4)
    if not is_register_canonical(s, value):
        return raise_error(s, 13, 0)
    s.segs[k].base = value
    return 0


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _limit_or_rights(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    """LAR and LSL."""
    selector: uint64_t = 0
    value: uint64_t = 0
    r: cython.int
    if s.mode < 2:
        return raise_exception(s, 6)
    r = read_rm(s, i, 2, cython.address(selector))
    if r:
        return r
    if i.opcode == 2:
        r = segments.lar(s, cython.cast(uint32_t, selector), cython.address(value))
    else:
        r = segments.lsl(s, cython.cast(uint32_t, selector), cython.address(value))
    if not r and s.rflags & FLAG_ZF:
        put_register(s, i.reg, value, i.operand_size)
    return r


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _invpcid(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    linear: uint64_t = 0
    r: cython.int = operand_address(s, i, 16, 0, cython.address(linear))
    if r:
        return r
    return control.invpcid(
        s,
        get_register(s, i.reg, 8 if s.mode == MODE_LONG64 else 4),
        linear,
        i.length,
        instruction_info(i),
        displacement(i),
    )


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _two_byte(s: cython.pointer(CpuState), i: cython.pointer(Insn)) -> cython.int:
    op: cython.int = i.opcode
    if op == 0x05:
        return syscalls.syscall(s, i.length)
    if op == 0x07:
        return syscalls.sysret(s, i.operand_size)
    if op == 0x31:
        return information.rdtsc(s, i.length)
    if op == 0x01:
        return _group_7(s, i)
    if op == 0x32:
        return information.rdmsr(s, i.length)
    if op == 0x30:
        return information.wrmsr(s, i.length)
    if op == 0xA2:
        return information.cpuid(s, i.length)
    if op == 0x20:
        return control.mov_from_cr(s, i.reg, i.rm, i.length)
    if op == 0x21:
        return control.mov_from_dr(s, i.reg, i.rm, i.length)
    if op == 0x22:
        return control.mov_to_cr(s, i.reg, i.rm, i.length)
    if op == 0x23:
        return control.mov_to_dr(s, i.reg, i.rm, i.length)
    if op == 0xAE:
        return _fs_gs_base(s, i)
    if op == 0x00:
        return _group_6(s, i)
    if op == 0x02 or op == 0x03:
        return _limit_or_rights(s, i)
    if op == 0x06:
        return control.clts(s, i.length)
    if op == 0x08:
        return control.invd(s, i.length)
    if op == 0x09:
        return control.wbinvd(s, i.length)
    if op == 0x33:
        return information.rdpmc(s, i.length)
    if op == 0x34:
        return syscalls.sysenter(s)
    if op == 0x35:
        return syscalls.sysexit(s, i.operand_size)
    if op == 0xA0 or op == 0xA8:
        return _push_segment(s, i, FS + (op >> 3 & 1))
    if op == 0xA1 or op == 0xA9:
        return _pop_segment(s, i, FS + (op >> 3 & 1))
    if op == 0xB2:
        return _load_pointer(s, i, SS)
    if op == 0xB4 or op == 0xB5:
        return _load_pointer(s, i, (op & 1 and GS) or FS)
    if op == 0x78 or op == 0x79:
        return vmx_field(s, i)
    if op == 0xC7 and i.has_memory and (i.modrm >> 3 & 7) >= 6:
        return vmx_pointer(s, i)
    if op == 0xC7 and i.rep == 0xF3 and not i.has_memory:
        return information.rdpid(s, i.rm)
    if op == 0xC7 and not i.has_memory:
        return information.random(s, (i.modrm >> 3 & 7) == 7, i.rm, i.operand_size, i.length)
    return raise_exception(s, 6)


def execute(s, i):
    """Execute one instruction; gives GO_ON or LEAVE_*."""
    cls: cython.int = ROW[i.row].cls
    if cls == C_STRING:
        return string_instruction(s, i)
    if cls == C_PUSHF:
        return _pushf(s, i)
    if cls == C_POPF:
        return _popf(s, i)
    if cls == C_CLI:
        return events.cli(s)
    if cls == C_DF:
        s.rflags = (s.rflags & ~cython.cast(uint64_t, FLAG_DF)) | (FLAG_DF if i.opcode & 1 else 0)
        return 0
    if cls == C_MASKED:
        return masked_instruction(s, i)
    if cls == C_MASKMOV:
        return masked_bytes(s, i)
    if cls == C_GATHER:
        return gather_instruction(s, i)
    if cls == C_FPU:
        return fpu_instruction(s, i)
    if i.map == 0:
        return _one_byte(s, i)
    if i.map == 1:
        return _two_byte(s, i)
    if i.map == 2 and (i.opcode == 0x80 or i.opcode == 0x81):
        return vmx_invalidate(s, i)
    if i.map == 2 and i.opcode == 0x82:
        return _invpcid(s, i)
    return raise_exception(s, 6)
