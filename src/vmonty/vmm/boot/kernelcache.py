"""Kernels that were decompressed once, kept under the user's cache directory by what they were made of.

A file is named by the BLAKE2b digest of the compressed kernel, which takes each start half of SHA-256's time, and
appears by rename when it is complete and on disk; it is mapped, not read: the kernel is copied once, into guest RAM.
Where nothing can be written there is no cache, and all works as well.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path

from vmonty.base.cachedir import cache_root
from vmonty.vmm.boot import payload

_KEPT = 8  # kernels
_TRAILER = struct.Struct("<8sQ")
_MARK = b"vmlinux1"


def unpack(compressed: bytes) -> bytes | memoryview | None:
    """As payload.decompress(), from the cache when it is there."""
    import hashlib  # which begins with OpenSSL

    path = cache_root() / "kernels" / hashlib.blake2b(compressed, digest_size=32).hexdigest()
    cached = _map(path)
    if cached is not None:
        return cached
    kernel = payload.decompress(compressed)
    if kernel is not None:
        # A cache that cannot be written is no reason not to boot.
        with contextlib.suppress(OSError):
            _write(path, kernel)
    return kernel


def _map(path: Path) -> memoryview | None:
    try:
        with path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        # The newest are kept.
        os.utime(path)
    except (OSError, ValueError):
        return None
    size = len(mapped) - _TRAILER.size
    if size <= 0 or _TRAILER.unpack_from(mapped, size) != (_MARK, size):
        return None
    return mapped[:size]


def _write(path: Path, kernel: bytes) -> None:
    import tempfile  # and much with it, for a kernel's first boot only

    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(kernel)
            out.write(_TRAILER.pack(_MARK, len(kernel)))
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    kept = sorted(path.parent.glob("[!.]*"), key=lambda each: each.stat().st_mtime, reverse=True)
    for old in kept[_KEPT:]:
        old.unlink(missing_ok=True)
