"""A bare processor in 64-bit mode with identity-mapped memory, for the translator's tests."""

from __future__ import annotations

import mmap
import struct
import threading

from vmonty.cpu import core

CODE = 0x100000
STACK = 0x80000
SIZE = 16 << 20


class Machine:
    """16 MB of RAM at 0, page tables at 0x1000 that map it one to one with 2 MB pages."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self.memory = memory or mmap.mmap(-1, SIZE)
        self.cpu = core.Cpu()
        self.cpu.add_region(0, self.memory)
        self.put64(0x1000, 0x2007)
        self.put64(0x2000, 0x3007)
        for n in range(512):
            self.put64(0x3000 + 8 * n, n << 21 | 0x87)
        self.cpu.set_long_mode(0x1000)
        self.cpu["rsp"] = STACK
        self.cpu["rip"] = CODE

    def put64(self, at: int, value: int) -> None:
        """Write eight bytes of guest memory."""
        struct.pack_into("<Q", self.memory, at, value)

    def get64(self, at: int) -> int:
        """Read eight bytes of guest memory."""
        return int(struct.unpack_from("<Q", self.memory, at)[0])

    def load(self, code: str | bytes, at: int = CODE) -> None:
        """Put machine code (hex or bytes) into memory."""
        data = bytes.fromhex(code) if isinstance(code, str) else code
        self.memory[at : at + len(data)] = data

    def run(self, code: str | bytes) -> str:
        """Load and run until the processor reports something."""
        self.load(code)
        return self.cpu.run()


def run_together(*machines: Machine) -> None:
    """Each on a thread of its own, to its end."""
    threads = [threading.Thread(target=machine.cpu.run) for machine in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stuck = any(thread.is_alive() for thread in threads)
    for machine in machines:
        machine.cpu.kick()
    for thread in threads:
        thread.join(5)
    assert not stuck
