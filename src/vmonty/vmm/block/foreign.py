"""Images of other programs, read by way of qemu-img: a temporary qcow2 image is made of them.

What qemu-img is given must refer to nothing outside of its folder: a VMDK descriptor can name any file of the host as a
part of the disk. Source: VMware Virtual Disk Format 1.1, "The Descriptor File", "Hosted Sparse Extents".
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

from vmonty.base.errors import BlockError, DiskImageError
from vmonty.vmm.block.device import BlockDevice
from vmonty.vmm.block.file import HostFile
from vmonty.vmm.block.qcow2.open import open_disk, read_header

# Our names → qemu-img's, which are also those of the option ``format``.
FOREIGN = {"VMDK": "vmdk", "VDI": "vdi", "VHDX": "vhdx", "VHD": "vpc", "DMG": "dmg"}

COMMENT, SPARSE, OLD_SPARSE = b"#", b"KDMV", b"COWD"
SPARSE_HEADER = struct.Struct("<4sIIQQQ")  # up to where the descriptor is
SECTOR = 512
MOST_DESCRIPTOR = 1 << 20
# Where readers look for a sparse file's parent, whatever its header says.
PARENT_AT, PARENT_BYTES = SECTOR, 20 * SECTOR
# Wider than the format: what any reader of it could take for a part.
_EXTENT = re.compile(rb'^\s*(?:RW|RDONLY|NOACCESS)\b[^"]*"([^"\r\n]*)', re.MULTILINE | re.IGNORECASE)
_PARENT = re.compile(rb"parentFileNameHint", re.IGNORECASE)


def open_foreign(path: Path, kind: str) -> BlockDevice:
    """The image at *path*, of *kind* (a key of FOREIGN), read-only. Raises DiskImageError with one line."""
    if kind == "VMDK":
        _check_vmdk(path)
    if (program := shutil.which("qemu-img")) is None:
        raise DiskImageError(f"{path} is a {kind} image, which qemu-img reads for us: apt-get install qemu-utils")
    number, name = tempfile.mkstemp(prefix="vmonty-", suffix=".qcow2")
    try:
        words = [program, "convert", "-O", "qcow2", _alone(path, kind), name]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("qemu-img: ")
            raise DiskImageError(f"{path} is no {kind} image that qemu-img can read: {said or 'it gave no reason'}")
        # qemu-img may have put another file there.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DiskImageError(f"{path} cannot be converted: {error.strerror}") from error
    finally:
        os.close(number)
        os.unlink(name)
    file = HostFile(Path(f"{path}, converted"), writable=False, lock=False, fd=fd, durable=False)
    try:
        return open_disk(file, read_header(file), None)
    except BaseException:
        file.close()
        raise


def _alone(path: Path, kind: str) -> str:
    """The image for qemu-img: no name can mean a protocol in it, such as nbd:, and no parent is opened."""
    file = {"driver": "host_device" if path.is_block_device() else "file", "filename": str(path.absolute())}
    try:
        file["filename"].encode()
    except UnicodeEncodeError as error:
        raise DiskImageError(f"{path} has a name that is not UTF-8, which qemu-img needs: rename it") from error
    return "json:" + json.dumps({"driver": FOREIGN[kind], "backing": None, "file": file})


def _check_vmdk(path: Path) -> None:
    """Raise DiskImageError for an image with parts outside of its folder, or with a parent."""
    folder = Path(os.path.realpath(path)).parent
    for part in _parts(path, path):
        name = os.fsdecode(part)
        place = folder / name
        if name != os.path.basename(name) or ":" in name or Path(os.path.realpath(place)).parent != folder:
            raise DiskImageError(f"{path} names {name!r} as a part of its disk, which is not beside it")
        if place.exists() and not place.samefile(path) and _parts(place, path):
            raise DiskImageError(f"{path} has a part, {name!r}, that consists of parts itself")


def _parts(path: Path, whole: Path) -> list[bytes]:
    """The files that the descriptor in *path* names. Raises DiskImageError, naming *whole*."""
    file = HostFile(path, writable=False, lock=False)
    try:
        head = file.read(0, SPARSE_HEADER.size)
        descriptor = _descriptor(file, head)
        parents = file.read(PARENT_AT, PARENT_BYTES) if head.startswith((SPARSE, OLD_SPARSE)) else b""
    except BlockError as error:
        raise DiskImageError(str(error)) from error
    finally:
        file.close()
    if _PARENT.search(descriptor) or _PARENT.search(parents):
        raise DiskImageError(f"{whole} has a parent image, and only whole VMDK images are supported")
    return _EXTENT.findall(descriptor)


def _descriptor(file: HostFile, head: bytes) -> bytes:
    if head.startswith(COMMENT):
        # In it "# Disk DescriptorFile" need not be the first comment.
        return file.read(0, min(file.length(), MOST_DESCRIPTOR)).partition(b"\0")[0]
    if not head.startswith(SPARSE) or file.length() < SPARSE_HEADER.size:
        return b""
    *_, offset = SPARSE_HEADER.unpack(head)
    # As a reader in C has it, modulo 2^64; and not as far as the header says: readers go on to the end of the text.
    at = offset * SECTOR & (1 << 64) - 1
    return file.read(at, min(file.length() - at, MOST_DESCRIPTOR)).partition(b"\0")[0] if at < file.length() else b""
