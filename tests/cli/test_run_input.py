"""What ``vmonty run`` refuses: one line on standard error, status 2, nothing left running."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vmm import kernels
from vmm.fake_kvm import FakeKvm
from vmonty import kvm
from vmonty.cli.sizes import Size
from vmonty.vmm.memory import host_memory

from .conftest import Result

Run = Callable[..., Result]
FAKE = FakeKvm(max_vcpus=8)
GOOD = kernels.bzimage(b"\xf4\xeb\xfd")


def fake() -> FakeKvm:
    return FAKE


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> FakeKvm:
    """Let the accelerator kvm be a fake that notes every call."""
    monkeypatch.setitem(kvm.PROVIDERS, "linux", (__name__, "fake"))
    FAKE.calls.clear()
    return FAKE


KERNELS = {
    "empty": (b"", "is empty"),
    "text": (b"this is no kernel\n" * 200, "no Linux bzImage (no HdrS signature), ELF or multiboot image; give"),
    "elf": (b"\x7fELF\x02\x01\x01" + bytes(8192), "no executable for x86"),
    "truncated setup": (GOOD[:0x270], "truncated"),
    "truncated body": (kernels.bzimage(bytes(4096))[:-100], "truncated"),
    "old": (kernels.bzimage(b"\xf4", version=0x201), "too old"),
    "too large for it": (kernels.bzimage(b"\xf4", init_size=64 << 20), "give it more memory"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(vmonty: Run, tmp_path: Path, name: str) -> None:
    content, complaint = KERNELS[name]
    path = tmp_path / "kernel"
    path.write_bytes(content)
    assert complaint in vmonty("run", "--accel", "kvm", "--memory", "32M", "--kernel", path).refusal()
    assert not FAKE.calls, "no accelerator is opened for it"


@pytest.mark.parametrize("option", ["--kernel", "--initrd"])
def test_files_that_cannot_be_read(vmonty: Run, tmp_path: Path, kernel: Path, option: str) -> None:
    missing, folder, empty = tmp_path / "missing", tmp_path, tmp_path / "empty"
    empty.touch()
    for path, complaint in ((missing, "No such file"), (folder, "Is a directory"), (empty, "is empty")):
        files = {"--kernel": kernel, option: path}
        arguments = [item for pair in files.items() for item in pair]
        refusal = vmonty("run", "--accel", "kvm", *arguments).refusal()
        assert complaint in refusal
        assert f"the {option[2:]} {path}" in refusal


def test_a_file_without_permission(vmonty: Run, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand: this may be run by root, who may read everything.
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert vmonty("run", "--kernel", kernel).refusal() == f"the kernel {kernel} cannot be read: Permission denied"


@pytest.mark.parametrize("size", [5 << 20, 9 << 20])
def test_an_initrd_that_is_too_large(vmonty: Run, tmp_path: Path, kernel: Path, size: int) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(bytes(size))
    refusal = vmonty("run", "--accel", "kvm", "-m", "8M", "--kernel", kernel, "--initrd", initrd).refusal()
    assert refusal.startswith(f"the initrd of {size >> 20} MiB does not fit")
    assert not FAKE.calls


@pytest.mark.parametrize(
    ("memory", "complaint"),
    [
        ("0", "memory of 0 bytes"), ("0G", "memory of 0 bytes"), ("4097", "memory of 4097 bytes"),
        (f"{(host_memory() >> 20) + 1}M", "more than this host has"), ("1000000T", "more than this host has"),
        ("1M", "too small for Linux"), ("", "no size"), ("-512M", "no size"), ("12Q", "no size"), ("much", "no size"),
        ("0x1000", "no size"), ("1.5G", "no size"), ("512 M", "no size"), ("\u0665M\u0665", "no size"),
    ],
)  # fmt: skip
def test_memory(vmonty: Run, kernel: Path, memory: str, complaint: str) -> None:
    assert complaint in vmonty("run", "--accel", "kvm", "--kernel", kernel, f"--memory={memory}").refusal()
    assert not FAKE.calls


@pytest.mark.parametrize(
    ("cpus", "complaint"),
    [
        ("0", "'--cpus'"),
        ("-1", "'--cpus'"),
        ("two", "'--cpus'"),
        ("256", "a machine has 1 to 255"),
        ("9", "takes 1 to 8"),
    ],
)
def test_cpus(vmonty: Run, kernel: Path, cpus: str, complaint: str) -> None:
    assert complaint in vmonty("run", "--accel", "kvm", "--kernel", kernel, f"--cpus={cpus}").refusal()


@pytest.mark.parametrize("accelerator_name", ["tcg", "", "kvm:", "kvm:tcg", "KVM"])
def test_accelerators(vmonty: Run, kernel: Path, accelerator_name: str) -> None:
    refusal = vmonty("run", "--kernel", kernel, f"--accel={accelerator_name}").refusal()
    assert refusal.startswith("unknown accelerator")
    assert "kvm" in refusal


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "-inf", "1e300", "soon", ""])
def test_timeouts(vmonty: Run, kernel: Path, seconds: str) -> None:
    assert "--timeout" in vmonty("run", "--kernel", kernel, f"--timeout={seconds}").refusal()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["windows"], "unknown guest 'windows'; there are: busybox, debian"),
        (["--initrd", "/etc/hostname"], "--initrd needs --kernel"),
        (["busybox", "--initrd", "/etc/hostname"], "--initrd needs --kernel"),
        (["busybox", "--kernel", "/etc/hostname"], "give either NAME or --kernel"),
        (["busybox", "--firmware", "bios"], "give no NAME and no --kernel with it"),
        (["--firmware", "/dev/null"], "has 0 bytes: it must be a multiple of 64 KiB"),
        (["--firmware", "/nowhere"], "the firmware /nowhere cannot be read: No such file"),
        (["--boot", "menu=on"], "--boot needs --firmware"),
        (["--firmware", "bios", "--boot", "quickly"], "--boot: 'quickly' is no option"),
        (["--nvram", "/nowhere"], "--nvram needs --firmware"),
        (["--firmware", "/usr/bin/env", "--nvram", "/nowhere"], "/usr/bin/env has"),
        (["--cdrom", "/nowhere.iso", "--firmware", "bios"], "/nowhere.iso"),
        (["--kernel"], "requires an argument"),
        (["--nonsense"], "--nonsense"),
        (["busybox", "busybox"], "unexpected extra argument"),
    ],
)
def test_combinations(vmonty: Run, arguments: list[str], complaint: str) -> None:
    assert complaint in vmonty("run", *arguments).refusal()


def test_a_command_line_that_is_too_long(vmonty: Run, kernel: Path) -> None:
    assert (
        "command line is 3000 bytes; this kernel takes 2047"
        in vmonty("run", "--accel", "kvm", "--kernel", kernel, "--append", "x" * 3000).refusal()
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65536), ("64K", 1 << 16), ("64k", 1 << 16), ("512M", 512 << 20), ("2G", 2 << 30), ("1T", 1 << 40),
        ("2GiB", 2 << 30), ("2GB", 2 << 30), (" 16m ", 16 << 20), (4096, 4096),
    ],
)  # fmt: skip
def test_sizes(text: object, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--disk", "no-such-image"), "no-such-image"),
        (("--disk", "x,format=zip"), "format=auto|raw|qcow2|vmdk"),
        (("--net", "bridge"), "there are: user, tap, none"),
        (("--net", "user,hostfwd=nonsense"), "tcp:[addr]:port-[guestaddr]:port"),
        (("--net", "user,mac=1"), "six bytes"),
        (("--device", "virtio-floppy"), "virtio-rng"),
    ],
)
def test_disks_networks_and_devices(vmonty: Run, kernel: Path, options: tuple[str, str], complaint: str) -> None:
    assert complaint in vmonty("run", "--accel", "kvm", "--kernel", kernel, *options).refusal()
