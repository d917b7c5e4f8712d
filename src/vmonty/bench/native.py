"""The processor itself: payloads run in a process of their own. Requests are lines: name repeats → seconds checksum."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import time
from types import TracebackType

from vmonty.bench.compiler import PayloadError
from vmonty.bench.payload import IMAGE_BASE, IMAGE_ROOM, Image, build

MAP_FIXED_NOREPLACE = 0x100000


class Native:
    """Runs payloads on the host's processor."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "vmonty.bench.native"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, name: str, repeats: int) -> tuple[float, int]:
        """CPU seconds and checksum. Raises PayloadError when the child died."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{name} {repeats}\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline().split()
        if len(answer) != 2:
            raise PayloadError(f"{name} did not end natively: status {self._child.wait()}")
        return float(answer[0]), int(answer[1])

    def __enter__(self) -> Native:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.communicate()


def _map(image: Image) -> None:
    """Place the image where it was linked to."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    access = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    sharing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    if libc.mmap(IMAGE_BASE, IMAGE_ROOM, access, sharing, -1, 0) != IMAGE_BASE:
        raise PayloadError(f"there is no room at {IMAGE_BASE:#x}")
    ctypes.memmove(IMAGE_BASE, image.data, len(image.data))


def _serve() -> None:
    image = build()
    _map(image)
    for line in sys.stdin:
        name, repeats = line.split()
        function = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)(image.address(name))
        begin = time.thread_time()
        result = function(int(repeats))
        print(time.thread_time() - begin, result, flush=True)


if __name__ == "__main__":
    _serve()
