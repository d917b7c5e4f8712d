"""Debian's stock kernels, 64-bit and 32-bit with PAE, with an initrd of ours: busybox of the same architecture.

Unlike the default guest's they are made for every PC: self-tests, mitigations, and drivers that look for hardware.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

import vmonty
from vmonty.base.cachedir import cache_root
from vmonty.base.errors import GuestError
from vmonty.guests import cpio, debian

from .apt_root import DEBS, AptRoot

LIMIT_S = 300.0
KERNELS = {"amd64": "linux-image-amd64", "i386": "linux-image-686-pae"}
MACHINES = {"amd64": "x86_64", "i386": "i686"}
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
echo "machine $(uname -m) processors $(grep -c ^processor /proc/cpuinfo) release $(uname -r)"
awk 'BEGIN { for (n = 1; n <= 200000; n++) sum += n * n; printf "sum %.0f\\n", sum }'
seq 1 30000 | sort -rn | md5sum
for n in 1 2 3 4; do (seq 1 5000 | sha1sum > /$n) & done; wait; cat /1 /2 /3 /4 | uniq
poweroff -f
"""


class Guest(NamedTuple):
    """What is booted."""

    kernel: Path
    initrd: Path
    release: str


def codename() -> str:
    found = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else ""


@pytest.fixture(scope="module", params=sorted(KERNELS))
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Guest]:
    architecture = request.param
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this host: these kernels are Debian's")
    try:
        return architecture, fetched(architecture, tmp_path_factory.mktemp(architecture))
    except (GuestError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"apt cannot fetch Debian's kernel for {architecture} here: {error}")


def fetched(architecture: str, folder: Path) -> Guest:
    """The kernel of the day, and an initrd with busybox. Raises GuestError."""
    apt = AptRoot(cache_root() / f"apt-{architecture}", codename(), architecture)
    index = {stanza["Package"]: stanza for stanza in apt.index(DEBS)}
    try:
        names = [name for clause in index[KERNELS[architecture]].names("Depends") for name in clause]
        kernel_package = index[next(name for name in names if name.startswith("linux-image-"))]
        wanted = [kernel_package, index["busybox-static"]]
    except (KeyError, StopIteration):
        raise GuestError(f"{codename()} has no {KERNELS[architecture]}") from None
    kernel_archive, busybox_archive = apt.fetch(wanted).values()
    kernel, initrd = folder / "vmlinuz", folder / "initrd"
    with kernel.open("wb") as out:
        for member in debian.members(kernel_archive, r"boot/vmlinuz-[^/]+"):
            release = os.path.basename(member.name).removeprefix("vmlinuz-")
            member.copy_to(out)
    busybox = folder / "busybox"
    with busybox.open("wb") as out:
        for member in debian.members(busybox_archive, r"(usr/)?bin/busybox"):
            member.copy_to(out)
    with initrd.open("wb") as out, cpio.Writer(out) as archive:
        archive.directory("proc")
        archive.directory("dev")
        archive.file("bin/busybox", busybox.read_bytes(), mode=0o755)
        archive.file("init", INIT.encode(), mode=0o755)
    return Guest(kernel, initrd, release)


@pytest.mark.parametrize("cpus", [1, 2])
def test_to_userspace(guest: tuple[str, Guest], cpus: int) -> None:
    architecture, files = guest
    sorted_digest = hashlib.md5(lines(range(30000, 0, -1))).hexdigest()
    hashed = hashlib.sha1(lines(range(1, 5001))).hexdigest()
    with vmonty.VM(
        kernel=files.kernel, initrd=files.initrd, cpus=cpus, memory="512M", accel="soft",
        append="console=ttyS0 panic=-1", reboot=False,
    ) as machine:  # fmt: skip
        machine.start()
        machine.console.expect(
            f"machine {MACHINES[architecture]} processors {cpus} release {files.release}", timeout=LIMIT_S
        )
        machine.console.expect("sum 2666686666700000", timeout=LIMIT_S)
        machine.console.expect(sorted_digest, timeout=LIMIT_S)
        machine.console.expect(hashed, timeout=LIMIT_S)
        outcome = machine.wait(LIMIT_S)
    assert outcome is not None
    assert outcome.ending.value == "power-off", machine.console.text[-2000:]


def lines(numbers: Iterable[int]) -> bytes:
    """As seq writes them."""
    return "".join(f"{n}\n" for n in numbers).encode()
