"""The default guest: built from a fake apt in every kind of weather, and once from the real one."""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from vmonty.base.cachedir import cache_root
from vmonty.base.errors import GuestError
from vmonty.cli.guest import guest as guest_command
from vmonty.guests import busybox, cpio, debian
from vmonty.guests.cache import sha256

from .conftest import BUSYBOX, KERNEL, MODULE, FakeApt, tar_of


def cached_files() -> set[str]:
    root = cache_root()
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.usefixtures("apt")
def test_build() -> None:
    phases: list[str] = []
    guest = busybox.build(progress=lambda phase, done, total: phases.append(phase))
    assert guest.kernel.read_bytes() == KERNEL
    assert guest.kernel_release == "9.9.0-1-cloud-amd64"
    assert guest.kernel_package == "linux-image-9.9.0-1-cloud-amd64"
    assert guest.busybox_version == "1:2.0-1"
    assert guest.initrd_sha256 == sha256(guest.initrd)
    with guest.initrd.open("rb") as source:
        entries = {entry.name: entry for entry in cpio.read(source)}
    assert entries["bin/busybox"].data == BUSYBOX
    assert entries["init"].data.startswith(b"#!/bin/busybox sh\n")
    assert entries["init"].mode == stat.S_IFREG | 0o755
    assert {"proc", "sys", "dev", "dev/console"} <= set(entries)
    assert any(phase.startswith("downloading linux-image-9.9.0") for phase in phases)


def test_offline_once_cached(apt: FakeApt) -> None:
    first = busybox.build()
    apt.go_offline()
    assert busybox.build() == first
    assert busybox.kernel_modules(["kvm_amd", "nonesuch"]) == {"kvm_amd": MODULE}
    assert not apt.log.exists()


def test_damaged_artefacts_are_redone_without_the_network(apt: FakeApt) -> None:
    first = busybox.build()
    apt.go_offline()
    first.kernel.write_bytes(KERNEL[:-1] + b"?")
    first.initrd.unlink()
    assert busybox.build() == first
    assert first.kernel.read_bytes() == KERNEL


@pytest.mark.usefixtures("apt")
def test_damaged_package_is_fetched_again() -> None:
    first = busybox.build()
    for path in [*first.kernel.parent.glob("vmlinuz"), *(cache_root() / "packages").glob("*.deb")]:
        path.write_bytes(path.read_bytes()[:100])
    assert busybox.build() == first


def test_force_takes_up_a_newer_kernel(apt: FakeApt) -> None:
    busybox.build()
    newer = "linux-image-9.9.0-2-cloud-amd64"
    apt.add("linux-image-cloud-amd64", {}, depends=newer, version="3")
    apt.add(newer, {"boot/vmlinuz-9.9.0-2-cloud-amd64": b"newer"}, version="3")
    assert busybox.build().kernel_release == "9.9.0-1-cloud-amd64"
    assert busybox.build(force=True).kernel_release == "9.9.0-2-cloud-amd64"
    assert sorted(path for path in cached_files() if "linux-image" in path) == [f"packages/{newer}_3_amd64.deb"]


def test_ubuntus_kernel_and_modules(apt: FakeApt) -> None:
    for name in list(apt.lists.glob("linux-image*")):
        name.unlink()
    release = "6.8.0-31-generic"
    module = f"lib/modules/{release}/kernel/arch/x86/kvm/kvm-amd.ko"
    apt.add("linux-image-virtual", {}, depends=f"linux-image-{release}, intel-microcode")
    apt.add(f"linux-image-{release}", {f"boot/vmlinuz-{release}": KERNEL}, depends=f"kmod, linux-modules-{release}")
    apt.add(f"linux-modules-{release}", {module: MODULE})
    assert busybox.build().kernel_release == release
    assert busybox.kernel_modules(["kvm-amd"]) == {"kvm-amd": MODULE}


@pytest.mark.parametrize(("fail", "message"), [(True, "Connection reset; check the network"), (False, "damaged")])
def test_interrupted_download_is_never_kept(apt: FakeApt, fail: bool, message: str) -> None:
    apt.cut_short(fail=fail)
    with pytest.raises(GuestError, match=message) as caught:
        busybox.build()
    assert "\n" not in str(caught.value)
    assert cached_files() == set()


@pytest.mark.usefixtures("apt")
def test_ctrl_c_leaves_nothing() -> None:
    def interrupt(phase: str, done: int, total: int, /) -> None:
        if phase.startswith("downloading busybox"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        busybox.build(progress=interrupt)
    kept = cached_files()
    assert not any("busybox-static" in path or path.endswith((".partial", "initrd.cpio")) for path in kept)
    assert busybox.build().kernel.read_bytes() == KERNEL


def test_no_lists(apt: FakeApt) -> None:
    apt.forget_lists()
    with pytest.raises(GuestError, match="apt-get update"):
        busybox.build()


def test_no_such_kernel(apt: FakeApt) -> None:
    (apt.lists / "linux-image-cloud-amd64").unlink()
    with pytest.raises(GuestError, match="none of the kernel packages linux-image-cloud-amd64, "):
        busybox.build()


@pytest.mark.parametrize("missing", ["apt-cache", "apt-get", "dpkg-deb"])
@pytest.mark.usefixtures("apt")
def test_missing_tool(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr("shutil.which", lambda name: None if name == missing else which(name))
    with pytest.raises(GuestError, match=f"{missing} is not on this host.*install the package"):
        busybox.build()


def test_package_without_its_kernel(apt: FakeApt) -> None:
    apt.add("linux-image-9.9.0-1-cloud-amd64", {"usr/share/doc/nothing": b""})
    with pytest.raises(GuestError, match="holds no kernel"):
        busybox.build()


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "x.deb"
    archive.write_bytes(tar_of({"boot/vmlinuz-1": b"x"}))
    with pytest.raises(GuestError, match="no sound package"):
        list(debian.members(archive, r"boot/.*"))


@pytest.mark.usefixtures("apt")
def test_command() -> None:
    runner = CliRunner()
    done = runner.invoke(guest_command, ["build", "busybox", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    shown = json.loads(done.stdout)
    assert Path(shown["kernel"]).read_bytes() == KERNEL
    assert "downloading busybox-static" in done.stderr
    done = runner.invoke(guest_command, ["build", "busybox", "--force"], catch_exceptions=False)
    assert shown["initrd"] in done.stdout
    for arguments in ([], ["build"], ["build", "busybox"]):
        assert "Example: vmonty guest build busybox" in runner.invoke(guest_command, [*arguments, "--help"]).stdout


def test_from_the_hosts_own_apt(tmp_path: Path) -> None:
    try:
        kernel, box = debian.resolve_kernel(busybox.KERNELS), debian.require(busybox.BUSYBOX)
        guest = busybox.build(cache=tmp_path)
    except GuestError as error:
        if re.search("damaged|no sound package", str(error)):
            raise
        pytest.skip(str(error))  # no such package, no lists, no network
    assert guest.kernel_package == kernel.name
    assert guest.busybox_version == box.version
    # The boot protocol's magic. Source: the kernel's Documentation/arch/x86/boot.rst.
    assert guest.kernel.read_bytes()[0x202:0x206] == b"HdrS"
    modules = busybox.kernel_modules(["kvm", "kvm-amd"], cache=tmp_path)
    assert {data[:4] for data in modules.values()} == {b"\x7fELF"}
