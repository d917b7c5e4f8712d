"""A KVM whose guests are Python: it answers ioctls, and plays the steps of a generator for each vCPU."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vmonty.kvm.uapi import Cap, Exit, irq, vcpu
from vmonty.kvm.uapi.ioctls import name_of
from vmonty.kvm.uapi.run import kvm_run

from .steps import Guest, In, Leave, Load, Out, Refuse, Spin, Step, Store, Wait, idle

# No wait lasts longer; then the test fails.
LIMIT_S = 30.0
MMAP_SIZE = 3 * mmap.PAGESIZE
IO_DATA = mmap.PAGESIZE


@dataclass
class _Cpu:
    guest: Guest
    page: memoryview
    step: Step | None = None
    answer: Any = None
    thread: int = 0
    kicked: bool = False
    state: dict[str, bytes] = field(default_factory=dict)


class FakeKvm:
    """The provider. *guest* makes vCPU n's generator; *refuses* maps ioctl names to errnos.

    ``lines`` records every KVM_IRQ_LINE, ``calls`` the names of all ioctls, ``files`` the fds that are open.
    """

    name = "fake"

    def __init__(
        self, guest: Callable[[int], Guest] = idle, refuses: dict[str, int] | None = None, max_vcpus: int = 1024
    ) -> None:
        self.guest = guest
        self.refuses = refuses or {}
        self.extensions = {Cap.MAX_VCPUS: max_vcpus}
        self.lines: list[tuple[int, int]] = []
        self.calls: list[str] = []
        self.files: set[int] = set()
        self.cpus: dict[int, _Cpu] = {}
        self._raised: list[int] = []
        self._changed = threading.Condition()

    # ---- the protocol of a provider --------------------------------------------------------------------

    def open(self) -> int:
        return self._file()

    def ioctl(self, fd: int, request: int, argument: Any) -> int:
        name = name_of(request)
        self.calls.append(name)
        if name in self.refuses:
            return -self.refuses[name]
        method = getattr(self, "_" + name.lower(), None)
        if method is not None:
            result: int = method(fd, argument)
            return result
        if argument is not None and not isinstance(argument, int):
            self._keep(fd, name.removeprefix("KVM_"), memoryview(argument).cast("B"))
        return 0

    def mmap(self, fd: int, size: int, offset: int = 0) -> memoryview:
        return self.cpus[fd].page

    def close(self, fd: int) -> None:
        self.files.remove(fd)
        os.close(fd)

    def kick(self, thread: int) -> None:
        with self._changed:
            for cpu in self.cpus.values():
                if cpu.thread == thread:
                    cpu.kicked = True
            self._changed.notify_all()

    def memory_written(self, address: int, size: int) -> None:
        pass

    def remedy(self, error: int, call: str) -> str:
        return "a remedy"

    # ---- ioctls ----------------------------------------------------------------------------------------

    def _kvm_get_api_version(self, fd: int, argument: Any) -> int:
        return 12

    def _kvm_get_vcpu_mmap_size(self, fd: int, argument: Any) -> int:
        return MMAP_SIZE

    def _kvm_check_extension(self, fd: int, argument: Any) -> int:
        return self.extensions.get(Cap(argument), int(Cap(argument) is not Cap.BINARY_STATS_FD))

    def _kvm_create_vm(self, fd: int, argument: Any) -> int:
        return self._file()

    def _kvm_create_vcpu(self, fd: int, argument: Any) -> int:
        made = self._file()
        self.cpus[made] = _Cpu(self.guest(argument), memoryview(mmap.mmap(-1, MMAP_SIZE)))
        return made

    def _kvm_get_supported_cpuid(self, fd: int, argument: Any) -> int:
        argument.nent = 4
        for slot, leaf in zip(argument.entries, (0, 1, 0xB, 0x1F), strict=False):
            slot.function, slot.eax, slot.ebx, slot.ecx, slot.edx = leaf, 0x1F, 0xAA00_0000, 0, 0x77
        return 0

    def _kvm_set_msrs(self, fd: int, argument: Any) -> int:
        return int(argument.nmsrs)

    def _kvm_irq_line(self, fd: int, argument: irq.kvm_irq_level) -> int:
        with self._changed:
            self.lines.append((argument.u.irq, argument.level))
            if argument.level:
                self._raised.append(argument.u.irq)
            self._changed.notify_all()
        return 0

    def _kvm_run(self, fd: int, argument: Any) -> int:
        cpu = self.cpus[fd]
        run = kvm_run.from_buffer(cpu.page)
        self._complete(cpu, run)
        with self._changed:
            cpu.thread, cpu.kicked = threading.get_ident(), False
        try:
            # Only now: a kick from here on finds the thread, an earlier one has left its mark.
            return -errno.EINTR if run.immediate_exit else self._play(cpu, run)
        finally:
            with self._changed:
                cpu.thread = 0

    # ---- a vCPU ----------------------------------------------------------------------------------------

    def _complete(self, cpu: _Cpu, run: Any) -> None:
        """Take what user space left for the step that led to the last exit."""
        match cpu.step:
            case In(_, size):
                cpu.answer = int.from_bytes(cpu.page[IO_DATA : IO_DATA + size], "little")
            case Load(_, size):
                cpu.answer = int.from_bytes(bytes(run.u.mmio.data[:size]), "little")
            case Wait() | Spin():
                return  # not over yet
        cpu.step = None

    def _play(self, cpu: _Cpu, run: Any) -> int:
        while True:
            if cpu.step is None:
                answer, cpu.answer = cpu.answer, None
                try:
                    cpu.step = cpu.guest.send(answer)
                except StopIteration:
                    cpu.step = Spin(0)
            match cpu.step:
                case Out(port, value, size):
                    self._exit_io(cpu, run, port, size, 1)
                    cpu.page[IO_DATA : IO_DATA + size] = value.to_bytes(size, "little")
                    return 0
                case In(port, size):
                    self._exit_io(cpu, run, port, size, 0)
                    return 0
                case Store(address, value, size):
                    self._exit_mmio(run, address, size, 1)
                    run.u.mmio.data[:size] = list(value.to_bytes(size, "little"))
                    return 0
                case Load(address, size):
                    self._exit_mmio(run, address, size, 0)
                    return 0
                case Leave(reason, fill):
                    run.exit_reason = reason
                    fill(run)
                    return 0
                case Refuse(code):
                    cpu.step = None
                    return -code
                case Wait():
                    with self._changed:
                        if not self._until(lambda: cpu.kicked or bool(self._raised)) or not self._raised:
                            return -errno.EINTR
                        cpu.answer, cpu.step = self._raised.pop(0), None
                case Spin(mips):
                    begin = time.perf_counter()
                    with self._changed:
                        self._until(lambda: cpu.kicked)
                    self._count(cpu, mips * 1e6 * (time.perf_counter() - begin) / 2)
                    return -errno.EINTR

    def _until(self, condition: Callable[[], bool]) -> bool:
        if not self._changed.wait_for(condition, LIMIT_S):
            raise AssertionError(f"nobody woke this vCPU for {LIMIT_S:g} s")
        return True

    @staticmethod
    def _exit_io(cpu: _Cpu, run: Any, port: int, size: int, direction: int) -> None:
        run.exit_reason = Exit.IO
        io = run.u.io
        io.port, io.size, io.count, io.direction, io.data_offset = port, size, 1, direction, IO_DATA

    @staticmethod
    def _exit_mmio(run: Any, address: int, size: int, is_write: int) -> None:
        run.exit_reason = Exit.MMIO
        run.u.mmio.phys_addr, run.u.mmio.len, run.u.mmio.is_write = address, size, is_write

    @staticmethod
    def _count(cpu: _Cpu, loops: float) -> None:
        regs = vcpu.kvm_regs.from_buffer_copy(cpu.state.get("REGS", bytes(ctypes.sizeof(vcpu.kvm_regs))))
        regs.rcx += int(loops)
        cpu.state["REGS"] = bytes(regs)

    def _keep(self, fd: int, name: str, data: memoryview) -> None:
        """What a SET stores, the GET of the same name gives back."""
        if (cpu := self.cpus.get(fd)) is None:
            return
        if name.startswith("SET_"):
            cpu.state[name.removeprefix("SET_")] = bytes(data)
        elif name.startswith("GET_") and (kept := cpu.state.get(name.removeprefix("GET_"))):
            data[:] = kept

    def _file(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.files.add(fd)
        return fd
