"""A network interface of the host. Source: Linux's Documentation/networking/tuntap.rst; struct virtio_net_hdr.

The interface either exists and belongs to this user (``ip tuntap add NAME mode tap user ME``) or is made here,
which needs CAP_NET_ADMIN.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Sequence

from vmonty.base.errors import UsageError
from vmonty.vmm.net.backend import MOST_FRAME, Accepts, Cable, Gso, NetBackend, Offload, Receive
from vmonty.vmm.net.checksum import Buffer
from vmonty.vmm.net.loop import Loop

TUNSETIFF, TUNSETOFFLOAD, TUNGETIFF, TUNSETVNETHDRSZ = 0x4004_54CA, 0x4004_54D0, 0x8004_54D2, 0x4004_54D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F = {Accepts.CHECKSUM: 0x01, Accepts.TCP4: 0x02, Accepts.TCP6: 0x04, Accepts.UDP: 0x10}

VNET_HEADER = struct.Struct("=BBHHHH")
NEEDS_CSUM = 1
GSO_TYPES = {kind.value: kind for kind in Gso}
NO_OFFLOAD = VNET_HEADER.pack(0, 0, 0, 0, 0, 0)
CUT = -1

MOST_NAME = 15

# Frames that are read at a stretch, before others on the loop have their turn.
BATCH = 64
# How many may wait in the kernel: its default for an interface's transmit queue.
MOST_STALE = 1000


def open_tap(name: str) -> tuple[int, str]:
    """(fd, name) of the tap interface *name*, made when there is none; ``tap%d`` lets the kernel number it.

    Raises UsageError with what to do about it.
    """
    if not 0 < len(name.encode()) <= MOST_NAME or "/" in name or "\0" in name:
        raise UsageError(f"the interface name {name!r} is not one of 1 to {MOST_NAME} characters")
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hint = {
            errno.ENOENT: "load the kernel's module with 'modprobe tun', or use --net user",
            errno.EACCES: "ask for access to it, or use --net user, which needs no privileges",
        }.get(error.errno or 0, "use --net user instead")
        raise UsageError(f"/dev/net/tun cannot be opened: {error.strerror}; {hint}") from error
    try:
        request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        made = fcntl.ioctl(fd, TUNSETIFF, request)
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER.size))
    except OSError as error:
        os.close(fd)
        hint = {
            errno.EPERM: f"let root make it with 'ip tuntap add {name} mode tap user {os.getuid()}', or use --net user",
            errno.EBUSY: "another program uses it",
            errno.EINVAL: "it is no tap interface",
        }.get(error.errno or 0, "use --net user instead")
        raise UsageError(f"the tap interface {name} cannot be used: {error.strerror}; {hint}") from error
    return fd, made[:16].rstrip(b"\0").decode()


class TapCable(Cable):
    """The tap interface *name*, as for open_tap. One that is made here goes when its last descriptor is closed."""

    def __init__(self, name: str) -> None:
        self._fd, self.name = open_tap(name)

    def plug(self, loop: Loop) -> NetBackend:
        if self._fd >= 0 and self._deleted():
            self.close()
            self._fd, _ = open_tap(self.name)
        return TapBackend(os.dup(self._fd) if self._fd >= 0 else CUT, loop)

    def _deleted(self) -> bool:
        try:
            fcntl.ioctl(self._fd, TUNGETIFF, bytes(40))
        except OSError:
            return True
        return False

    def close(self) -> None:
        fd, self._fd = self._fd, CUT
        if fd >= 0:
            os.close(fd)


class TapBackend(NetBackend):
    """The tap interface behind *fd*, which it owns, watched on *loop*; CUT is none."""

    offloads = True

    def __init__(self, fd: int, loop: Loop) -> None:
        self._fd = fd
        self._loop = loop
        self._receive: Receive | None = None
        self._kept: tuple[Buffer, Offload | None] | None = None
        self._lock = threading.Lock()
        self._receiving = threading.RLock()

    def start(self, receive: Receive) -> None:
        self._receive = receive
        self.guest_accepts(Accepts.NOTHING)
        self._forget_stale()
        self._loop.call_soon(self._watch)

    def guest_accepts(self, accepts: Accepts) -> None:
        wanted = sum(bit for flag, bit in TUN_F.items() if flag in accepts)
        if Accepts.CHECKSUM not in accepts:
            wanted = 0  # the kernel wants nothing else without it
        with self._lock:
            if self._fd < 0:
                return
            try:
                fcntl.ioctl(self._fd, TUNSETOFFLOAD, wanted)
            except OSError:
                # Newer kernels have no UFO; the rest they all have, unless the interface was deleted under us.
                with contextlib.suppress(OSError):
                    fcntl.ioctl(self._fd, TUNSETOFFLOAD, wanted & ~TUN_F[Accepts.UDP])

    def send(self, frame: Sequence[Buffer], offload: Offload | None) -> None:
        header = NO_OFFLOAD
        if offload is not None:
            try:
                header = VNET_HEADER.pack(
                    NEEDS_CSUM if offload.needs_checksum else 0,
                    offload.gso.value, offload.header_size, offload.gso_size, offload.csum_start, offload.csum_offset,
                )  # fmt: skip
            except struct.error:
                return  # numbers that no header holds
        with self._lock:
            if self._fd < 0:
                return
            try:
                os.writev(self._fd, [header, *frame])
            except OSError:
                return  # down, full, or the kernel finds the frame malformed: lost, as on any cable

    def ready(self) -> None:
        self._loop.call_soon(self._resume)

    def close(self) -> None:
        with self._receiving, self._lock:
            self._receive = None
            fd, self._fd = self._fd, -1
        if fd >= 0:
            self._loop.unwatch(fd)
            os.close(fd)

    def _forget_stale(self) -> None:
        # Made for the machine before, which may have taken frames that this one's driver does not.
        with self._lock, contextlib.suppress(OSError):
            for _ in range(MOST_STALE if self._fd >= 0 else 0):
                os.read(self._fd, VNET_HEADER.size + MOST_FRAME)

    def _watch(self) -> None:
        if self._fd >= 0:
            self._loop.watch(self._fd, self._readable)

    def _resume(self) -> None:
        with self._receiving:
            if self._kept is None or self._receive is None:
                return
            if self._receive(*self._kept):
                self._kept = None
                self._watch()

    def _readable(self) -> None:
        with self._receiving:
            if self._receive is not None:
                self._take(self._receive)

    def _take(self, receive: Receive) -> None:
        for _ in range(BATCH):
            try:
                data = os.read(self._fd, VNET_HEADER.size + MOST_FRAME)
            except BlockingIOError:
                return
            except OSError:
                # The interface was deleted under us: the cable is cut.
                self._loop.unwatch(self._fd)
                return
            frame, offload = memoryview(data)[VNET_HEADER.size :], _offload(data)
            if not receive(frame, offload):
                self._kept = frame, offload
                self._loop.unwatch(self._fd)
                return


def _offload(data: bytes) -> Offload | None:
    if data[:2] == b"\0\0":
        return None
    flags, gso, header, size, start, offset = VNET_HEADER.unpack_from(data)
    return Offload(bool(flags & NEEDS_CSUM), start, offset, GSO_TYPES[gso], size, header)
