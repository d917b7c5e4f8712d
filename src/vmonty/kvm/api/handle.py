"""What System, Vm, Vcpu and Device share: an fd that closes deterministically, and the raw ioctl door."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from vmonty.base.closing import Closing
from vmonty.base.errors import HandleClosed, KvmError, KvmUnsupported
from vmonty.kvm.api.provider import Provider
from vmonty.kvm.uapi import Ioctl, Requests
from vmonty.kvm.uapi.ioctls import name_of
from vmonty.kvm.uapi.vm import kvm_enable_cap

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")


class Handle(Closing):
    """An open KVM file. Use it with ``with``, or call ``close()``; both from any thread, in any order.

    A close that meets calls in flight on other threads lets them finish: the fd goes when the last of them
    returns, so its number is never reused under a call.
    """

    def __init__(self, provider: Provider, fd: int) -> None:
        self.provider = provider
        self._fd = fd
        self._users = 0
        self._closing = False
        self._idle = threading.RLock()

    def __repr__(self) -> str:
        state = "closed" if self._closing else f"fd {self._fd}"
        return f"<{type(self).__name__} of {self.provider.name}, {state}>"

    @property
    def closed(self) -> bool:
        """Whether close() has been called."""
        return self._closing

    def fileno(self) -> int:
        """The file descriptor. Raises HandleClosed after close()."""
        if self._closing:
            raise HandleClosed(f"this {type(self).__name__} is closed; open a new one")
        return self._fd

    def close(self) -> None:
        """Close the file; a second call does nothing. What it stands for lives until its last handle closes."""
        with self._idle:
            if self._closing:
                return
            self._closing = True
            last = self._users == 0
        if last:
            self._release()

    def _release(self) -> None:
        self.provider.close(self._fd)

    def _enter(self) -> int:
        with self._idle:
            fd = self.fileno()
            self._users += 1
            return fd

    def _leave(self) -> None:
        with self._idle:
            self._users -= 1
            last = self._closing and self._users == 0
        if last:
            self._release()

    def try_ioctl(self, request: int, argument: int | Buffer | None = None) -> int:
        """The raw door, for callers that expect failure: the result, or minus errno."""
        fd = self._enter()
        try:
            return self.provider.ioctl(fd, request, argument)
        finally:
            self._leave()

    def ioctl(self, request: int, argument: int | Buffer | None = None) -> int:
        """The raw door: make *request* with a number, an address or a writable buffer; return its result.

        Raises KvmUnsupported for ENOTTY (this file does not know the request), KvmError for any other errno.
        A buffer that is shorter than the request's size gives EFAULT.
        """
        result = self.try_ioctl(request, argument)
        if result < 0:
            raise self.error(-result, name_of(request))
        return result

    def error(self, code: int, call: str) -> KvmError:
        """The exception for errno *code* of *call*."""
        kind = KvmUnsupported if code == errno.ENOTTY else KvmError
        return kind(code, call, self.provider.remedy(code, call))

    def get(self, request: Ioctl, layout: type[T]) -> T:
        """A new *layout* that *request* has filled in."""
        value: Any = layout()
        self.ioctl(request, value)
        return value  # type: ignore[no-any-return]

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP: switch capability *cap* on with up to four 64-bit arguments; return its result.

        Raises KvmError with EINVAL when the capability is unknown here or its arguments are wrong.
        """
        request = kvm_enable_cap(cap=cap, flags=flags)
        request.args[: len(args)] = list(args)
        return self.ioctl(Requests.KVM_ENABLE_CAP, request)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 when *cap* is absent, else 1 or the capability's own number."""
        return self.ioctl(Requests.KVM_CHECK_EXTENSION, int(cap))
