"""A host with a fake apt: packages are made here, and nothing leaves this machine."""

from __future__ import annotations

import hashlib
import io
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

KERNEL = b"a kernel that no one will boot\n" * 4096
BUSYBOX = b"\x7fELF a busybox that no one will run\n" * 64
MODULE = b"\x7fELF a module"


class FakeApt:
    """Programs named as apt's, first in PATH, that know only what ``add`` was told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.pool = directory / "pool"
        self.lists = directory / "lists"
        self.log = directory / "log"
        for made in (self.bin, self.pool, self.lists):
            made.mkdir()
        self.lists.joinpath("INDEX").write_text("one list\n")
        self._program("apt-cache", f'for last; do :; done\ncat "{self.lists}/$last" 2>/dev/null\n')
        self._program("apt-get", self._download(f'cp "{self.pool}/$name.deb" .'))

    def add(self, name: str, files: Mapping[str, bytes], *, version: str = "1:2.0-1", depends: str = "") -> None:
        """Offer a package that holds *files*."""
        root = self.directory / "build" / name
        shutil.rmtree(root, ignore_errors=True)
        control = root / "DEBIAN" / "control"
        for path, data in files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        control.parent.mkdir(parents=True, exist_ok=True)
        fields = f"Package: {name}\nVersion: {version}\nArchitecture: amd64\n"
        fields += f"Depends: {depends}\n" if depends else ""
        control.write_text(fields + "Maintainer: nobody <nobody@localhost>\nDescription: made for a test\n")
        archive = self.pool / f"{name}.deb"
        command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(archive)]
        subprocess.run(command, check=True, capture_output=True)
        data = archive.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        self.lists.joinpath(name).write_text(f"{fields}Size: {len(data)}\nSHA256: {digest}\nDescription: x\n\n")

    def cut_short(self, *, fail: bool) -> None:
        """From now on downloads arrive by half; *fail* says whether apt-get notices."""
        body = f'head -c 500 "{self.pool}/$name.deb" > "$name.deb"'
        if fail:
            body += "; echo 'E: Failed to fetch it  Connection reset' >&2; exit 100"
        self._program("apt-get", self._download(body))

    def go_offline(self) -> None:
        """From now on every call of apt is an error of the test."""
        for name in ("apt-cache", "apt-get"):
            self._program(name, f"echo {name} >> {self.log}; exit 99\n")

    def forget_lists(self) -> None:
        """As on a machine where ``apt-get update`` was never run."""
        for path in self.lists.iterdir():
            path.unlink()

    def _download(self, body: str) -> str:
        return (
            f'if [ "$1" = indextargets ]; then cat "{self.lists}/INDEX" 2>/dev/null; exit 0; fi\n'
            f"for last; do :; done\nname=${{last%%=*}}\n{body}\n"
        )

    def _program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text("#!/bin/sh\n" + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    """A fake apt that offers a cloud kernel and busybox, and an empty cache directory."""
    if not Path("/usr/bin/dpkg-deb").exists():
        pytest.skip("dpkg-deb is not on this host: install dpkg")
    directory = tmp_path / "apt"
    directory.mkdir()
    fake = FakeApt(directory)
    kernel = "linux-image-9.9.0-1-cloud-amd64"
    modules = "lib/modules/9.9.0-1-cloud-amd64/kernel"
    files = {
        "boot/vmlinuz-9.9.0-1-cloud-amd64": KERNEL,
        f"{modules}/arch/x86/kvm/kvm-amd.ko": MODULE,
        f"{modules}/virt/lib/irqbypass.ko": MODULE,
    }
    fake.add("linux-image-cloud-amd64", {}, depends=f"{kernel} (= 1:2.0-1)")
    fake.add(kernel, files, depends="kmod, linux-base (>= 4.3~) | linux-nothing")
    fake.add("busybox-static", {"bin/busybox": BUSYBOX})
    monkeypatch.setenv("PATH", str(fake.bin), prepend=":")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A tar archive in memory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()
