"""vmonty's processor: bare, for payloads that need no operating system, or as a VM of the software KVM."""

from __future__ import annotations

import mmap
import struct
import time

from vmonty.base.ram import Ram
from vmonty.bench.compiler import PayloadError
from vmonty.bench.payload import IMAGE_BASE, NAMES, Image
from vmonty.cpu.core import Cpu
from vmonty.kvm.api import System
from vmonty.kvm.uapi import Exit

MEMORY = 64 << 20
TABLES, STACK, DOOR = 0x80_0000, 0x90_0000, 0x90_0000
MULTIBOOT_INFO, COMMAND_LINE = 0x7000, 0x7100
MULTIBOOT_MAGIC = 0x2BAD_B002


class BareCpu:
    """A processor in 64-bit mode at CPL 0 with the first GiB mapped one to one."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._memory = mmap.mmap(-1, MEMORY)
        self._memory[IMAGE_BASE : IMAGE_BASE + len(image.data)] = image.data
        self._memory[TABLES : TABLES + 8] = struct.pack("<Q", TABLES + 0x1003)
        self._memory[TABLES + 0x1000 : TABLES + 0x1008] = struct.pack("<Q", TABLES + 0x2003)
        pages = struct.pack("<512Q", *(0x83 | number << 21 for number in range(512)))
        self._memory[TABLES + 0x2000 : TABLES + 0x3000] = pages
        self._memory[DOOR : DOOR + 1] = b"\xf4"
        self._memory[STACK - 8 : STACK] = struct.pack("<Q", DOOR)
        self.cpu = Cpu()
        self.cpu.add_region(0, self._memory)
        self.cpu.set_long_mode(TABLES)

    def run(self, name: str, repeats: int) -> tuple[float, int]:
        """CPU seconds and checksum. Raises PayloadError when the payload did not end as it should."""
        cpu = self.cpu
        cpu["rsp"], cpu["rip"], cpu["rdi"] = STACK - 8, self._image.address(name), repeats
        begin = time.thread_time()
        reason = cpu.run()
        seconds = time.thread_time() - begin
        if reason != "halt":
            raise PayloadError(f"{name} ended with {reason} at {cpu['rip']:#x}, event {cpu.event}")
        return seconds, cpu["rax"]


def run_vm(system: System, image: Image, name: str, repeats: int) -> tuple[float, int]:
    """A payload in a VM, started as Multiboot 1 says. CPU seconds and checksum; raises PayloadError."""
    with system.create_vm() as vm:
        ram = Ram(MEMORY)
        ram.write(IMAGE_BASE, image.data)
        ram.write(MULTIBOOT_INFO, struct.pack("<5I", 4, 0, 0, 0, COMMAND_LINE))
        ram.write(COMMAND_LINE, f"payload {NAMES.index(name)} {repeats}\0".encode())
        vm.set_tss_addr(0xFFFB_D000)
        vm.set_user_memory_region(0, 0, ram)
        with vm.create_vcpu() as vcpu:
            vcpu.set_cpuid2(system.supported_cpuid())
            sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
            sregs.cr0 |= 1
            for segment, kind in ((sregs.cs, 11), (sregs.ds, 3), (sregs.es, 3), (sregs.ss, 3)):
                segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 8 if kind == 11 else 16
                segment.type, segment.s, segment.present, segment.db, segment.g = kind, 1, 1, 1, 1
            (regs.rip,) = struct.unpack_from("<I", image.data, 8 * len(NAMES) + 28)
            regs.rax, regs.rbx, regs.rflags = MULTIBOOT_MAGIC, MULTIBOOT_INFO, 2
            vcpu.set_sregs(sregs)
            vcpu.set_regs(regs)
            said, begin, seconds = b"", 0.0, 0.0
            while True:
                reason = vcpu.run()
                io = vcpu.kvm_run.u.io
                mark, checksum = said[:2], said[2:]
                if reason is Exit.HLT and mark == b"SE" and len(checksum) == 16:
                    return seconds, int(checksum, 16)
                if reason is not Exit.IO or not io.direction:
                    raise PayloadError(f"{name} ended in the VM with {reason!r} at {vcpu.get_regs().rip:#x}")
                said += bytes(vcpu.io_data())
                if said == b"S":
                    begin = time.thread_time()
                elif said == b"SE":
                    seconds = time.thread_time() - begin
