"""Everything that vmonty raises on purpose.

VmontyError                    one line that says what is wrong and what to do
├── UsageError                 a bad argument or configuration: the CLI ends with status 2
│   ├── BootImageError         a kernel or initrd that cannot be booted
│   ├── DiskImageError         a disk image that cannot be opened or made
│   └── HostMemoryError        more memory than the host maps; carries errno (also an OSError)
├── GuestError                 a guest image cannot be fetched, built or trusted
├── GuestMemoryError           an address outside guest RAM (also an IndexError)
├── BlockError                 a disk operation failed; carries errno (also an OSError)
├── HandleClosed               a closed handle was used (also a ValueError)
└── KvmError                   an ioctl or open failed; carries errno (also an OSError)
    ├── KvmUnavailable         no KVM here: no device, no permission, module missing, busy, too old
    └── KvmUnsupported         this KVM lacks what was asked for (ENOTTY, or a capability is absent)
"""

from __future__ import annotations

import os


class VmontyError(Exception):
    """Base of all errors that vmonty raises on purpose; ``str()`` is one line for the user."""


class UsageError(VmontyError):
    """An argument or a configuration value is wrong; the message names it and what is accepted."""


class BootImageError(UsageError):
    """A kernel or initrd is not what it should be, or does not fit."""


class DiskImageError(UsageError):
    """A disk image is malformed, of an unknown kind, in use by another program, or cannot be made."""


class HostMemoryError(UsageError, OSError):
    """The host does not map that much: *errno* is what an ioctl that needed it fails with."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)

    def __str__(self) -> str:
        return str(self.args[1])


class GuestError(VmontyError):
    """A guest image cannot be fetched, built or trusted."""


class GuestMemoryError(VmontyError, IndexError):
    """An access of *size* bytes at *address* is not inside guest RAM."""

    def __init__(self, address: int, size: int, limit: str) -> None:
        super().__init__(f"guest memory access of {size} bytes at {address:#x} is outside {limit}")
        self.address = address
        self.size = size


class BlockError(VmontyError, OSError):
    """A disk operation failed: *errno* is what a device reports by (EIO, ENOSPC, EROFS, EINVAL)."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)

    def __str__(self) -> str:
        return str(self.args[1])


class HandleClosed(VmontyError, ValueError):
    """A System, Vm, Vcpu or Device was used after its ``close()``."""


class KvmError(VmontyError, OSError):
    """A KVM file refused: *call* is the ioctl's or operation's name, *errno* the kernel's answer."""

    def __init__(self, errno: int, call: str, remedy: str = "") -> None:
        message = f"{call}: {os.strerror(errno)}" + (f"; {remedy}" if remedy else "")
        super().__init__(errno, message)
        self.call = call
        self.remedy = remedy

    def __str__(self) -> str:
        return str(self.args[1])


class KvmUnavailable(KvmError):
    """There is no KVM to use on this host; *remedy* says how to get one."""


class KvmUnsupported(KvmError):
    """This KVM does not offer what was asked for."""
