"""``vmonty disk``: disk images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmonty.base.errors import DiskImageError
from vmonty.cli.progress import terminal_progress
from vmonty.cli.sizes import Size

# The block layer is imported where it is used: other commands start without it.
if TYPE_CHECKING:
    from vmonty.vmm.block.qcow2.disk import Qcow2Disk
    from vmonty.vmm.block.qcow2.snapshots import Snapshot

_IMAGE = click.Path(path_type=Path)
_FORMAT = click.Choice(("auto", "raw", "qcow2"))
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
_format = click.option(
    "--format", "-f", "kind", type=_FORMAT, default="auto", show_default=True, help="Format of the image."
)


@contextmanager
def _qcow2(path: Path, kind: str, *, read_only: bool, repair: bool = True) -> Iterator[Qcow2Disk]:
    from vmonty.vmm.block.image import open_image
    from vmonty.vmm.block.qcow2.disk import Qcow2Disk

    with open_image(path, format=kind, read_only=read_only, repair=repair) as disk:
        if not isinstance(disk, Qcow2Disk):
            raise DiskImageError(f"{path} is a raw image: only qcow2 images have tables and snapshots")
        yield disk


@click.group()
def disk() -> None:
    """Disk images: raw and qcow2.

    Example: vmonty disk create disk.qcow2 20G
    """


@disk.command("create")
@click.argument("image", type=_IMAGE)
@click.argument("size", type=Size(), required=False)
@click.option(
    "--format", "-f", "kind", type=click.Choice(["raw", "qcow2"]), default="qcow2", show_default=True,
    help="Format of the new image.",
)  # fmt: skip
@click.option("--backing", "-b", metavar="FILE", help="Image to begin with, which stays as it is (qcow2).")
@click.option("--backing-format", "-F", type=click.Choice(["raw", "qcow2"]), help="Its format.  [default: as it looks]")
@click.option("--cluster-size", type=Size(), help="Bytes of a cluster, 512 to 2M.  [default: 64K]")
@click.option("--force", is_flag=True, help="Overwrite a file that exists.")
@_json
def create_command(
    image: Path,
    size: int | None,
    kind: str,
    backing: str | None,
    backing_format: str | None,
    cluster_size: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Make an empty image; SIZE may be left out when there is a backing file.

    Example: vmonty disk create --backing debian.qcow2 mine.qcow2
    """
    from vmonty.vmm.block.convert import create_image

    if not force and image.exists() and not image.is_block_device():
        raise DiskImageError(f"{image} exists; give --force to overwrite it")
    size = create_image(
        image, size, format=kind, backing=backing, backing_format=backing_format, cluster_size=cluster_size
    )
    if as_json:
        click.echo(json.dumps({"image": str(image), "format": kind, "size": size}, indent=1))


@disk.command("info")
@click.argument("image", type=_IMAGE)
@_format
@_json
def info_command(image: Path, kind: str, as_json: bool) -> None:
    """Show what an image is.

    Example: vmonty disk info disk.qcow2 --json
    """
    from vmonty.vmm.block.image import format_of, open_image
    from vmonty.vmm.block.qcow2 import snapshots
    from vmonty.vmm.block.qcow2.disk import Qcow2Disk

    facts: dict[str, object] = {"image": str(image)}
    with open_image(image, format=kind, read_only=True) as opened:
        found = format_of(image, kind)
        facts |= {"format": found, "size": opened.size, "allocated": os.stat(image).st_blocks * 512}
        if found == "qcow2" and isinstance(opened, Qcow2Disk):
            header = opened.header
            facts |= {
                "version": header.version, "cluster_size": header.cluster_size,
                "refcount_bits": opened.refcounts.bits, "compression": ["zlib", "zstd"][header.compression_type],
                "backing_file": header.backing_file, "backing_format": header.backing_format,
                "dirty": bool(header.incompatible & 1), "corrupt": bool(header.incompatible & 2),
                "snapshots": [_shown(item) for item in snapshots.read(opened.file, header)],
            }  # fmt: skip
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        if name != "snapshots" and value is not None:
            click.echo(f"{name.replace('_', ' '):15} {value}")
    for item in facts.get("snapshots", []):  # type: ignore[attr-defined]
        click.echo(f"snapshot        {item['id']} {item['name']} of {item['date']}")


@disk.command("check")
@click.argument("image", type=_IMAGE)
@click.option("--repair", is_flag=True, help="Correct counts and flags.")
@_format
@_json
def check_command(image: Path, repair: bool, kind: str, as_json: bool) -> int:
    """Compare a qcow2 image's counts with its tables.

    The status is 0 when all is well, or well again, and 1 when something is left.

    Example: vmonty disk check --repair disk.qcow2
    """
    from vmonty.vmm.block.qcow2.check import check as check_disk

    with _qcow2(image, kind, read_only=not repair, repair=False) as opened:
        report = check_disk(opened, repair=repair)
    left = report.damage_count - report.damages_fixed, report.leaks - report.leaks_fixed
    if as_json:
        facts = {"damages": report.damage_count, "damages_fixed": report.damages_fixed}
        facts |= {"leaks": report.leaks, "leaks_fixed": report.leaks_fixed}
        click.echo(json.dumps(facts | {"texts": report.damages}, indent=1))
    else:
        for text in report.damages:
            click.echo(f"damage: {text}")
        fixed = f", {report.damages_fixed} and {report.leaks_fixed} of them repaired" if repair else ""
        click.echo(f"{report.damage_count} damages, {report.leaks} lost clusters{fixed}")
    return int(any(left))


@disk.command("convert")
@click.argument("source", type=_IMAGE)
@click.argument("target", type=_IMAGE)
@_format
@click.option(
    "--to", "target_kind", type=click.Choice(["raw", "qcow2"]), default="qcow2", show_default=True,
    help="Format of the new image.",
)  # fmt: skip
@click.option("--compress", "-c", is_flag=True, help="Compress the new image's clusters (qcow2).")
@click.option("--compression", type=click.Choice(["zlib", "zstd"]), help="By what.  [default: zlib]")
@click.option("--force", is_flag=True, help="Overwrite a file that exists.")
def convert_command(
    source: Path, target: Path, kind: str, target_kind: str, compress: bool, compression: str | None, force: bool
) -> None:
    """Copy an image, with its backing files' contents, into a new one.

    Example: vmonty disk convert --compress disk.raw disk.qcow2
    """
    from vmonty.vmm.block.convert import copy, create_image
    from vmonty.vmm.block.image import open_image

    if compress and target_kind != "qcow2":
        raise DiskImageError("only qcow2 images hold compressed clusters")
    there = os.path.lexists(target)  # a link that leads nowhere is the user's, too
    if not force and there and not target.is_block_device():
        raise DiskImageError(f"{target} exists; give --force to overwrite it")
    with open_image(source, format=kind, read_only=True) as opened:
        create_image(target, opened.size, format=target_kind, compression=compression)
        try:
            with open_image(target, format=target_kind) as made, terminal_progress() as progress:
                copy(opened, made, compress=compress, progress=lambda done, all_: progress("copying", done, all_))
        except BaseException:
            # Half of a disk is of no use, and would be in the way of the next try.
            if not there:
                target.unlink(missing_ok=True)
            raise


@disk.group("snapshot")
def snapshot_group() -> None:
    """Snapshots inside a qcow2 image.

    Example: vmonty disk snapshot create disk.qcow2 before-upgrade
    """


@snapshot_group.command("list")
@click.argument("image", type=_IMAGE)
@_json
def list_command(image: Path, as_json: bool) -> None:
    """Show an image's snapshots.

    Example: vmonty disk snapshot list disk.qcow2
    """
    from vmonty.vmm.block.qcow2 import snapshots

    with _qcow2(image, "qcow2", read_only=True) as opened:
        shown = [_shown(item) for item in snapshots.read(opened.file, opened.header)]
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    for item in shown:
        click.echo(f"{item['id']:4} {item['date']}  {item['name']}")


def _shown(item: Snapshot) -> dict[str, object]:
    date = datetime.fromtimestamp(item.date_ns / 1e9, UTC).isoformat(timespec="seconds")
    return {"id": item.id, "name": item.name, "date": date, "size": item.disk_size, "vm_state": item.vm_state_size}


@snapshot_group.command("create")
@click.argument("image", type=_IMAGE)
@click.argument("name")
def snapshot_create(image: Path, name: str) -> None:
    """Keep the image's contents of now under NAME.

    Example: vmonty disk snapshot create disk.qcow2 clean
    """
    from vmonty.vmm.block.qcow2 import snapshots

    with _qcow2(image, "qcow2", read_only=False) as opened:
        snapshots.create(opened, name)


@snapshot_group.command("apply")
@click.argument("image", type=_IMAGE)
@click.argument("name")
def snapshot_apply(image: Path, name: str) -> None:
    """Make the image what it was at the snapshot NAME; what came after is lost.

    Example: vmonty disk snapshot apply disk.qcow2 clean
    """
    from vmonty.vmm.block.qcow2 import snapshots

    with _qcow2(image, "qcow2", read_only=False) as opened:
        snapshots.apply(opened, name)


@snapshot_group.command("delete")
@click.argument("image", type=_IMAGE)
@click.argument("name")
def snapshot_delete(image: Path, name: str) -> None:
    """Forget the snapshot NAME.

    Example: vmonty disk snapshot delete disk.qcow2 clean
    """
    from vmonty.vmm.block.qcow2 import snapshots

    with _qcow2(image, "qcow2", read_only=False) as opened:
        snapshots.delete(opened, name)
