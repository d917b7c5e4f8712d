"""Random ioctls on the software KVM, for a child process: `python -m tests.kvm_soft.ioctl_fuzz SEED STEPS`.

Prints each step before it is done, so that a crash or a hang names its cause; ends with status 1 at the first errno
that api.rst does not list for the request and that is not among those which any ioctl may give.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import sys
import threading
from dataclasses import dataclass, field

from vmonty.base.ram import Ram
from vmonty.kvm.soft.kvm_main import Kvm, KvmDevice, KvmVcpuFile
from vmonty.kvm.soft.provider import SoftKvm
from vmonty.kvm.uapi import Requests
from vmonty.kvm.uapi.ioctls import NAMES

# What any ioctl may give: bad memory, bad arguments, no such request, no memory, no room, interrupted, no device.
ANY = {errno.EFAULT, errno.EINVAL, errno.ENOTTY, errno.ENOMEM, errno.E2BIG, errno.EINTR, errno.ENXIO, errno.EBUSY}
# What api.rst (or the code behind it) lists beyond: by request.
LISTED: dict[str, set[int]] = {
    "KVM_CREATE_VCPU": {errno.EEXIST},
    "KVM_CREATE_IRQCHIP": {errno.EEXIST},
    "KVM_CREATE_PIT2": {errno.EEXIST, errno.ENOENT},
    "KVM_CREATE_PIT": {errno.EEXIST, errno.ENOENT},
    "KVM_CREATE_DEVICE": {errno.ENODEV, errno.EEXIST, errno.EPERM},
    "KVM_SET_USER_MEMORY_REGION": {errno.EEXIST},
    "KVM_SET_USER_MEMORY_REGION2": {errno.EEXIST},
    "KVM_GET_DIRTY_LOG": {errno.ENOENT},
    "KVM_CLEAR_DIRTY_LOG": {errno.ENOENT},
    "KVM_PRE_FAULT_MEMORY": {errno.ENOENT, errno.EOPNOTSUPP},
    "KVM_IRQFD": {errno.EBADF, errno.ENOENT, errno.EAGAIN},
    "KVM_IOEVENTFD": {errno.EBADF, errno.ENOENT, errno.EEXIST, errno.ENOSPC},
    "KVM_REGISTER_COALESCED_MMIO": {errno.ENOSPC, errno.EEXIST},
    "KVM_RUN": {errno.EAGAIN, errno.EPERM, errno.ENOEXEC},
    # -1: no APIC has that destination.
    "KVM_SIGNAL_MSI": {errno.EPERM},
    "KVM_INTERRUPT": {errno.EEXIST},
    "KVM_ENABLE_CAP": {errno.EEXIST, errno.EPERM},
    "KVM_SET_GSI_ROUTING": {errno.ENOENT},
    "KVM_GET_STATS_FD": {errno.EMFILE},
    "KVM_CREATE_VM": {errno.EMFILE},
}
INTERESTING = (
    0, 1, 2, 3, 63, 64, 255, 4095, 4096, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 47, (1 << 63) - 1, (1 << 64) - 1,
)  # fmt: skip
MOST_FILES = 24
# Pointers lead into the first part of memory that ends far behind: a KVM writes where it is told to.
POINTED, MEMORY = 1 << 20, 64 << 20
REGIONS = {"KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2"}
RUN_S = 0.02
RUN = int(Requests.KVM_RUN)


@dataclass
class Fuzz:
    """One run: the files that are open, and the memory that arguments point at."""

    random: random.Random
    provider: SoftKvm = field(default_factory=SoftKvm)
    files: list[int] = field(default_factory=list)
    ram: Ram = field(default_factory=lambda: Ram(MEMORY))

    def number(self) -> int:
        kinds = self.random.choice(INTERESTING), self.random.getrandbits(self.random.randrange(1, 65))
        return self.random.choice((*kinds, self.random.randrange(9)))

    def fill(self, size: int) -> bytearray:
        """An argument of *size* bytes: words that mean something, pointers into the RAM, noise, or nothing."""
        data = bytearray(size)
        at = 0
        while at < size:
            width = self.random.choice((1, 2, 4, 4, 8, 8))
            kind = self.random.randrange(6)
            if kind == 0:
                value = self.ram.address + self.random.randrange(0, POINTED, self.random.choice((1, 8, 4096)))
                width = 8
            elif kind == 1:
                value = 0
            elif kind == 2 and self.files:
                value, width = self.random.choice(self.files), 4
            else:
                value = self.number()
            data[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
            at += width
        return data[:size]

    def argument(self, name: str, size: int) -> int | ctypes.Array[ctypes.c_char] | None:
        if name in REGIONS:
            return self.region(size)
        kind = self.random.randrange(8)
        if kind == 0:
            return None
        if kind == 1 or not size:
            return self.number()
        # Room behind the struct for its list, as much as there may be.
        room = size + self.random.choice((0, 0, 64, 4096))
        made = (ctypes.c_char * max(room, 1)).from_buffer(bytearray(bytes(self.fill(size)).ljust(max(room, 1), b"\0")))
        if kind == 2:
            self.ram.write(POINTED, bytes(made))
            return self.ram.address + POINTED
        return made

    def region(self, size: int) -> ctypes.Array[ctypes.c_char]:
        """A memory region of ours, nearly: guests write there."""
        made = self.fill(size)
        pick = self.random.choice
        words = (
            (0, 4, self.random.randrange(4)), (4, 4, pick((0, 1, 2, 3, self.number()))),
            (8, 8, pick((0, 1 << 20, 0xFFFF_0000, self.number()))), (16, 8, pick((0, 4096, 1 << 16, POINTED, 5))),
            (24, 8, self.ram.address + pick((0, 4096, POINTED, 7))),
        )  # fmt: skip
        for at, width, value in words:
            made[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
        return (ctypes.c_char * size).from_buffer(made)

    def close(self, fd: int) -> None:
        self.files.remove(fd)
        self.provider.close(fd)

    def step(self, number: int) -> None:
        """One random thing."""
        if not self.files or (self.random.randrange(40) == 0 and len(self.files) < MOST_FILES):
            print(number, "open", flush=True)
            self.files.append(self.provider.open())
            return
        fd = self.random.choice(self.files)
        if self.random.randrange(30) == 0 or len(self.files) > MOST_FILES:
            print(number, "close", fd, flush=True)
            self.close(fd)
            return
        known = {KvmDevice: KvmDevice, Kvm: Kvm, KvmVcpuFile: KvmVcpuFile}.get(type(self.provider._files.get(fd)))  # type: ignore[arg-type]
        if known is not None and self.random.randrange(10):
            request = self.random.choice(sorted(known.handlers))
        else:
            request = int(self.random.choice(list(NAMES)))
        name = NAMES.get(request, hex(request))
        argument: int | ctypes.Array[ctypes.c_char] | None = self.argument(name, request >> 16 & 0x3FFF)
        if known is KvmVcpuFile and self.random.randrange(8) == 0:
            name, request, argument = "KVM_RUN", RUN, 0
        said = argument if argument is None or isinstance(argument, int) else bytes(argument)[:64].hex()
        print(number, name, fd, said, flush=True)
        result = self.ioctl(name, fd, request, argument)
        if result < 0 and -result not in ANY | LISTED.get(name, set()):
            print(f"{name} gave {errno.errorcode.get(-result, -result)}, which nobody lists")
            sys.exit(1)
        if result > 2 and result not in self.files and name in ("KVM_CREATE_VM", "KVM_CREATE_VCPU"):
            self.files.append(result)
        elif result > 2 and name == "KVM_GET_STATS_FD":
            os.close(result)

    def ioctl(self, name: str, fd: int, request: int, argument: object) -> int:
        if name != "KVM_RUN":
            return self.provider.ioctl(fd, request, argument)  # type: ignore[arg-type]
        thread = threading.get_ident()
        stop = threading.Event()

        def kick() -> None:
            while not stop.wait(RUN_S):
                self.provider.kick(thread)

        kicker = threading.Thread(target=kick)
        kicker.start()
        try:
            return self.provider.ioctl(fd, request, argument)  # type: ignore[arg-type]
        finally:
            stop.set()
            kicker.join()


def main(seed: int, steps: int) -> None:
    """Fuzz; then everything must close."""
    fuzz = Fuzz(random.Random(seed))
    for number in range(steps):
        fuzz.step(number)
    for fd in list(fuzz.files):
        fuzz.close(fd)
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
