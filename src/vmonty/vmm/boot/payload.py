"""The kernel inside a bzImage, decompressed on the host: the guest need not do it.

Source: Documentation/arch/x86/boot.rst, fields payload_offset and payload_length: "any of the compression formats".
"""

from __future__ import annotations

import struct
import zlib

from vmonty.base.errors import BootImageError
from vmonty.vmm.boot.elf import MAGIC

MOST_BYTES = 512 << 20
_LZ4_BLOCK = 8 << 20  # of the legacy frame format


def decompress(payload: bytes) -> bytes | None:
    """The ELF file in *payload*; None when it is compressed in no way that is known here, or no ELF file.

    Raises BootImageError when it is damaged, or larger than any kernel.
    """
    method = next((method for magic, method in _METHODS if payload.startswith(magic)), None)
    if method is None or len(payload) < 16:
        return None
    # Behind the compressed data stands the size of what is in it; of gzip it is the last field anyhow.
    size = struct.unpack_from("<I", payload, len(payload) - 4)[0]
    if size > MOST_BYTES:
        raise BootImageError(f"the kernel says that it is {size >> 20} MiB when decompressed; it is damaged")
    try:
        data = method(payload, size)
    except (zlib.error, OSError, EOFError, ValueError) as error:
        raise BootImageError(f"the kernel's compressed part is damaged: {error}") from error
    if len(data) != size:
        raise BootImageError(f"the kernel's compressed part is damaged: it has {len(data)} of {size} bytes")
    return data if data.startswith(MAGIC) else None


# Each makes no more than a little above *size* bytes, whatever it is given, and raises ValueError or its kin when that
# is damaged. A kernel has one format: only its library is imported.


def _gzip(payload: bytes, size: int) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(payload, size or 1)


def _bzip2(payload: bytes, size: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(payload, size)


def _lzma(payload: bytes, size: int) -> bytes:
    import lzma

    try:
        return lzma.LZMADecompressor(memlimit=1 << 30).decompress(payload, size)
    except lzma.LZMAError as error:
        raise ValueError(error) from error


def _zstd(payload: bytes, size: int) -> bytes:
    from vmonty.base import zstd

    try:
        return zstd.ZstdDecompressor().decompress(payload, size)
    except zstd.ZstdError as error:
        raise ValueError(error) from error


def _lzo(payload: bytes, size: int) -> bytes:
    from vmonty.vmm.boot import lzo

    return lzo.decompress_file(payload, size)


def _lz4(payload: bytes, size: int) -> bytes:
    """The legacy frame: blocks of 8 MiB, each behind its compressed size."""
    import lz4.block

    parts: list[bytes] = []
    made, at = 0, 4
    while made < size:
        length = int.from_bytes(payload[at : at + 4], "little")
        at += 4
        if not length or at + length > len(payload):
            raise ValueError("a block is cut off")
        try:
            part = lz4.block.decompress(payload[at : at + length], uncompressed_size=min(_LZ4_BLOCK, size - made))
        except lz4.block.LZ4BlockError as error:
            raise ValueError(error) from error
        parts.append(part)
        made += len(part)
        at += length
        if not part:
            raise ValueError("a block is empty")
    return b"".join(parts)


_METHODS = [
    (b"\x1f\x8b", _gzip),
    (b"BZh", _bzip2),
    (b"\xfd7zXZ\0", _lzma),
    (b"\x5d\0\0", _lzma),
    (b"\x89LZO\0\r\n\x1a\n", _lzo),
    (b"\x02!L\x18", _lz4),
    (b"\x28\xb5\x2f\xfd", _zstd),
]
