"""Sizes on the command line: 512M, 2G, 65536."""

from __future__ import annotations

import re

import click

_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """A size in bytes, or with K, M, G or T for powers of 1024."""

    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; refuses what is no size."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", str(value).strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size; write bytes, or a number with K, M, G or T, such as 512M", param, ctx)
        return int(match[1]) * _SUFFIXES[match[2].upper()]
