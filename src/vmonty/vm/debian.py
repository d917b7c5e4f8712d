"""The Debian guest as it is booted by name: an overlay of the user's over the image that was built."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from vmonty.base.errors import GuestError, UsageError
from vmonty.guests import rootdisk
from vmonty.guests.progress import Progress, silent
from vmonty.vm.plan import Plan
from vmonty.vmm.block.convert import copy, create_image
from vmonty.vmm.block.image import open_image
from vmonty.vmm.peripherals import Disk, Network


@dataclass(frozen=True)
class DebianGuest:
    """What to boot; *disk* is the user's own, *key* the private key that its root lets in."""

    kernel: Path
    initrd: Path
    command_line: str
    disk: Path
    key: Path


def pack(raw: Path, image: Path, progress: Progress) -> None:
    """Make a qcow2 image of a raw one, into a file that exists. Not compressed: reads go straight into guest RAM."""
    with open_image(raw, format="raw", read_only=True) as source:
        create_image(image, source.size)
        with open_image(image, format="qcow2") as target:
            copy(source, target, progress=lambda done, total: progress("packing the disk", done, total))


def planned(plan: Plan, progress: Progress = silent) -> tuple[Plan, list[str]]:
    """*plan* with the guest and its disk, and the command that reaches it by ssh through a port of this host.

    There is none when the plan has networks of its own. Raises GuestError, DiskImageError and UsageError.
    """
    guest = prepare(progress=progress)
    ssh: list[str] = []
    if not plan.networks:
        port = free_port()
        plan = plan._replace(networks=(Network.parse(f"user,hostfwd=tcp:127.0.0.1:{port}-:22"),))
        ssh = ["ssh", "-i", str(guest.key), "-p", str(port), "root@127.0.0.1"]
    plan = plan._replace(
        kernel=guest.kernel, initrd=guest.initrd,
        append=plan.append if plan.append is not None else guest.command_line,
        disks=(Disk(guest.disk, "qcow2"), *plan.disks),
    )  # fmt: skip
    return plan, ssh


def data_root() -> Path:
    """``$XDG_DATA_HOME/vmonty``, by default ``~/.local/share/vmonty``."""
    configured = os.environ.get("XDG_DATA_HOME", "")
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".local" / "share"
    return base / "vmonty"


def prepare(directory: Path | None = None, progress: Progress = silent) -> DebianGuest:
    """The guest, built when it is not in the cache, with its overlay, made when there is none.

    What the guest writes stays in the overlay from run to run. A newer build gets another one: the old overlay keeps
    its base, which is linked beside it. Raises GuestError and DiskImageError.
    """
    built = rootdisk.cached() or rootdisk.build(pack, progress=progress)
    directory = directory or data_root()
    name = f"debian-{built.sha256[:12]}"
    base, overlay = directory / f"{name}-base.qcow2", directory / f"{name}.qcow2"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not base.exists():
            _link(built.disk, base)
    except OSError as error:
        raise GuestError(
            f"cannot write to {directory}: {error.strerror}; set XDG_DATA_HOME to another place"
        ) from error
    if not overlay.exists():
        partial = directory / f".{name}.partial"
        create_image(partial, None, backing=base.name, backing_format="qcow2")
        os.replace(partial, overlay)
    return DebianGuest(built.kernel, built.initrd, rootdisk.COMMAND_LINE, overlay, built.key)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the two are on different file systems."""
    try:
        os.link(source, target)
    except OSError:
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(source, partial)
        os.replace(partial, target)


def free_port(first: int = 2222) -> int:
    """A TCP port of this host's loopback that nobody listens on, from *first* upwards."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UsageError(f"the ports {first} to {first + 99} of 127.0.0.1 are all taken; give --net user,hostfwd=…")
