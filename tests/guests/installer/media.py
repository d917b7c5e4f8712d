"""The installer's CD, its answers, and the steps of its menu that we bring.

The disk and the boot loader are set up by two packages of ours in place of partman and grub-installer, of which not
every mirror has all parts. Network, mirror, components, base system and kernel are the installer's own.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

from ..apt_root import DEBS, UDEBS, AptRoot, Stanza, closure
from .mirror import Mirror

HERE = Path(__file__).parent
IMAGES = Path("/usr/lib/debian-installer/images/12/amd64/text")
FOLDER = IMAGES / "debian-installer/amd64"
# What the installed system has beside packages of priority "required" and "important".
PACKAGES = (
    "linux-image-amd64", "grub-pc", "initramfs-tools", "busybox", "zstd", "locales", "console-setup", "usr-is-merged",
)  # fmt: skip
TOOLS = ("debootstrap", "e2fsprogs", "fdisk", "libext2fs2", "libcom-err2", "libfdisk1", "libsmartcols1", "libreadline8")
WANTED = ("usr/sbin/debootstrap", "usr/share/debootstrap/*", "sbin/mke2fs", "etc/mke2fs.conf", "sbin/sfdisk")
# Of the installer: drivers of the disks, and the two packages that install the base system.
MODULES = ("scsi-modules", "sata-modules", "ext4-modules")
OF_BASE = ("base-installer", "bootstrap-base")
HOST, HOSTNAME = "10.0.2.2", "montague"

# The first entry is not the one that is wanted: a key has to choose.
MENU = """\
set timeout=-1
menuentry "Do not install" {{ halt }}
menuentry "Install Debian" --hotkey=i {{
    linux /linux {line}
    initrd /initrd.gz
}}
"""
PRESEED = """\
d-i debian-installer/allow_unauthenticated boolean true
d-i mirror/country string manual
d-i mirror/protocol string http
d-i mirror/http/directory string /debian
d-i mirror/http/proxy string
d-i mirror/codename string {codename}
d-i mirror/suite string {codename}
d-i mirror/udeb/suite string {codename}
d-i base-installer/install-recommends boolean false
d-i base-installer/kernel/image string linux-image-amd64
d-i base-installer/initramfs-tools/driver-policy select dep
"""


def command_line(port: int, log_port: int) -> str:
    """The installer's: text mode on the screen, its log to us, one question left for the keys to answer."""
    return (
        f"nomodeset fb=false priority=high locale=en_US.UTF-8 keymap=us hostname={HOSTNAME} netcfg/get_domain=test "
        f"url=http://{HOST}:{port}/preseed.cfg log_host={HOST} log_port={log_port} DEBIAN_FRONTEND=newt --- quiet"
    )


def udeb(work: Path, name: str, fields: str, postinst: Path, root: Path) -> Path:
    """A package for the installer's menu, of the files under *root*."""
    control = root / "DEBIAN"
    control.mkdir(parents=True)
    (control / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: tests <root@localhost>\n"
        f"Section: debian-installer\nPriority: standard\n{fields}Description: {name.replace('-', ' ')}\n"
    )
    shutil.copy(postinst, control / "postinst")
    (control / "postinst").chmod(0o755)
    made = work / f"{name}_1_all.udeb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zxz", "--build", root, made], check=True, capture_output=True)
    return made


def tools(apt: AptRoot, root: Path) -> None:
    """Put debootstrap and what makes a file system under *root*, where the installer's linker looks."""
    files = apt.fetch([stanza for stanza in apt.index(DEBS) if stanza["Package"] in TOOLS])
    for archive in files.values():
        unpacked = root.with_name(archive.name)
        subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
        for pattern in (*WANTED, "**/lib*.so.*"):
            for source in unpacked.glob(pattern):
                at = source.relative_to(unpacked)
                target = root / "usr/lib" / at.name if ".so." in at.name else root / at
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, symlinks=True)
                else:
                    shutil.copy2(source, target, follow_symlinks=False)


def described(archive: Path) -> tuple[Stanza, str]:
    """The index's stanza for a package of ours, and its path in the archive."""
    control = subprocess.run(["dpkg-deb", "-f", archive], check=True, capture_output=True, text=True).stdout.strip()
    data, path = archive.read_bytes(), f"pool/{archive.name}"
    head, _, description = control.partition("Description:")
    rest = f"Filename: {path}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
    return Stanza(f"{head}{rest}Description:{description}"), path


def fill(mirror: Mirror, apt: AptRoot, work: Path, codename: str, version: str) -> None:
    """The mirror's archive: modules of the installer's kernel, its base installer, our steps, and all of *PACKAGES*."""
    ours = work / "disk"
    tools(apt, ours)
    made = [
        udeb(
            work, "test-disk",
            "Installer-Menu-Item: 4200\nDepends: scsi-modules, sata-modules, ext4-modules\n"
            "Provides: mounted-partitions, created-fstab, debootstrap-udeb, di-utils-mapdevfs\n",
            HERE / "disk.sh", ours,
        ),
        udeb(
            work, "test-boot-loader", "Installer-Menu-Item: 7400\nDepends: installed-base\n",
            HERE / "boot_loader.sh", work / "boot",
        ),
    ]  # fmt: skip
    release = kernel_release()
    modules = [stanza for stanza in apt.index(UDEBS) if stanza["Kernel-Version"] == release]
    udebs = closure(modules, [f"{name}-{release}-di" for name in MODULES])
    udebs += [stanza for stanza in apt.index(UDEBS) if stanza["Package"] in OF_BASE]
    index = apt.index(DEBS)
    base = [stanza["Package"] for stanza in index if stanza["Priority"] in ("required", "important")]
    debs = apt.solve([*base, *PACKAGES])
    files = apt.fetch(udebs) | apt.fetch(debs)
    for archive in made:
        stanza, path = described(archive)
        udebs.append(stanza)
        files[path] = archive
    mirror.add(codename, version, {DEBS: debs, UDEBS: udebs}, files)


def kernel_release() -> str:
    """What the installer's kernel calls itself."""
    (found,) = set(re.findall(rb"\d+\.\d+\.\d+-\d+-amd64(?= \()", (FOLDER / "linux").read_bytes()))
    return os.fsdecode(found)


def make_cd(path: Path, line: str, work: Path) -> None:
    """A CD with the installer's kernel and initrd, and GRUB with a menu."""
    root = work / "cd"
    (root / "boot/grub").mkdir(parents=True)
    for name in ("linux", "initrd.gz"):
        shutil.copy(FOLDER / name, root)
    (root / "boot/grub/grub.cfg").write_text(MENU.format(line=line))
    subprocess.run(["grub-mkrescue", "-o", path, root], check=True, capture_output=True)
