"""A Linux guest fetches 128 MB over HTTP, writes them to each kind of disk and reads them back, and pings.

The small form of tests/guests/test_debian_guest.py, on the busybox guest.
"""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from tests.vmm.net.namespace import web_server

import vmonty
from vmonty.vmm.block.convert import create_image
from vmonty.vmm.block.image import open_image

from .block.conftest import assert_clean

MIB = 1 << 20
DISK = 128 * MIB
LIMIT_S = 300.0


@pytest.mark.usefixtures("busybox_guest")
def test_disks_keep_what_is_written_and_the_network_passes_what_is_served(tmp_path: Path) -> None:
    raw, base, image = tmp_path / "disk.raw", tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    raw.touch()
    os.truncate(raw, DISK)
    create_image(base, DISK)
    with open_image(base, format="qcow2") as disk:
        # What shows through where an overlay forgets what was written to it.
        for at in range(0, DISK, 4 * MIB):
            disk.write(at, b"base" * (MIB // 4))
    create_image(image, None, backing=base.name, backing_format="qcow2")
    chance = random.Random(128)
    data = b"".join(chance.randbytes(MIB) for _ in range(DISK // MIB))
    (tmp_path / "file").write_bytes(data)
    digest = hashlib.md5(data).hexdigest()
    with (
        web_server(tmp_path) as port,
        vmonty.VM(memory="512M", accel="soft", net="user", disks=[f"{raw},format=raw", str(image)]) as vm,
    ):
        vm.start()
        vm.console.expect("/root # ", LIMIT_S)
        vm.console.sendline(f"wget -q -O file http://10.0.2.2:{port}/file; ls -l file")
        vm.console.expect(f" {DISK} ", LIMIT_S)
        vm.console.sendline(
            "for disk in vda vdb; do dd if=file of=/dev/$disk bs=1M conv=fsync; done; rm file; echo do''ne"
        )
        vm.console.expect("\ndone", LIMIT_S)
        vm.console.sendline("echo 3 >/proc/sys/vm/drop_caches; md5sum /dev/vda /dev/vdb")
        for name in ("vda", "vdb"):
            vm.console.expect(f"\n{digest}  /dev/{name}", LIMIT_S)
        vm.console.sendline("ping -c 3 10.0.2.2")
        vm.console.expect("3 packets received", LIMIT_S)
        vm.console.sendline("poweroff -f")
        outcome = vm.wait(LIMIT_S)
    assert outcome is not None
    assert outcome.ending.value == "power-off"
    with raw.open("rb") as file:
        assert hashlib.file_digest(file, "md5").hexdigest() == digest
    assert_clean(image)
    with open_image(image, format="qcow2") as disk:
        found = hashlib.md5()
        for at in range(0, DISK, 4 * MIB):
            found.update(disk.read(at, 4 * MIB))
    assert found.hexdigest() == digest
