"""The default guest: a distribution's cloud kernel, and an initrd that is busybox and one script.

``build()`` makes it, or hands out what an earlier build left; the kernel's modules stay in its package,
where ``kernel_modules()`` finds them.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import stat
import subprocess
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from vmonty.base.errors import GuestError
from vmonty.guests import cpio, debian
from vmonty.guests.cache import Artefact, Shelf
from vmonty.guests.debian import Package
from vmonty.guests.progress import Progress, silent

# The smallest first. Debian has the cloud kernel; Ubuntu's small kernels have other names.
KERNELS = ("linux-image-cloud-amd64", "linux-image-kvm", "linux-image-virtual", "linux-image-generic")
BUSYBOX = "busybox-static"

# Raise it with each change of the initrd's contents: cached ones of another recipe are built again.
_RECIPE = "6"

# Drivers of virtio devices and what they need, in an order in which they can be loaded.
MODULES = (
    "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_mmio",
    "virtio_blk", "failover", "net_failover", "virtio_net", "virtio_console", "virtio-rng", "virtio_balloon",
    "af_packet",
)  # fmt: skip
# ACPI's power button, and the device file by which acpid hears of it.
BUTTON_MODULES = ("button", "evdev")

INIT = """\
#!/bin/busybox sh
# Process 1. Ends in power-off, whatever happens: without it the kernel would panic when this script ends.
export PATH=/bin HOME=/root PS1='\\w # '
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /root /run /tmp
mount -t devpts devpts /dev/pts
hostname vmonty
# Virtio devices, on PCI or behind memory-mapped registers, need their drivers.
if grep -qs 0x1af4 /sys/bus/pci/devices/*/vendor || ls -d /sys/bus/platform/devices/LNRO0005* >/dev/null 2>&1; then
  for module in @MODULES@; do
    if [ -e /lib/modules/$module.ko ]; then insmod /lib/modules/$module.ko; fi
  done
fi
if [ -e /sys/class/net/eth0 ]; then
  ip link set lo up
  ip link set eth0 up
  udhcpc -i eth0 -n -q -t 3 -T 1 -s /bin/udhcpc.script >/dev/null 2>&1 || echo 'vmonty: eth0 got no address' >&2
fi
if [ -e /lib/modules/button.ko ]; then
  insmod /lib/modules/button.ko
  if [ -e /lib/modules/evdev.ko ]; then insmod /lib/modules/evdev.ko; fi
  acpid -l /dev/null -p /run/acpid.pid
  # It writes its number when it listens: a press before that would be lost.
  for try in 1 2 3 4 5 6 7 8 9 10; do
    if [ -e /run/acpid.pid ]; then break; fi
    usleep 5000
  done
fi
cd /root
# With a display adapter there is a shell on the screen also, which has the keyboard.
read adapter 2>/dev/null </sys/class/vtconsole/vtcon0/name
case "$adapter" in
*VGA*)
  echo 'vmonty: userspace is up' >/dev/tty1
  while true; do setsid sh -c 'exec sh </dev/tty1 >/dev/tty1 2>&1'; sleep 1; done &
  ;;
esac
echo 'vmonty: userspace is up'
# A session of its own with a controlling terminal: job control and Ctrl-C work.
setsid cttyhack sh
poweroff -f
""".replace("@MODULES@", " ".join(MODULES))

# What acpid runs when somebody presses the power button.
POWER_BUTTON = "#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"
# What udhcpc calls with what it learnt.
UDHCPC = """\
#!/bin/busybox sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr flush dev $interface
ip addr add $ip/${mask:-24} dev $interface
[ -z "$router" ] || ip route add default via ${router%% *}
: >/etc/resolv.conf
for server in $dns; do echo nameserver $server >>/etc/resolv.conf; done
"""


@dataclass(frozen=True)
class Guest:
    """A guest that is ready to boot. *kernel_release* is what ``uname -r`` says in it."""

    kernel: Path
    initrd: Path
    kernel_release: str
    kernel_package: str
    kernel_version: str
    kernel_sha256: str
    initrd_sha256: str
    busybox_version: str


def build(*, force: bool = False, progress: Progress = silent, cache: Path | None = None) -> Guest:
    """The default guest, from the cache when it is there and sound; else fetched, built and cached.

    *force* asks apt again, so that a newer kernel is taken up. *cache* replaces vmonty's cache directory.
    Raises GuestError, one line with the remedy.
    """
    shelf = _shelf(cache)
    if not force and (guest := _cached(shelf)) is not None:
        return guest
    with shelf.lock(progress), _packages(cache).lock(progress):
        # Another builder may have finished while this one waited for the lock.
        if not force and (guest := _cached(shelf)) is not None:
            return guest
        packages = _packages(cache)
        kernel = _kernel_archive(packages, force, progress)
        if force or shelf.get(_KERNEL) is None:
            _build_kernel(shelf, *kernel, progress)
        busybox = _busybox_archive(packages, force, progress)
        modules = _find_modules(packages, *kernel, MODULES + BUTTON_MODULES, progress)
        _build_initrd(shelf, *busybox, modules, progress)
        for name in set(packages.names()) - {kernel[1].path.name, busybox[1].path.name}:
            packages.remove(name)
        guest = _cached(shelf)
    if guest is None:
        raise GuestError(f"the guest in {shelf.directory} changed while it was built; try again")
    return guest


def kernel_modules(names: Sequence[str], *, progress: Progress = silent, cache: Path | None = None) -> dict[str, bytes]:
    """Modules of the default guest's kernel by name (``kvm-amd``), as ELF objects.

    A name that is no module of that kernel is left out: it may be built in.
    """
    guest = build(progress=progress, cache=cache)
    packages = _packages(cache)
    with packages.lock(progress):
        package, archive = _kernel_archive(packages, False, progress)
        if package.name != guest.kernel_package or package.version != guest.kernel_version:
            raise GuestError("the guest's kernel package is gone: run `vmonty guest build busybox --force`")
        return _find_modules(packages, package, archive, names, progress)


_KERNEL = "vmlinuz"
_INITRD = "initrd.cpio"


def _shelf(cache: Path | None) -> Shelf:
    return Shelf("guests", "busybox", root=cache)


def _packages(cache: Path | None) -> Shelf:
    return Shelf("packages", root=cache)


def _cached(shelf: Shelf) -> Guest | None:
    kernel, initrd = shelf.get(_KERNEL), shelf.get(_INITRD)
    if kernel is None or initrd is None or initrd.notes.get("recipe") != _RECIPE:
        return None
    try:
        return Guest(
            kernel=kernel.path,
            initrd=initrd.path,
            kernel_release=kernel.notes["release"],
            kernel_package=kernel.notes["package"],
            kernel_version=kernel.notes["version"],
            kernel_sha256=kernel.sha256,
            initrd_sha256=initrd.sha256,
            busybox_version=initrd.notes["busybox"],
        )
    except KeyError:
        return None


def _kernel_archive(packages: Shelf, force: bool, progress: Progress) -> tuple[Package, Artefact]:
    if not force and (held := debian.held(packages, debian.is_kernel)) is not None:
        return held
    progress("looking for a kernel in apt's lists", 0, 0)
    package = debian.resolve_kernel(KERNELS)
    return package, debian.fetch(package, packages, progress)


def _busybox_archive(packages: Shelf, force: bool, progress: Progress) -> tuple[Package, Artefact]:
    if not force and (held := debian.held(packages, BUSYBOX.__eq__)) is not None:
        return held
    package = debian.require(BUSYBOX)
    return package, debian.fetch(package, packages, progress)


def _build_kernel(shelf: Shelf, package: Package, archive: Artefact, progress: Progress) -> None:
    progress(f"unpacking {package.name}", 0, 0)
    with closing(debian.members(archive.path, r"boot/vmlinuz-[^/]+")) as members:
        member = next(members, None)
        if member is None:
            raise GuestError(f"{package.name} holds no kernel (boot/vmlinuz-*)")
        release = member.name.removeprefix("boot/vmlinuz-")
        notes = {"release": release, "package": package.name, "version": package.version}
        with shelf.write(_KERNEL, notes) as out:
            member.copy_to(out)


def _build_initrd(
    shelf: Shelf, package: Package, archive: Artefact, modules: dict[str, bytes], progress: Progress
) -> None:
    progress("building the initrd", 0, 0)
    with closing(debian.members(archive.path, r"(usr/)?bin/busybox")) as members:
        member = next(members, None)
        if member is None:
            raise GuestError(f"{package.name} holds no bin/busybox")
        binary = io.BytesIO()
        member.copy_to(binary)
    notes = {"busybox": package.version, "recipe": _RECIPE}
    # Uncompressed: 2 MB are copied faster than any guest decompresses them.
    with shelf.write(_INITRD, notes) as out, cpio.Writer(out) as initrd:
        initrd.file("bin/busybox", binary.getvalue(), mode=0o755, mtime=member.mtime)
        initrd.file("init", INIT.encode(), mode=0o755, mtime=member.mtime)
        initrd.file("bin/udhcpc.script", UDHCPC.encode(), mode=0o755, mtime=member.mtime)
        initrd.file("etc/acpi/PWRF/00000080", POWER_BUTTON.encode(), mode=0o755, mtime=member.mtime)
        for name, contents in modules.items():
            initrd.file(f"lib/modules/{name}.ko", contents, mode=0o644, mtime=member.mtime)
        for directory in ("dev", "etc", "proc", "root", "sys", "tmp"):
            initrd.directory(directory, mtime=member.mtime)
        initrd.device("dev/console", stat.S_IFCHR, 5, 1)
        initrd.device("dev/null", stat.S_IFCHR, 1, 3, mode=0o666)


def _find_modules(
    packages: Shelf, package: Package, archive: Artefact, names: Sequence[str], progress: Progress
) -> dict[str, bytes]:
    progress(f"looking for modules in {package.name}", 0, 0)
    found = _modules_of(archive, names)
    # Ubuntu ships the modules beside the kernel, in a package of their own.
    extra = [name for name in package.depends if name.startswith("linux-modules-")]
    if len(found) < len(names) and extra:
        archive = debian.fetch(debian.require(extra[0]), packages, progress)
        found.update(_modules_of(archive, names))
    return found


def _modules_of(archive: Artefact, names: Sequence[str]) -> dict[str, bytes]:
    # The file of kvm_amd is kvm-amd.ko; users write either.
    wanted = {name.replace("_", "-"): name for name in names}
    files = "|".join(re.escape(name).replace(r"\-", "[-_]") for name in wanted)
    found: dict[str, bytes] = {}
    pattern = rf"(?:usr/)?lib/modules/[^/]+/kernel/(?:.*/)?(?:{files})\.ko(?:\.xz|\.zst)?"
    with closing(debian.members(archive.path, pattern)) as members:
        for member in members:
            contents = io.BytesIO()
            member.copy_to(contents)
            stem = os.path.basename(member.name).partition(".ko")[0]
            found[wanted[stem.replace("_", "-")]] = _decompress(member.name, contents.getvalue())
            if len(found) == len(wanted):
                break
    return found


def _decompress(name: str, data: bytes) -> bytes:
    try:
        if name.endswith(".xz"):
            return lzma.decompress(data)
        if name.endswith(".zst"):
            command = [debian.tool("zstd"), "--decompress", "--stdout", "--quiet"]
            return subprocess.run(command, input=data, capture_output=True, check=True).stdout
    except (lzma.LZMAError, subprocess.CalledProcessError) as error:
        raise GuestError(f"{name} cannot be decompressed: {error}") from error
    return data
