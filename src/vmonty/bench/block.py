"""``vmonty bench block``: direct I/O of a Linux guest on a virtio disk, raw and qcow2, on soft and under QEMU's TCG.

Both have the same files on the host, with its page cache, and write-back caching: what is measured is the path
from the guest's request to its completion, not the host's disk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from vmonty.bench.linux import Guest, Sample, guests, rows
from vmonty.bench.report import Report
from vmonty.guests.progress import Progress, silent
from vmonty.vmm.block.convert import create_image

MIB = 1 << 20
DISK = 256 * MIB
TARGET = "≥ TCG"
# Name, the program's word, block size, requests in flight.
KINDS = (
    ("sequential write", "write", 256 << 10, 8),
    ("sequential read", "read", 256 << 10, 8),
    ("random 4 KiB write, 32 deep", "randwrite", 4096, 32),
    ("random 4 KiB read, 32 deep", "randread", 4096, 32),
    ("random 4 KiB read, one at a time", "randread", 4096, 1),
)
FORMATS = ("raw", "qcow2")
# Rounds, bytes of a sequential transfer, operations of a random one.
FULL, QUICK = (3, DISK, 20000), (1, 64 * MIB, 4000)


def measure(quick: bool = False, say: Progress = silent) -> Report:
    """Three rounds, *quick* one of shorter transfers. Raises PayloadError, GuestError."""
    rounds, stream, operations = QUICK if quick else FULL
    report = Report("Block: a Linux guest's direct I/O on virtio disks")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = {(who, kind): folder / f"{who}.{kind}" for who in ("vmonty", "qemu") for kind in FORMATS}
        for (_, kind), path in images.items():
            if kind == "raw":
                # Not sparse: a hole is another path in the host's file system.
                path.write_bytes(b"\xa5" * DISK)
            else:
                create_image(path, DISK)
        ours: list[str] = ["--net", "none"]
        qemus: list[str] = []
        for kind in FORMATS:
            ours += ["--disk", f"{images['vmonty', kind]},format={kind}"]
            drive = f"file={images['qemu', kind]},if=none,id={kind},format={kind},cache=writeback"
            qemus += ["-drive", drive, "-device", f"virtio-blk-pci,drive={kind}"]
        with guests(folder, ours, qemus, say) as running:
            steps, step = len(FORMATS) * len(KINDS) * rounds, 0
            for letter, kind in zip("ab", FORMATS, strict=True):
                for title, word, block, depth in KINDS:
                    total = stream if block > 4096 else operations * block
                    taken: dict[str, list[Sample]] = {guest.who: [] for guest in running}
                    for _ in range(rounds):
                        say(f"{kind}, {title}", step, steps)
                        step += 1
                        for guest in running:
                            taken[guest.who].append(_run(guest, word, f"/dev/vd{letter}", total, block, depth))
                    amount, unit = (total / 1e6, "MB") if block > 4096 else (total / block, "operations")
                    report.rows += rows(f"{kind}, {title}", unit, amount, taken, TARGET)
    return report


def _run(guest: Guest, word: str, device: str, total: int, block: int, depth: int) -> Sample:
    return guest.command(f"transfers {word} {device} {total} {block} {depth}")
