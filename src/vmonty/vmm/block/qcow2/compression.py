"""Compressed clusters: deflate without a header, or zstd."""

from __future__ import annotations

import zlib

from vmonty.base import zstd
from vmonty.vmm.block.qcow2.header import ZSTD

_WINDOW_BITS = 12  # what QEMU writes; every larger window is read


def compress(kind: int, data: bytes | bytearray | memoryview) -> bytes:
    """*data* compressed; it may have become longer."""
    if kind == ZSTD:
        return bytes(zstd.compress(data))
    packer = zlib.compressobj(wbits=-_WINDOW_BITS)
    return packer.compress(data) + packer.flush()


def decompress(kind: int, data: bytes, size: int) -> bytes:
    """The *size* bytes that *data* begins with, compressed; what follows is ignored.

    Raises ValueError when it is damaged. Never makes more than *size* bytes.
    """
    try:
        if kind == ZSTD:
            # Several frames may follow each other.
            result = b""
            while len(result) < size:
                frame = zstd.ZstdDecompressor()
                result += frame.decompress(data, size - len(result))
                if not frame.eof:
                    break
                data = frame.unused_data
        else:
            result = zlib.decompressobj(wbits=-15).decompress(data, size)
    except (zlib.error, zstd.ZstdError, EOFError) as error:
        raise ValueError(str(error)) from error
    if len(result) != size:
        raise ValueError(f"{len(result)} of {size} bytes")
    return result
