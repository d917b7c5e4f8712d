"""The decoder's tables as plain bytes that ``decode`` copies into C arrays, and the features that rows name.

Making them from ``isa`` takes a third of a start, so the build stores them beside this module, with a digest of what
they were made of. Without the file, or with another digest, they are made here: stale tables are never used.
"""

from __future__ import annotations

import contextlib
import marshal
from importlib.util import source_hash
from pathlib import Path
from typing import NamedTuple

STORED = "opcodes.tables"
SOURCES = ("isa.py", "opcode_tables.py")
_FOLDER = Path(__file__).parent


class Tables(NamedTuple):
    """*features* by their number, the row of *arpl*, and the arrays of ``decode``."""

    features: tuple[str, ...]
    arpl: int
    rows: bytes  # from number 1 on
    root: bytes  # [VEX][map][opcode][prefix]
    groups: bytes  # [n][72]
    operand_sizes: bytes


def sources_digest() -> bytes:
    """A digest of the modules that the tables are made by."""
    return b"".join(source_hash((_FOLDER / name).read_bytes()) for name in SOURCES)


def _load() -> Tables:
    # No build, or one that was cut short: the sources have all.
    with contextlib.suppress(OSError, EOFError, ValueError, TypeError):
        digest, stored = marshal.loads((_FOLDER / STORED).read_bytes())
        if digest == sources_digest():
            return Tables(*stored)
    from vmonty.cpu import opcode_tables

    return Tables(*opcode_tables.make())


TABLES = _load()
FEATURES, ARPL = TABLES.features, TABLES.arpl


def store(package: Path) -> None:
    """Write the tables into *package*, a directory that is or becomes ``vmonty.cpu``."""
    (package / STORED).write_bytes(marshal.dumps((sources_digest(), tuple(TABLES))))
