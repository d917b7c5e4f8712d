"""``vmonty guest build debian``: a Debian root disk, its kernel and initrd, made by mmdebstrap from the host's own apt.

Nothing is installed on the host, mounted, or named here: suites and mirrors are those of the host's apt configuration.
As root it works directly; without privileges mmdebstrap takes a user namespace or fakechroot, and the file system is
made under the same disguise.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmonty.base.errors import GuestError
from vmonty.guests.cache import Shelf
from vmonty.guests.progress import Progress, silent
from vmonty.guests.sshkey import user_key

# Raise it with each change of what is built: cached ones of another recipe are built again.
_RECIPE = "2"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
PACKAGES = (
    "systemd-sysv", "systemd-resolved", "dbus", "udev", "openssh-server", KERNEL_PACKAGE,
    "iproute2", "iputils-ping", "netbase", "ca-certificates", "wget",
)  # fmt: skip
COMPILER = ("gcc", "libc6-dev", "make")
ROOT_LABEL = "debian-root"
_GRACE_S = 10
# What the initrd needs to find the disk on any of our machines; the rest is loaded from there.
MODULES = ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "ahci", "sd_mod", "nvme", "ext4")
MASKED = (
    "e2scrub_reap.service", "e2scrub_all.timer", "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer",
)  # fmt: skip
COMMAND_LINE = f"root=LABEL={ROOT_LABEL} rw console=ttyS0 quiet"

NETWORK = "[Match]\nType=ether\n\n[Network]\nDHCP=yes\n\n[DHCPv4]\nClientIdentifier=mac\n"
# Local access to the console is that of the disk's owner: root needs no password there. sshd takes keys only.
SETUP = r"""
set -e
cd "$1"
echo vmonty > etc/hostname
printf '127.0.0.1 localhost\n127.0.1.1 vmonty\n::1 localhost ip6-localhost\n' > etc/hosts
printf 'LABEL=LABEL_HERE / ext4 errors=remount-ro 0 1\n' > etc/fstab
: > etc/machine-id
mkdir -p root/.ssh etc/systemd/network
chmod 700 root/.ssh
cp "$VMONTY_KEY" root/.ssh/authorized_keys
chown 0:0 root/.ssh/authorized_keys
chmod 600 root/.ssh/authorized_keys
cp "$VMONTY_NETWORK" etc/systemd/network/20-wired.network
chmod 644 etc/systemd/network/20-wired.network
chroot . passwd -d root > /dev/null
# What a virtual machine of its user's does not need at its start, or behind its back.
chroot . systemctl mask $VMONTY_MASKED > /dev/null 2>&1
chroot . systemctl enable systemd-networkd systemd-resolved ssh serial-getty@ttyS0 > /dev/null 2>&1
for module in $VMONTY_MODULES; do echo "$module"; done >> etc/initramfs-tools/modules
chroot . update-initramfs -u > /dev/null
rm -f etc/resolv.conf
ln -s ../run/systemd/resolve/stub-resolv.conf etc/resolv.conf
""".replace("LABEL_HERE", ROOT_LABEL)

Pack = Callable[[Path, Path, Progress], None]
"""Make the qcow2 image *second* from the raw image *first*."""


@dataclass(frozen=True)
class Disk:
    """A root disk that is ready to boot: its base image, which stays as it is, and what boots it."""

    disk: Path
    kernel: Path
    initrd: Path
    kernel_release: str
    suite: str
    key: Path
    size: int
    sha256: str


def build(
    pack: Pack,
    *,
    size: int = 8 << 30,
    compiler: bool = False,
    force: bool = False,
    progress: Progress = silent,
    cache: Path | None = None,
) -> Disk:
    """The Debian guest, from the cache when it is there, sound and of the same kind; else built.

    *size* is the disk's, in bytes; its image takes what is in it. *compiler* adds gcc. Raises GuestError, one line with
    the remedy.
    """
    key = user_key(cache)
    public = key.with_name(key.name + ".pub").read_bytes()
    recipe = f"{_RECIPE} {size} {int(compiler)} {hashlib.sha256(public).hexdigest()[:16]}"
    shelf = Shelf("guests", "debian", root=cache)
    if not force and (made := _cached(shelf, recipe, key)) is not None:
        return made
    with shelf.lock(progress):
        if not force and (made := _cached(shelf, recipe, key)) is not None:
            return made
        suite, sources = host_sources()
        tools()
        with tempfile.TemporaryDirectory(prefix=".build-", dir=shelf.directory) as name:
            work = Path(name)
            tar = _bootstrap(work, sources, PACKAGES + (COMPILER if compiler else ()), public, progress)
            notes = {"recipe": recipe, "suite": suite, "size": str(size)}
            release = _boot_files(shelf, tar, notes, progress)
            raw = _file_system(work, tar, size, progress)
            tar.unlink()
            packed = work / "disk.qcow2"
            pack(raw, packed, progress)
            progress("storing the disk", 0, 0)
            with packed.open("rb") as contents, shelf.write("disk.qcow2", notes | {"release": release}) as out:
                shutil.copyfileobj(contents, out, 1 << 20)
        made = _cached(shelf, recipe, key)
    if made is None:
        raise GuestError(f"the guest in {shelf.directory} changed while it was built; try again")
    return made


def cached(cache: Path | None = None) -> Disk | None:
    """The Debian guest that was built last, whatever its size and whether with a compiler; None when there is none."""
    return _cached(Shelf("guests", "debian", root=cache), None, user_key(cache))


def _cached(shelf: Shelf, recipe: str | None, key: Path) -> Disk | None:
    disk, kernel, initrd = shelf.get("disk.qcow2"), shelf.get("vmlinuz"), shelf.get("initrd.img")
    if disk is None or kernel is None or initrd is None:
        return None
    notes = disk.notes
    if any(item.notes.get("recipe") != (recipe or notes.get("recipe")) for item in (disk, kernel, initrd)):
        return None
    return Disk(
        disk.path, kernel.path, initrd.path, notes["release"], notes["suite"], key, int(notes["size"]), disk.sha256
    )


def host_sources() -> tuple[str, str]:
    """(suite, sources.list) of Debian in the host's apt configuration. Raises GuestError when it has none."""
    apt_get = shutil.which("apt-get")
    if apt_get is None:
        raise GuestError("apt-get is not on this host, and the Debian guest is made with it; boot a disk of your own")
    form = "$(CODENAME) deb $(REPO_URI) $(CODENAME) $(COMPONENT)"
    command = [apt_get, "indextargets", "--format", form, "Created-By: Packages", "Origin: Debian"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = sorted({line for line in done.stdout.splitlines() if " deb " in line})
    suites = [line.split()[0] for line in lines]
    # The release itself, not its updates nor what is tested for the next one.
    base = sorted({suite for suite in suites if suite.isalpha() and suite not in ("sid", "experimental")})
    if not base:
        raise GuestError(
            "apt has no lists of a Debian release here; run `apt-get update` as root on a Debian host, or boot a disk"
            " of your own"
        )
    suite = "bookworm" if "bookworm" in base else base[0]
    wanted = [
        line.partition(" ")[2] for line in lines if re.fullmatch(rf"{suite}(-updates|-security)?", line.split()[0])
    ]
    return suite, "".join(f"{line}\n" for line in wanted)


def tools() -> None:
    """Raise GuestError, naming the packages, when a program that the build needs is missing."""
    needed = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "tar": "tar"}
    missing = {package for program, package in needed.items() if _which(program) is None}
    if os.geteuid() and not _namespace():
        # mmdebstrap's other way without privileges needs both.
        missing |= {program for program in ("fakechroot", "fakeroot") if _which(program) is None}
    if missing:
        instead = "" if "fakechroot" not in missing else " (or uidmap, with a range of yours in /etc/subuid)"
        raise GuestError(
            f"building the Debian guest needs more programs: apt-get install {' '.join(sorted(missing))}{instead}"
        )


def _mode() -> str:
    """How mmdebstrap becomes root of what it makes; fakeroot makes the file system where fakechroot made its files."""
    if os.geteuid() == 0:
        return "root"
    return "unshare" if _namespace() else "fakechroot"


def _which(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def _disguise() -> list[str]:
    """What a command is run under so that it may own files as anybody: nothing for root."""
    if os.geteuid() == 0:
        return []
    return _namespace() or ["fakeroot"]


def _namespace() -> list[str]:
    """The command that runs another as root of a user namespace with all our subordinate users; [] if it cannot."""
    wrapper = ["unshare", "--map-root-user", "--map-auto"]
    if shutil.which("unshare") is None or shutil.which("newuidmap") is None:
        return []
    return wrapper if subprocess.run([*wrapper, "true"], capture_output=True, check=False).returncode == 0 else []


def _apt_options() -> list[str]:
    """The host's proxies, which mmdebstrap's apt does not see otherwise."""
    config = shutil.which("apt-config")
    if config is None:
        return []
    text = subprocess.run([config, "dump", "Acquire"], capture_output=True, text=True, check=False).stdout
    lines = [line.strip() for line in text.splitlines()]
    return [f"--aptopt={line}" for line in lines if re.match(r"Acquire::https?::(Proxy|.*::Proxy)\b.*\"..*\";$", line)]


def _bootstrap(work: Path, sources: str, packages: tuple[str, ...], public: bytes, progress: Progress) -> Path:
    """Run mmdebstrap; the tar archive of the whole root file system."""
    key, network, setup, tar = work / "key.pub", work / "network", work / "setup.sh", work / "root.tar"
    key.write_bytes(public)
    network.write_text(NETWORK)
    setup.write_text(SETUP)
    hook = 'mkdir -p "$1/etc/initramfs-tools/conf.d" && echo MODULES=list > "$1/etc/initramfs-tools/conf.d/vmonty"'
    command = [
        "mmdebstrap", f"--mode={_mode()}", "--variant=minbase",
        f"--include={','.join(packages)}", *_apt_options(),
        f"--essential-hook={hook}", f'--customize-hook=sh {setup} "$1"',
        "", str(tar), "-",
    ]  # fmt: skip
    environment = {
        **os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive",
        "VMONTY_KEY": str(key), "VMONTY_NETWORK": str(network), "VMONTY_MODULES": " ".join(MODULES),
        "VMONTY_MASKED": " ".join(MASKED),
    }  # fmt: skip
    # A build as another user, in a namespace, reads these.
    work.chmod(0o755)
    log: list[str] = []
    with _running(command, environment, sources) as lines:
        for line in lines:
            log.append(line.strip())
            if line.startswith("I: ") and not line.startswith("I: main"):
                progress(f"Debian: {line[3:].strip().removesuffix('...')[:60]}", 0, 0)
    if not tar.exists() or tar.stat().st_size == 0 or any(line.startswith("E: ") for line in log):
        errors = [line.removeprefix("E: ") for line in log if line.startswith("E: ")]
        raise GuestError(f"mmdebstrap failed: {(errors or log or ['no reason given'])[0]}; check the network and apt")
    return tar


@contextmanager
def _running(command: list[str], environment: dict[str, str], text: str) -> Iterator[Iterator[str]]:
    """The lines that a program prints on standard error, while it runs with *text* as its input."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=environment, text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            process.stdin.write(text)
            process.stdin.close()
            yield iter(process.stderr)
        except BaseException:
            _end(process)
            raise


def _end(process: subprocess.Popen[str]) -> None:
    """End a program that was interrupted, and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _boot_files(shelf: Shelf, tar: Path, notes: dict[str, str], progress: Progress) -> str:
    """Put the kernel and the initrd on the shelf; the kernel's release."""
    progress("taking kernel and initrd", 0, 0)
    release = ""
    found = set()
    with tarfile.open(tar) as archive:
        for member in archive:
            match = re.fullmatch(r"\./boot/(vmlinuz|initrd\.img)-(.+)", member.name)
            if match is None or not member.isreg():
                continue
            contents = archive.extractfile(member)
            assert contents is not None
            release = match[2]
            with shelf.write(match[1], notes | {"release": release}) as out:
                shutil.copyfileobj(contents, out)
            found.add(match[1])
            if len(found) == 2:
                return release
    raise GuestError(f"the package {KERNEL_PACKAGE} brought no kernel or no initrd")


def _file_system(work: Path, tar: Path, size: int, progress: Progress) -> Path:
    """Make an ext4 file system of *size* bytes with what is in *tar*, without mounting it."""
    progress("making the file system", 0, 0)
    raw, root = work / "disk.raw", work / "root"
    root.mkdir()
    with raw.open("wb") as file:
        file.truncate(size)
    mke2fs = _which("mke2fs")
    # Nobody makes device files in a user namespace, and the guest's /dev is the kernel's devtmpfs. What lies in the
    # directory may belong to users that only the namespace may act for: so it goes before that ends.
    script = (
        "trap 'rm -rf \"$2\"' EXIT;"
        ' tar -x --numeric-owner -p --exclude="./dev/*" -f "$1" -C "$2" && chmod 755 "$2" &&'
        f' "{mke2fs}" -q -F -t ext4 -L {ROOT_LABEL} -E lazy_itable_init=1,lazy_journal_init=1 -d "$2" "$3"'
    )
    command = [*_disguise(), "sh", "-c", script, "sh", str(tar), str(root), str(raw)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise GuestError(f"the guest's file system cannot be made: {reason}")
    return raw
