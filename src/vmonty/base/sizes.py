"""Sizes as people write them: 512M, 2G, 65536."""

from __future__ import annotations

import re

from vmonty.base.errors import UsageError

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes; K, M, G and T are powers of 1024. Raises UsageError for what is no size."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is no size; write bytes, or a number with K, M, G or T, such as 512M")
    return int(match[1]) * _SUFFIXES[match[2].upper()]
