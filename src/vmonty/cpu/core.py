"""One logical processor as Python sees it."""

from __future__ import annotations

import cython
from cython.cimports.vmonty.cpu.codecache import CODE_COUNTERS, CodeCache, announce_write, cache_flush, code_counters
from cython.cimports.vmonty.cpu.dispatch import cpu_free, cpu_new, run_cpu
from cython.cimports.vmonty.cpu.state import CS
from cython.cimports.vmonty.cpu.tlb import flush_all, mode_changed

from vmonty.cpu import hostcpu

EXIT_REASONS = (
    "none",
    "halt",
    "shutdown",
    "mmio",
    "pio",
    "vm",
    "run_flag",
    "budget",
    "debug",
    "internal",
    "host_fault",
)

REGISTERS = (
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
)


@cython.cclass
class Cpu:
    """A processor with a physical map of its own: for tests, tools and bare machines.

    Raises HostCpuError when the host's processor cannot run translated code.
    """

    def __cinit__(self, cache_size: cython.ulonglong = 32 << 20):
        hostcpu.require()
        self.s = cpu_new(cache_size)
        if self.s == cython.NULL:
            raise MemoryError("no memory for a processor and its code cache")
        self._regions = []

    def __dealloc__(self):
        if self.s != cython.NULL:
            cpu_free(self.s)

    def add_region(self, base: cython.ulonglong, memory: object, readonly: bool = False) -> None:
        """Map a writable, page-aligned buffer (an mmap) at a guest-physical address."""
        view: cython.uchar[::1] = memory
        n: cython.uint = self.s.region_count
        if n >= 64:
            raise ValueError("a bare processor has room for 64 regions")
        self.s.regions[n].base = base
        self.s.regions[n].size = view.shape[0]
        self.s.regions[n].host = cython.cast(uint64_t, cython.address(view[0]))
        self.s.regions[n].readonly = readonly
        self.s.region_count = n + 1
        self._regions.append(view)

    def set_long_mode(self, cr3: cython.ulonglong, user: bool = False) -> None:
        """Enter 64-bit mode at CPL 0 or 3 with flat segments, paging on, SSE and AVX enabled."""
        s: cython.pointer(CpuState) = self.s
        k: cython.int
        s.cr0 = 0x80050033
        s.cr4 = 0x406A0
        s.efer = 0xD01
        s.xcr0 = 7
        s.cr3 = cr3
        s.cpl = 3 if user else 0
        for k in range(6):
            s.segs[k].base = 0
            s.segs[k].limit = 0xFFFFFFFF
            s.segs[k].access_rights = 0xC0F3 if user else 0xC093
            s.segs[k].selector = 0x2B if user else 0x10
        s.segs[CS].access_rights = 0xA0FB if user else 0xA09B
        s.segs[CS].selector = 0x33 if user else 8
        mode_changed(s)
        flush_all(s)

    def run(self) -> str:
        """Run without the GIL until there is something to report; gives its name."""
        reason: cython.int
        with cython.nogil:
            reason = run_cpu(self.s)
        if self.observer is not None:
            self.observer.check()
        return EXIT_REASONS[reason]

    @property
    def state_address(self) -> int:
        """Where the CpuState lies, for compiled modules that are called from Python."""
        return cython.cast(uint64_t, self.s)

    def interrupt(self, vector: int) -> None:
        """Assert INTR with a vector, from any thread: taken when the guest allows it."""
        self.s.interrupt_vector = vector
        self.s.interrupt_line = 1
        self.s.run = 0

    def nmi(self) -> None:
        """Request an NMI, from any thread."""
        self.s.nmi_line = 1
        self.s.run = 0

    def init(self) -> None:
        """Assert INIT, from any thread. Without IA32_APIC_BASE.BSP it then waits for ``startup``: "halt"."""
        self.s.init_line = 1
        self.s.run = 0

    def startup(self, vector: int) -> None:
        """Send a start-up IPI, from any thread: one that waits for it begins at *vector* × 4096. SDM, "SIPI"."""
        self.s.startup_vector = vector
        self.s.startup_line = 1
        self.s.run = 0

    def kick(self) -> None:
        """Make run() return soon with "run_flag"; any thread may call it."""
        self.s.kick = 1
        self.s.run = 0

    def step(self, instructions: cython.ulonglong = 1) -> str:
        """Execute that many instructions one by one."""
        self.s.budget = instructions
        reason = self.run()
        self.s.budget = 0
        return reason

    def __getitem__(self, name: str) -> int:
        if name in REGISTERS:
            return self.s.gpr[REGISTERS.index(name)]
        if name == "rip":
            return self.s.rip
        if name == "rflags":
            return self.s.rflags
        if name == "cr2":
            return self.s.cr2
        if name == "cr3":
            return self.s.cr3
        raise KeyError(name)

    def __setitem__(self, name: str, value: cython.ulonglong) -> None:
        if name in REGISTERS:
            self.s.gpr[REGISTERS.index(name)] = value
        elif name == "rip":
            self.s.rip = value
            self.s.activity = 0
        elif name == "rflags":
            self.s.rflags = value | 2
        elif name == "fs_base":
            self.s.segs[4].base = value
        elif name == "gs_base":
            self.s.segs[5].base = value
        else:
            raise KeyError(name)

    @property
    def exit(self) -> dict:
        """What the last run() reported."""
        e = self.s.exit
        return {
            "reason": EXIT_REASONS[e.reason], "address": e.address, "size": e.size, "write": e.write, "data": e.data,
        }  # fmt: skip

    @property
    def event(self) -> dict:
        """The event that waits or was delivered last."""
        e = self.s.event
        return {
            "pending": e.pending, "vector": e.vector, "has_error": e.has_error, "error_code": e.error_code,
            "payload": e.payload,
        }  # fmt: skip

    def stop_at_events(self, stop: bool = True) -> None:
        """Have run() report "debug" with the event pending instead of delivering it (tests)."""
        self.s.stop_events = stop

    def keep_flags(self, keep: bool = True) -> None:
        """Translate so that faults push exact arithmetic flags, also those that the instruction overwrites (tests)."""
        self.s.exact_flags = keep
        cache_flush(self.s)

    def predict_returns(self, count: cython.ulonglong) -> None:
        """Have room for so many return predictions only, from 8 to 7680 (tests); more push out all but the newest."""
        if not 8 <= count <= 7680:
            raise ValueError("from 8 to 7680 return predictions")
        self.s.shadow_size = 4096 + 8 * count
        cache_flush(self.s)

    def clear_event(self) -> None:
        """Drop the pending event (tests)."""
        self.s.event.pending = 0

    def answer(self, data: cython.ulonglong) -> None:
        """Give the data of the read that run() reported."""
        self.s.exit.data = data

    @property
    def xsave(self) -> bytes:
        """The x87, SSE and AVX state in the standard XSAVE format (832 bytes).

        The x87 instruction and operand pointers, which would be addresses of translated code, read as zero.
        """
        area: bytes = cython.cast(cython.p_char, self.s.xsave)[:832]
        return area[:6] + bytes(18) + area[24:]

    @xsave.setter
    def xsave(self, data: bytes) -> None:
        k: cython.int
        for k in range(len(data)):
            self.s.xsave[k] = data[k]

    @property
    def registers(self) -> bytes:
        """The sixteen general registers, little-endian, rax rcx rdx rbx rsp rbp rsi rdi r8 ... r15."""
        return cython.cast(cython.p_char, self.s.gpr)[:128]

    @registers.setter
    def registers(self, data: bytes) -> None:
        k: cython.int
        to: cython.p_uchar = cython.cast(cython.p_uchar, self.s.gpr)
        if len(data) != 128:
            raise ValueError("sixteen registers take 128 bytes")
        for k in range(128):
            to[k] = data[k]

    def flush_tlb(self) -> None:
        """Forget all translations of linear addresses."""
        flush_all(self.s)

    def host_had_control(self, wrote: bool = False) -> None:
        """Host software ran: it may have written code that the guest has run before.

        Each page is compared when the guest next comes to it by a new translation of its address; with *wrote* that is
        the next time it comes to it at all.
        """
        self.s.host_generation += 1
        if wrote:
            flush_all(self.s)

    def flush_code(self) -> None:
        """Drop all translations."""
        cache_flush(self.s)

    @property
    def statistics(self) -> dict:
        """Translator counters."""
        c: cython.pointer(CodeCache) = cython.cast(cython.pointer(CodeCache), self.s.translator)
        return {"blocks": c.blocks_used, "bytes": c.a.at - c.writable, "flushes": c.flushes, "links": c.links_used}


def memory_written(address: cython.ulonglong, size: cython.ulonglong) -> None:
    """Tell all processors that host memory was written other than by them (a device, a loader, a debugger).

    Cheap when no code lies there. Must be called after the write and before the guest is told of it.
    """
    page: uint64_t = address & ~cython.cast(uint64_t, 0xFFF)
    if code_counters == cython.NULL:
        return
    while page < address + size:
        if code_counters[(page >> 12) & (CODE_COUNTERS - 1)]:
            announce_write(cython.NULL, page)
        page += 4096
