"""What a provider of KVM is: something that opens /dev/kvm-like files and answers ioctls on their fds."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vmonty.base.errors import KvmUnsupported

if TYPE_CHECKING:
    # Only a type checker has it for certain; from Python 3.12 on it is collections.abc.Buffer.
    from typing_extensions import Buffer

__all__ = ["Provider", "insight"]


@runtime_checkable
class Provider(Protocol):
    """One KVM. File descriptors are real ones of this process, whoever answers for them."""

    name: str

    def open(self) -> int:
        """Open the system file; return its fd. Raises KvmUnavailable with the remedy."""
        ...

    def ioctl(self, fd: int, request: int, argument: int | Buffer | None) -> int:
        """Make one ioctl without the GIL; return its result, or minus errno. Never retried, never raises for errno."""
        ...

    def mmap(self, fd: int, size: int, offset: int = 0) -> memoryview:
        """Map *size* bytes of a KVM file (the kvm_run page of a vCPU, its dirty ring), shared and writable."""
        ...

    def close(self, fd: int) -> None:
        """Close *fd*. Objects behind it live until their last fd is closed, as in the kernel."""
        ...

    def kick(self, thread: int) -> None:
        """Get the thread with this ident out of KVM_RUN (which then gives -EINTR)."""
        ...

    def memory_written(self, address: int, size: int) -> None:
        """Host memory that a guest may execute was written by this process.

        A KVM on hardware has nothing to do; one in software drops what it translated from there.
        """
        ...

    def remedy(self, error: int, call: str) -> str:
        """What a user can do when *call* fails with errno *error*, or an empty string."""
        ...


def insight(provider: Provider, method: str) -> Callable[..., Any]:
    """A method by which some providers show what no ioctl tells. Raises KvmUnsupported where there is none."""
    found: Callable[..., Any] | None = getattr(provider, method, None)
    if found is None:
        raise KvmUnsupported(errno.ENOTTY, method, f"KVM {provider.name!r} does not show this; use --accel soft")
    return found
