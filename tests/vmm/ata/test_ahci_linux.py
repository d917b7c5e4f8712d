"""Linux's own ahci, sd and sr drivers, on the software CPU: command queuing, and media that are changed meanwhile."""

from __future__ import annotations

import hashlib
import io
import random
import re
from pathlib import Path

import pytest

from vmonty import kvm
from vmonty.base.errors import GuestError, UsageError
from vmonty.guests import busybox
from vmonty.guests.cpio import SEGMENT_ALIGN, Writer
from vmonty.vmm import boards
from vmonty.vmm.block.image import open_image
from vmonty.vmm.machine import Config, Machine
from vmonty.vmm.outcome import Ending
from vmonty.vmm.peripherals import open_cdrom

from .. import full_kernel
from ..conftest import Screen
from .disc_scripts import CHANGED, EMPTY

LIMIT_S = 300.0
MIB = 1 << 20
MODULES = (
    "scsi_common", "scsi_mod", "libata", "libahci", "ahci", "crct10dif_common", "crct10dif_generic", "crc-t10dif",
    "crc64", "crc64-rocksoft", "t10-pi", "sd_mod", "cdrom", "sr_mod",
)  # fmt: skip
SCRIPT = """
stty -echo
result() { echo "<$1:$2>"; }
for module in @MODULES@; do insmod /ata/$module.ko; done
n=0; until [ -b /dev/sda -a -b /dev/sdb -a -b /dev/sr0 ] || [ $n = 300 ]; do sleep 0.1; n=$((n+1)); done
big=sda small=sdb; if [ $(cat /sys/block/sda/size) = 2048 ]; then big=sdb small=sda; fi
result sectors $(cat /sys/block/$big/size)
result model "$(cat /sys/block/$big/device/model)"
result messages $(grep -c 'MSI.*ahci' /proc/interrupts)
result depth $(cat /sys/block/$big/device/queue_depth)
result read $(md5sum </dev/$big)
for part in 0 1 2 3; do
  dd if=/dev/$big of=/tmp/part$part bs=512k skip=$part count=1 2>/dev/null
done
for part in 0 1 2 3; do
  dd if=/tmp/part$part of=/dev/$big bs=4k seek=$((1024 + 128 * part)) conv=fsync 2>/dev/null &
done
wait %1 %2 %3 %4
echo 3 >/proc/sys/vm/drop_caches
result written $(md5sum </dev/$big)
blkdiscard -o $((6 << 20)) -l $((1 << 20)) /dev/$big; result trimmed "$? $(md5sum </dev/$big)"
dd if=/tmp/part0 of=/dev/$small bs=4k count=1 conv=fsync 2>/dev/null; result protected $?
result disc $(md5sum </dev/sr0)
result blocks $(cat /sys/block/sr0/size)
result mode "$(echo $(cat /sys/class/ata_device/dev*/dma_mode | sort -u))"
result errors $(dmesg | grep -ci 'failed command')
exec 7</dev/sr0
result open yes
"""
LAST = """\
poweroff -f
"""


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % SEGMENT_ALIGN)


def results(screen: Screen) -> dict[bytes, bytes]:
    return dict(re.findall(rb"<(\w+):(.*?)(?:  -)?>\r?$", bytes(screen.text), re.MULTILINE))


@pytest.mark.parametrize("board", ["q35", "pc"])
def test_linux_drives_sata(screen: Screen, tmp_path: Path, board: str) -> None:
    guest = busybox.build()
    try:
        kernel, modules = full_kernel.files(MODULES)
    except GuestError as error:
        pytest.skip(f"no kernel with AHCI: {error}")
    extra = io.BytesIO()
    with Writer(extra) as archive:
        for name in MODULES:
            archive.file(f"ata/{name}.ko", modules[name])
    source = random.Random(7)
    before, disc, other = source.randbytes(8 * MIB), source.randbytes(3 * MIB), source.randbytes(5 * MIB)
    disk, second, iso, later = (tmp_path / name for name in ("disk", "second", "iso", "later"))
    disk.write_bytes(before)
    second.write_bytes(bytes(MIB))
    iso.write_bytes(disc)
    later.write_bytes(other)
    config = Config(
        kernel, padded(guest.initrd.read_bytes()) + extra.getvalue(), "console=ttyS0 quiet cryptomgr.notests=1",
        256 * MIB, machine=board,
    )  # fmt: skip
    with (
        open_image(disk, format="raw") as first,
        open_image(second, format="raw", read_only=True) as protected,
        open_cdrom(iso) as medium,
        open_cdrom(later) as next_medium,
        kvm.open("soft") as system,
        boards.create(
            system, config, screen.write, sata_disks=[first, protected], cdroms=[medium] if board == "q35" else [],
        ) as machine,
    ):  # fmt: skip
        if board == "q35":
            drive_with_cd(machine, screen)
            machine.removable["cd0"].change("cd0", next_medium)
            machine.serial.receive((CHANGED + LAST).encode())
        else:
            drive_without_cd(machine)
        outcome = machine.wait(LIMIT_S)
    assert outcome is not None, bytes(screen.text)[-3000:]
    assert outcome.ending is Ending.POWER_OFF, (outcome, bytes(screen.text)[-3000:])
    half = MIB // 2
    written = before[: 4 * MIB] + before[: 4 * half] + before[4 * MIB + 4 * half :]
    after = written[: 6 * MIB] + bytes(MIB) + written[7 * MIB :]
    wanted = {
        b"sectors": b"16384", b"model": b"vmonty disk     ", b"depth": b"32", b"messages": b"1",
        b"read": hashlib.md5(before).hexdigest().encode(), b"written": hashlib.md5(written).hexdigest().encode(),
        b"trimmed": b"0 " + hashlib.md5(after).hexdigest().encode(), b"protected": b"1",
    }  # fmt: skip
    found = results(screen)
    assert {name: found.get(name) for name in wanted} == wanted, bytes(screen.text).decode(errors="replace")
    assert disk.read_bytes() == after
    if board == "q35":
        assert found[b"disc"] == hashlib.md5(disc).hexdigest().encode()
        assert found[b"blocks"] == b"6144"
        assert found[b"empty"] == b"1", "nothing can be read"
        assert found[b"second"] == hashlib.md5(other).hexdigest().encode(), "the guest noticed the other disc"
        assert found[b"larger"] == b"10240"


def drive_with_cd(machine: Machine, screen: Screen) -> None:
    """To the point where the drive is empty."""
    machine.serial.receive(SCRIPT.replace("@MODULES@", " ".join(MODULES)).encode())
    machine.start()
    screen.wait_for(b"<open:yes>", LIMIT_S)
    with pytest.raises(UsageError, match="has locked its tray"):
        machine.removable["cd0"].change("cd0", None)
    machine.removable["cd0"].change("cd0", None, force=True)
    machine.serial.receive(EMPTY.encode())
    screen.wait_for(b"<empty:", LIMIT_S)


def drive_without_cd(machine: Machine) -> None:
    """To its end: the controller is a card, and the CD would be on IDE."""
    script = SCRIPT.partition("result disc")[0].replace("-a -b /dev/sr0 ", "") + "poweroff -f\n"
    machine.serial.receive(script.replace("@MODULES@", " ".join(MODULES)).encode())
    machine.start()
