"""Sizes on the command line."""

from __future__ import annotations

import click

from vmonty.base.errors import UsageError
from vmonty.base.sizes import parse_size


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.4 on
    """A size in bytes, or with K, M, G or T for powers of 1024."""

    name = "SIZE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; refuses what is no size."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
