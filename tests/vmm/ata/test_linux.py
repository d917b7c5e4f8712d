"""Linux's own ata_piix, sd and sr drivers, on the software CPU."""

from __future__ import annotations

import hashlib
import io
import random
import re
from pathlib import Path

from vmonty import kvm
from vmonty.guests import busybox
from vmonty.guests.cpio import SEGMENT_ALIGN, Writer
from vmonty.vmm import boards
from vmonty.vmm.block.image import open_image
from vmonty.vmm.machine import Config
from vmonty.vmm.outcome import Ending
from vmonty.vmm.peripherals import open_cdrom

from ..conftest import Screen

BOOT_LIMIT_S = 240.0
MIB = 1 << 20
MODULES = ("scsi_common", "scsi_mod", "libata", "ata_piix", "sd_mod", "cdrom", "sr_mod")
SCRIPT = """
result() { echo "<$1:$2>"; }
for module in @MODULES@; do insmod /ide/$module.ko; done
n=0; until [ -b /dev/sda -a -b /dev/sdb -a -b /dev/sr0 ] || [ $n = 100 ]; do sleep 0.1; n=$((n+1)); done
big=sda small=sdb; if [ $(cat /sys/block/sda/size) = 2048 ]; then big=sdb small=sda; fi  # Linux probes both at once
result sectors $(cat /sys/block/$big/size)
result model "$(cat /sys/block/$big/device/model)"
result read $(md5sum </dev/$big)
dd if=/dev/$big of=/tmp/copy bs=1M count=2 2>/dev/null
result written $(dd if=/tmp/copy of=/dev/$big bs=64k seek=64 conv=fsync 2>/dev/null; md5sum </dev/$big)
result disc $(md5sum </dev/sr0)
result blocks $(cat /sys/block/sr0/size)
result mode "$(echo $(cat /sys/class/ata_device/dev[12].*/dma_mode))"
result errors $(dmesg | grep -ci 'failed command')
poweroff -f
"""


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SEGMENT_ALIGN)


def test_linux_drives_disks_and_a_cdrom(screen: Screen, tmp_path: Path) -> None:
    """On a pc; a q35 has them on SATA, which the cloud kernel cannot drive: see test_ahci_linux."""
    guest = busybox.build()
    modules = busybox.kernel_modules(MODULES)
    extra = io.BytesIO()
    with Writer(extra) as archive:
        for name in MODULES:
            archive.file(f"ide/{name}.ko", modules[name])
    source = random.Random(7)
    before, disc = source.randbytes(8 * MIB), source.randbytes(3 * MIB)
    disk, second, iso = (tmp_path / name for name in ("disk", "second", "iso"))
    disk.write_bytes(before)
    second.write_bytes(bytes(MIB))
    iso.write_bytes(disc)
    config = Config(
        guest.kernel.read_bytes(), padded(guest.initrd.read_bytes()) + extra.getvalue(),
        "console=ttyS0 quiet cryptomgr.notests=1",
        256 * MIB,
    )  # fmt: skip
    with (
        open_image(disk, format="raw") as first,
        open_image(second, format="raw", read_only=True) as protected,
        open_cdrom(iso) as medium,
        kvm.open("soft") as system,
        boards.create(system, config, screen.write, ide_disks=[first, protected], cdroms=[medium]) as machine,
    ):
        machine.serial.receive(SCRIPT.replace("@MODULES@", " ".join(MODULES)).encode())
        machine.start()
        outcome = machine.wait(BOOT_LIMIT_S)
    text = bytes(screen.text)
    assert outcome is not None, text[-3000:]
    assert outcome.ending is Ending.POWER_OFF, (outcome, text[-3000:])
    found = dict(re.findall(rb"^<(\w+):(.*?)(?:  -)?>\r?$", text, re.MULTILINE))
    after = before[: 4 * MIB] + before[: 2 * MIB] + before[6 * MIB :]
    assert found == {
        b"sectors": b"16384", b"model": b"vmonty disk     ",
        b"read": hashlib.md5(before).hexdigest().encode(), b"written": hashlib.md5(after).hexdigest().encode(),
        b"disc": hashlib.md5(disc).hexdigest().encode(), b"blocks": b"6144",
        b"mode": b" ".join([b"XFER_MW_DMA_2"] * 3), b"errors": b"0",
    }, text.decode(errors="replace")  # fmt: skip
    assert disk.read_bytes() == after
