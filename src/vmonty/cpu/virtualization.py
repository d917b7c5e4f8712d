"""The instructions of VMX and SVM: where their operands come from and go to. What they mean is in ``vmx_code`` and
``svm_code``.
"""

import cython
from cython.cimports.vmonty.cpu import (
    information,
    svm_code,
    vmx_code,
)
from cython.cimports.vmonty.cpu.modrm import (
    displacement,
    get_register,
    instruction_info,
    read_rm,
    write_rm,
)
from cython.cimports.vmonty.cpu.segmentation import operand_address
from cython.cimports.vmonty.cpu.state import (
    ACCESS_READ,
    ACCESS_WRITE,
    LEAVE_NEXT,
    MODE_LONG64,
    RAX,
    raise_exception,
)
from cython.cimports.vmonty.cpu.tlb import read_value, write_value
from cython.cimports.vmonty.cpu.vmx_exit import (
    REASON_INVEPT,
    REASON_INVVPID,
    REASON_VMCALL,
    REASON_VMCLEAR,
    REASON_VMLAUNCH,
    REASON_VMPTRLD,
    REASON_VMPTRST,
    REASON_VMREAD,
    REASON_VMRESUME,
    REASON_VMWRITE,
    REASON_VMXOFF,
    REASON_VMXON,
)


def vmx_register(s, i):
    """VMCALL, VMLAUNCH, VMRESUME, VMXOFF."""
    reason: uint32_t = REASON_VMXOFF
    r: cython.int
    if i.modrm == 0xC1:
        if s.guest_mode != 0 or s.vmx == cython.NULL:
            return information.vmcall(s, i.length)
        reason = REASON_VMCALL
    elif i.modrm == 0xC2:
        reason = REASON_VMLAUNCH
    elif i.modrm == 0xC3:
        reason = REASON_VMRESUME
    r = vmx_code.refused(s, reason, i.length, 0, 0)
    if r:
        return r
    if i.modrm == 0xC1:
        return vmx_code.vmcall_root(s)
    if i.modrm == 0xC4:
        return vmx_code.vmxoff(s)
    return vmx_code.vmenter(s, 1 if i.modrm == 0xC2 else 0, i.length)


def vmx_pointer(s, i):
    """VMPTRLD, VMCLEAR, VMXON, VMPTRST: 64 bits of memory."""
    reason: uint32_t = REASON_VMPTRLD
    store: cython.int = 1 if (i.modrm >> 3 & 7) == 7 else 0
    linear: uint64_t = 0
    region: uint64_t = 0
    r: cython.int
    if store:
        reason = REASON_VMPTRST
    elif i.pp == 1:
        reason = REASON_VMCLEAR
    elif i.pp == 2:
        reason = REASON_VMXON
    r = vmx_code.refused(s, reason, i.length, instruction_info(i), displacement(i))
    if not r:
        r = operand_address(s, i, 8, store, cython.address(linear))
    if r:
        return r
    if store:
        r = write_value(s, linear, 8, ACCESS_WRITE, vmx_code.vmptrst(s))
        if r:
            return r
        vmx_code.succeed(s)
        return LEAVE_NEXT
    r = read_value(s, linear, 8, ACCESS_READ, cython.address(region))
    if r:
        return r
    if i.pp == 1:
        return vmx_code.vmclear(s, region)
    if i.pp == 2:
        return vmx_code.vmxon(s, region)
    return vmx_code.vmptrld(s, region)


def vmx_field(s, i):
    """VMREAD and VMWRITE: always 64 bits in 64-bit mode, else 32."""
    size: cython.int = 8 if s.mode == MODE_LONG64 else 4
    value: uint64_t = 0
    info: uint32_t = (instruction_info(i) & 0x0FFFFFFF) | (cython.cast(uint32_t, i.reg) << 28)
    r: cython.int = vmx_code.refused(
        s, REASON_VMREAD if i.opcode == 0x78 else REASON_VMWRITE, i.length, info, displacement(i)
    )
    if r:
        return r
    if i.opcode == 0x79:
        r = read_rm(s, i, size, cython.address(value))
        if r:
            return r
        return vmx_code.vmwrite(s, get_register(s, i.reg, size), value)
    if not vmx_code.vmread(s, get_register(s, i.reg, size), cython.address(value)):
        return LEAVE_NEXT
    r = write_rm(s, i, size, value)
    if r:
        return r
    vmx_code.succeed(s)
    return LEAVE_NEXT


def vmx_invalidate(s, i):
    """INVEPT and INVVPID: a type in a register, a descriptor of 128 bits."""
    low: uint64_t = 0
    high: uint64_t = 0
    linear: uint64_t = 0
    r: cython.int = vmx_code.refused(
        s, REASON_INVEPT if i.opcode == 0x80 else REASON_INVVPID, i.length, instruction_info(i), displacement(i)
    )
    if not r:
        r = operand_address(s, i, 16, 0, cython.address(linear))
    if not r:
        r = read_value(s, linear, 8, ACCESS_READ, cython.address(low))
    if not r:
        r = read_value(s, linear + 8, 8, ACCESS_READ, cython.address(high))
    if r:
        return r
    return vmx_code.invalidate(
        s, get_register(s, i.reg, 8 if s.mode == MODE_LONG64 else 4), 2 if i.opcode == 0x80 else 3, low, high
    )


def svm_instruction(s, i):
    """0F 01 D8 to DF. Addresses come from rAX in the address size."""
    address: uint64_t = get_register(s, RAX, i.address_size)
    if i.modrm == 0xD8:
        return svm_code.vmrun(s, address, i.length)
    if i.modrm == 0xD9:
        return svm_code.vmmcall(s, i.length)
    if i.modrm == 0xDA:
        return svm_code.vmload(s, address, i.length)
    if i.modrm == 0xDB:
        return svm_code.vmsave(s, address, i.length)
    if i.modrm == 0xDC:
        return svm_code.stgi(s, i.length)
    if i.modrm == 0xDD:
        return svm_code.clgi(s, i.length)
    if i.modrm == 0xDF:
        return svm_code.invlpga(s, address, i.length)
    return raise_exception(s, 6)  # SKINIT isn't offered
