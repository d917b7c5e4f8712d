"""Making images: empty ones, and copies in another format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block.device import SECTOR, BlockDevice
from vmonty.vmm.block.image import open_backing
from vmonty.vmm.block.qcow2 import create
from vmonty.vmm.block.qcow2.disk import Qcow2Disk

_STEP = 1 << 20
_PIECE = 1 << 16


def _nothing(done: int, total: int, /) -> None:
    """Progress that nobody wants to see."""


def create_image(
    path: str | os.PathLike[str],
    size: int | None,
    *,
    format: str = "qcow2",  # noqa: A002
    backing: str | None = None,
    backing_format: str | None = None,
    **options: object,
) -> int:
    """Make an empty image, and return its size in bytes; *size* None takes that of *backing*.

    *backing* is a path, kept as given: a relative one is relative to the image. *options* are those of
    qcow2.create.describe(). Raises DiskImageError; an existing image that is in use is refused.
    """
    path = Path(path)
    if format not in ("raw", "qcow2"):
        raise DiskImageError(f"unknown disk format {format!r}; raw and qcow2 can be made")
    if format == "raw" and (backing or any(value is not None for value in options.values())):
        raise DiskImageError("a raw image has no backing file, clusters or versions; take the format qcow2")
    with contextlib.ExitStack() as held:
        if backing is not None:
            # Open, and so locked, until the new image is there: it must be none of those that it is to stand on.
            base = held.enter_context(open_backing(path, backing, backing_format))
            backing_format = backing_format or ("qcow2" if isinstance(base, Qcow2Disk) else "raw")
            size = base.size if size is None else size
        if size is None:
            raise DiskImageError("a new image needs a size")
        if size < 0 or size % SECTOR:
            raise DiskImageError(f"a disk of {size} bytes: it must be a multiple of {SECTOR}")
        try:
            if format == "raw":
                _make_raw(path, size)
            else:
                values = {name: value for name, value in options.items() if value is not None}
                header = create.describe(size, backing_file=backing, backing_format=backing_format, **values)  # type: ignore[arg-type]
                with create.making(path) as file:
                    create.lay_out(file, header)
        except BlockError as error:
            raise DiskImageError(str(error)) from error
    return size


def _make_raw(path: Path, size: int) -> None:
    with create.making(path) as file:
        if not file.is_device:
            file.truncate(0)
            file.truncate(size)
            return
        if file.length() < size:
            raise DiskImageError(f"{path} has {file.length()} bytes, too few for a disk of {size}")
        file.zero(0, size)


def copy(
    source: BlockDevice,
    target: BlockDevice,
    *,
    compress: bool = False,
    progress: Callable[[int, int], None] = _nothing,
) -> None:
    """Copy *source* into *target*, which is new, reads as zeroes, and is no smaller. Zeroes are not written.

    Raises BlockError, and DiskImageError for *compress* into a raw image.
    """
    if target.size < source.size:
        raise DiskImageError(f"a disk of {target.size} bytes cannot hold one of {source.size}")
    packed: Qcow2Disk | None = None
    if compress:
        if not isinstance(target, Qcow2Disk):
            raise DiskImageError("only qcow2 images hold compressed clusters")
        packed = target
    piece = packed.header.cluster_size if packed else _PIECE
    zero = bytes(piece)
    for offset, length in _pieces(source, max(_STEP, piece)):
        data = source.read(offset, length)
        for at in range(0, length, piece):
            part = data[at : at + piece]
            if part == zero[: len(part)]:
                continue
            if packed:
                packed.write_compressed((offset + at) // piece, part.ljust(piece, b"\0"))
            else:
                target.write(offset + at, part)
        progress(offset + length, source.size)
    target.flush()
    progress(source.size, source.size)


def _pieces(source: BlockDevice, step: int) -> Iterator[tuple[int, int]]:
    """What is stored in *source*, in pieces of *step* that begin at its multiples, each once."""
    done = 0
    for start, length in source.extents():
        for offset in range(max(done, start // step * step), min(start + length, source.size), step):
            yield offset, min(step, source.size - offset)
            done = offset + step
