"""Sequences of writable byte views, as a guest's descriptor chain gives them."""

from __future__ import annotations

from collections.abc import Sequence

_ZEROES = memoryview(bytes(1 << 16))


def total(buffers: Sequence[memoryview]) -> int:
    """Bytes in all *buffers* together."""
    return len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))


def cut(buffers: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """The views of *length* bytes from byte *start* on, without a copy."""
    pieces: list[memoryview] = []
    for buffer in buffers:
        size = len(buffer)
        if start >= size:
            start -= size
            continue
        if length <= 0:
            break
        piece = buffer[start : start + length]
        pieces.append(piece)
        length -= len(piece)
        start = 0
    return pieces


def fill_zero(buffers: Sequence[memoryview]) -> None:
    """Set every byte to zero."""
    for buffer in buffers:
        for start in range(0, len(buffer), len(_ZEROES)):
            part = buffer[start : start + len(_ZEROES)]
            part[:] = _ZEROES[: len(part)]


def scatter(data: bytes | memoryview, buffers: Sequence[memoryview]) -> None:
    """Copy *data* into *buffers*, which together have its length."""
    start = 0
    for buffer in buffers:
        buffer[:] = data[start : start + len(buffer)]
        start += len(buffer)


def zeroes(length: int) -> list[memoryview]:
    """Read-only views of *length* zero bytes that share their memory."""
    whole, rest = divmod(length, len(_ZEROES))
    return [_ZEROES] * whole + ([_ZEROES[:rest]] if rest else [])
