"""The whole virtual machine is killed at any moment: what its guest flushed is on the disks, which are sound."""

from __future__ import annotations

import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmonty.guests import busybox

from .conftest import assert_sound, contents

SLOT, SLOTS = 4096, 2048
SIZE = SLOT * SLOTS
# Odd, so that the slots come in an order that spreads over the disk, each once in SLOTS records.
STEP = 789
ROUNDS = 3
BOOT_LIMIT_S = 240.0
DISKS = ("raw", "qcow2", "backed")

# Each record goes to all disks and is flushed there; then it is reported. It is its number, again and again.
SCRIPT = """
n=@FIRST@
while :; do
  yes $n | head -c @SLOT@ >/tmp/record
  for disk in vda vdb vdc; do
    dd if=/tmp/record of=/dev/$disk bs=@SLOT@ seek=$((n * @STEP@ % @SLOTS@)) conv=fsync 2>/dev/null || echo failed
  done
  echo "<$n>"
  n=$((n + 1))
done
"""


def record(number: int) -> bytes:
    """What the guest writes for *number*."""
    line = b"%d\n" % number
    return (line * (SLOT // len(line) + 1))[:SLOT]


@pytest.fixture
def disks(make: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    raw, base = tmp_path / "disk.raw", tmp_path / "base.raw"
    raw.write_bytes(bytes(SIZE))
    base.write_bytes(bytes(SIZE))
    backed = make(SIZE, backing_file="base.raw", backing_format="raw").rename(tmp_path / "backed.qcow2")
    return {"raw": raw, "qcow2": make(SIZE), "backed": backed}


def killed_guest(guest: busybox.Guest, disks: dict[str, Path], first: int, enough: int, seconds: float) -> int:
    """Let the guest write records from *first* on, and kill it *seconds* after record *enough*.

    Returns the last that it reported.
    """
    command = [
        sys.executable, "-m", "vmonty", "run", "--accel", "soft", "--memory", "128M", "--kernel", guest.kernel,
        "--initrd", guest.initrd, "--append", "console=ttyS0 quiet cryptomgr.notests=1",
        *(
            word
            for name, path in disks.items()
            for word in ("--disk", f"{path},format={'raw' if name == 'raw' else 'qcow2'}")
        ),
    ]  # fmt: skip
    script = SCRIPT
    for name, value in (("FIRST", first), ("SLOTS", SLOTS), ("SLOT", SLOT), ("STEP", STEP)):
        script = script.replace(f"@{name}@", str(value))
    said = b""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(script.encode())
            deadline = time.monotonic() + BOOT_LIMIT_S
            while b"\n<%d>" % enough not in said:
                assert select.select([process.stdout], [], [], deadline - time.monotonic())[0], said[-2000:]
                part = os.read(process.stdout.fileno(), 1 << 16)
                assert part, said[-2000:]
                said += part
            # The moment of the kill is what is random here; nothing is expected of it.
            time.sleep(seconds)
        finally:
            process.kill()
        said += process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    # The script itself is echoed, and the last report may be cut off.
    assert re.search(rb"^failed", said, re.MULTILINE) is None, said[-2000:]
    return max(int(number) for number in re.findall(rb"^<(\d+)>\r$", said, re.MULTILINE))


def test_nothing_that_a_guest_flushed_is_lost(busybox_guest: busybox.Guest, disks: dict[str, Path]) -> None:
    chance = random.Random(9)
    expected = {kind: bytearray(SIZE) for kind in DISKS}
    first = 1
    for _ in range(ROUNDS):
        last = killed_guest(busybox_guest, disks, first, first + chance.randrange(2, 12), chance.uniform(0, 0.1))
        for kind in DISKS:
            known = expected[kind]
            for number in range(first, last + 1):
                at = number * STEP % SLOTS * SLOT
                known[at : at + SLOT] = record(number)
            path = disks[kind]
            if kind != "raw":
                assert_sound(path)
            found = contents(path) if kind != "raw" else path.read_bytes()
            # The next record may have been under way: old, new, or some sectors of each.
            begin = (last + 1) * STEP % SLOTS * SLOT
            end = begin + SLOT
            for at in range(begin, end, 512):
                assert found[at : at + 512] in (known[at : at + 512], record(last + 1)[at - begin : at - begin + 512])
            known[begin:end] = found[begin:end]
            wrong = [slot for slot in range(SLOTS) if found[slot * SLOT :][:SLOT] != known[slot * SLOT :][:SLOT]]
            assert not wrong, f"{kind}: records {first} to {last} were reported; slots {wrong} differ"
        first = last + 2
