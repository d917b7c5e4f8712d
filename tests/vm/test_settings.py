"""Settings: from Python, text and files; what is wrong is named by its field."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmonty
from vmonty.base.errors import UsageError
from vmonty.vm.settings import Disk, Settings, TapNetwork, UserNetwork, read_file, settings
from vmonty.vmm.peripherals import Disk as PlannedDisk


def test_text_and_tables_mean_the_same():
    text = settings({"memory": "1G", "disks": "a.img,snapshot", "net": "user,hostfwd=tcp::2222-:22,restrict=on"})
    tables = settings(
        {
            "memory": 1 << 30,
            "disks": [{"file": "a.img", "snapshot": True}],
            "net": [{"type": "user", "hostfwd": ["tcp::2222-:22"], "restrict": True}],
        }
    )
    assert text == tables
    assert text.disks == (Disk(file=Path("a.img"), snapshot=True),)
    assert settings({"disks": "a,bps=2M,iops_wr=7"}).plan().disks == (PlannedDisk.parse("a,bps=2M,iops_wr=7"),)
    network = text.net[0]
    assert isinstance(network, UserNetwork)
    assert network.config().restrict
    assert [str(forward) for forward in network.config().forwards] == ["tcp:0.0.0.0:2222-:22"]


def test_cards_of_both_kinds_and_none():
    mixed = settings({"net": ["user", "tap,ifname=tap3,mac=52:54:00:00:00:09"]})
    assert mixed.net == (UserNetwork(), TapNetwork(ifname="tap3", mac="52:54:00:00:00:09"))
    assert settings({"net": None}).net == settings({"net": "none"}).net == ()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"memory": "lots"}, "memory: 'lots' is no size"),
        ({"memory": 4097}, "memory: "),
        ({"cpus": 0}, "cpus: 0 vCPUs"),
        ({"cpus": "many"}, "cpus: "),
        ({"kernle": "x"}, "kernle: there is no such setting"),
        ({"machine": "mac"}, "machine: "),
        ({"cpu": "Z80"}, "cpu: "),
        ({"disks": [{"file": "x", "format": "zip"}]}, "disks.0.format: "),
        ({"disks": {"format": "raw"}}, "disks.0.file: "),
        ({"disks": "x,iops=fast"}, "disks.0.iops: "),
        ({"disks": [{"file": "x", "bps": "1M", "bps_rd": 5}]}, "disks.0: give a disk's limit either"),
        ({"disks": "x,if=sata,bps=1M"}, "disks.0: --disk x: limits need if=virtio"),
        ({"net": "wifi"}, "net.0: 'wifi' is no kind of network"),
        ({"net": ["user", "user,hostfwd=tcp:22"]}, "net.1: hostfwd=tcp:22"),
        ({"net": "user,speed=fast"}, "net.0.speed: there is no such setting"),
        ({"net": "user,mac=1:2"}, "net.0.mac: "),
        ({"net": "user,tftp=/does/not/exist"}, "net.0: tftp=/does/not/exist"),
        ({"initrd": "x"}, "initrd needs kernel"),
        ({"kernel": "x", "guest": "busybox"}, "either guest or kernel"),
        ({"timeout": 0}, "timeout: "),
        ({"devices": "flux-capacitor"}, "flux-capacitor"),
    ],
)
def test_an_error_names_its_field(fields, complaint):
    with pytest.raises(UsageError) as refusal:
        vmonty.VM(**fields)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


TOML = """
memory = "64M"
kernel = "boot/vmlinuz"
disks = ["disk.img,ro"]

[[net]]
type = "user"
hostfwd = ["tcp::2222-:22"]
"""
YAML = """
memory: 64M
kernel: boot/vmlinuz
disks:
  - file: disk.img
    readonly: true
net:
  - user,hostfwd=tcp::2222-:22
"""


@pytest.mark.parametrize(("name", "text"), [("vm.toml", TOML), ("vm.yaml", YAML), ("vm.yml", YAML)])
def test_a_file_gives_the_same_settings_with_paths_relative_to_it(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    vm = vmonty.VM.from_file(tmp_path / name, cpus=2)
    assert vm.settings == Settings(
        memory=64 << 20,
        cpus=2,
        kernel=tmp_path / "boot/vmlinuz",
        disks=(Disk(file=tmp_path / "disk.img", readonly=True),),
        net=(UserNetwork(hostfwd=("tcp::2222-:22",)),),
    )


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.toml", "memory =", "is no TOML"),
        ("a.yaml", "a: [", "is no YAML"),
        ("a.yaml", "- 1", "holds no settings"),
        ("a.yaml", "1: 2", "holds no settings"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "is no YAML"),
        ("a.ini", "", "must end in .toml"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, name, text, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=complaint):
        read_file(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_file(tmp_path / "none.toml")
