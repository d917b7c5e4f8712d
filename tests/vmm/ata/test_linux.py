"""Linux's own ata_piix, sd and sr drivers, on the software CPU."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.base.errors import UsageError
from vmonty.guests import busybox
from vmonty.guests.cpio import SEGMENT_ALIGN, Writer
from vmonty.vmm import boards
from vmonty.vmm.block.image import open_image
from vmonty.vmm.machine import Config
from vmonty.vmm.outcome import Ending
from vmonty.vmm.peripherals import open_cdrom

from ..conftest import Screen
from ..guest_ioctl import ioctl_program
from .disc_scripts import CHANGED, EMPTY

BOOT_LIMIT_S = 240.0
MIB = 1 << 20
CDROMEJECT = 0x5309
MODULES = ("scsi_common", "scsi_mod", "libata", "ata_piix", "sd_mod", "cdrom", "sr_mod")
SCRIPT = """
stty -echo
result() { echo "<$1:$2>"; }
for module in @MODULES@; do insmod /ide/$module.ko; done
n=0; until [ -b /dev/sda -a -b /dev/sdb -a -b /dev/sr0 ] || [ $n = 100 ]; do sleep 0.1; n=$((n+1)); done
big=sda small=sdb; if [ $(cat /sys/block/sda/size) = 2048 ]; then big=sdb small=sda; fi  # Linux probes both at once
result sectors $(cat /sys/block/$big/size)
result model "$(cat /sys/block/$big/device/model)"
result read $(md5sum </dev/$big)
dd if=/dev/$big of=/tmp/copy bs=1M count=2 2>/dev/null
result written $(dd if=/tmp/copy of=/dev/$big bs=64k seek=64 conv=fsync 2>/dev/null; md5sum </dev/$big)
blkdiscard -o $((6 << 20)) -l $((1 << 20)) /dev/$big; result trimmed "$? $(md5sum </dev/$big)"
result disc $(md5sum </dev/sr0)
result blocks $(cat /sys/block/sr0/size)
result mode "$(echo $(cat /sys/class/ata_device/dev[12].*/dma_mode))"
result errors $(dmesg | grep -ci 'failed command')
exec 7</dev/sr0
result open yes
"""
LAST = """\
/eject; result ejected $?
dd if=/dev/sr0 of=/dev/null count=1 2>/dev/null; result gone $?
"""


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SEGMENT_ALIGN)


def test_linux_drives_disks_and_a_cdrom_whose_disc_changes(screen: Screen, tmp_path: Path) -> None:
    """On a pc; a q35 has them on SATA, which the cloud kernel cannot drive: see test_ahci_linux."""
    guest = busybox.build()
    modules = busybox.kernel_modules(MODULES)
    extra = io.BytesIO()
    with Writer(extra) as archive:
        for name in MODULES:
            archive.file(f"ide/{name}.ko", modules[name])
        archive.file("eject", ioctl_program("/dev/sr0", CDROMEJECT, flags=os.O_RDONLY | os.O_NONBLOCK), mode=0o755)
    source = random.Random(7)
    before, disc, other = source.randbytes(8 * MIB), source.randbytes(3 * MIB), source.randbytes(5 * MIB)
    disk, second, iso, later = (tmp_path / name for name in ("disk", "second", "iso", "later"))
    later.write_bytes(other)
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
        open_cdrom(later) as next_medium,
        kvm.open("soft") as system,
        boards.create(system, config, screen.write, ide_disks=[first, protected], cdroms=[medium]) as machine,
    ):
        machine.serial.receive(SCRIPT.replace("@MODULES@", " ".join(MODULES)).encode())
        machine.start()
        screen.wait_for(b"<open:yes>", BOOT_LIMIT_S)
        drive = machine.removable["cd0"]
        with pytest.raises(UsageError, match="has locked its tray"):
            drive.change("cd0", None)
        drive.change("cd0", None, force=True)
        machine.serial.receive(EMPTY.encode())
        screen.wait_for(b"<empty:", BOOT_LIMIT_S)
        drive.change("cd0", next_medium)
        machine.serial.receive((CHANGED + LAST).encode())
        screen.wait_for(b"<gone:", BOOT_LIMIT_S)
        assert not drive.drive.locked
        drive.change("cd0", medium)
        machine.serial.receive(b"result back $(md5sum </dev/sr0); poweroff -f\n")
        outcome = machine.wait(BOOT_LIMIT_S)
    text = bytes(screen.text)
    assert outcome is not None, text[-3000:]
    assert outcome.ending is Ending.POWER_OFF, (outcome, text[-3000:])
    found = dict(re.findall(rb"<(\w+):(.*?)(?:  -)?>\r?$", text, re.MULTILINE))
    written = before[: 4 * MIB] + before[: 2 * MIB] + before[6 * MIB :]
    after = written[: 6 * MIB] + bytes(MIB) + written[7 * MIB :]
    assert found == {
        b"sectors": b"16384", b"model": b"vmonty disk     ",
        b"read": hashlib.md5(before).hexdigest().encode(), b"written": hashlib.md5(written).hexdigest().encode(),
        b"trimmed": b"0 " + hashlib.md5(after).hexdigest().encode(),
        b"disc": hashlib.md5(disc).hexdigest().encode(), b"blocks": b"6144",
        b"mode": b" ".join([b"XFER_MW_DMA_2"] * 3), b"errors": b"0", b"open": b"yes",
        b"empty": b"1", b"second": hashlib.md5(other).hexdigest().encode(), b"larger": b"10240",
        b"ejected": b"0", b"gone": b"1", b"back": hashlib.md5(disc).hexdigest().encode(),
    }, text.decode(errors="replace")  # fmt: skip
    assert disk.read_bytes() == after
