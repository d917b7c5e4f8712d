"""The Debian guest as a user has it: built, booted by ``vmonty run debian``, used over ssh, rebooted, powered off."""

from __future__ import annotations

import hashlib
import http.server
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from vmonty.base.errors import GuestError
from vmonty.bench.process import Process
from vmonty.guests import rootdisk
from vmonty.vm.debian import pack

MIB = 1 << 20
WRITTEN, FETCHED = 256 * MIB, 64 * MIB
# On an idle host the whole test takes less than one of these; several may run there at a time.
BOOT_LIMIT_S, COMMAND_LIMIT_S = 300.0, 300.0
# What is written to disks: the numbers from 1 on. Both sides can make it, no two blocks are equal.
NUMBERS = f"seq 1 40000000 | head -c {WRITTEN}"

C_PROGRAM = r"""
#include <stdio.h>
#include <math.h>
int main(int argc, char **argv) {
    double sum = 0;
    for (int i = 1; i <= 1000; i++) sum += sqrt(i) / argc;
    return printf("%.6f %s\n", sum, argv[1]) < 0;
}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """An HTTP server on the host: its port, and the digest of /file."""
    root = tmp_path_factory.mktemp("www")
    data = random.Random(64).randbytes(FETCHED)
    (root / "file").write_bytes(data)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root)) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made.server_address[1], hashlib.sha256(data).hexdigest()
        made.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def guest() -> rootdisk.Disk:
    if "VMONTY_DEBIAN" not in os.environ:
        pytest.skip("some four minutes of CPU time: run `make test-debian`")
    for program in ("mmdebstrap", "ssh", "qemu-img"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here; see debian-packages.txt")
    try:
        return rootdisk.build(pack, compiler=True)
    except GuestError as error:
        pytest.skip(f"the Debian guest cannot be built here: {error}")


class Shell:
    """root of the guest, over ssh as the first line of ``vmonty run debian`` says."""

    def __init__(self, process: Process) -> None:
        line = re.search(r"^vmonty: (ssh .*)$", process.errors(), re.MULTILINE)
        assert line is not None, process.errors()
        first, *rest = line[1].split()
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes")
        self._command = [first, *(word for option in options for word in ("-o", option)), *rest]

    def run(self, script: str, stdin: str = "") -> str:
        """The output of *script*, which must succeed."""
        done = subprocess.run(
            [*self._command, f"set -e; {script}"], input=stdin, capture_output=True, text=True,
            timeout=COMMAND_LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{script!r} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


def log_in(process: Process) -> Shell:
    """Wait for the login prompt, log in on the console, and let ssh in."""
    process.wait_for(b"login: ", BOOT_LIMIT_S)
    process.write(b"root\n")
    process.wait_for(b"root@vmonty:~# ", BOOT_LIMIT_S)
    return Shell(process)


def numbers_digest() -> str:
    """Of what NUMBERS makes."""
    made = subprocess.run(["sh", "-c", f"{NUMBERS} | sha256sum"], capture_output=True, text=True, check=True)
    return made.stdout.split()[0]


def test_a_user_works_in_debian(
    guest: rootdisk.Disk, server: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    raw = tmp_path / "second.raw"
    raw.touch()
    os.truncate(raw, WRITTEN)
    port, fetched = server
    numbers = numbers_digest()
    command = [sys.executable, "-m", "vmonty", "run", "debian", "--accel", "soft", "--disk", f"{raw},format=raw"]
    with Process(command) as process:
        shell = log_in(process)
        assert shell.run("uname -r").strip() == guest.kernel_release
        assert shell.run("cat > a.c; gcc -O2 -Wall -o a a.c -lm; ./a built", C_PROGRAM) == "10548.727944 built\n"
        assert "3 received, 0% packet loss" in shell.run("ping -c 3 -i 0.2 10.0.2.2")
        assert shell.run(f"wget -q -O - http://10.0.2.2:{port}/file | sha256sum").split()[0] == fetched
        # The root disk is a qcow2 image with a backing file; the second one is raw.
        assert shell.run("cat /sys/block/vdb/size").strip() == str(WRITTEN // 512)
        shell.run(
            f"{NUMBERS} | dd of=big bs=1M iflag=fullblock conv=fsync; {NUMBERS} | dd of=/dev/vdb bs=1M conv=fsync"
        )
        shell.run("echo 3 > /proc/sys/vm/drop_caches")
        assert shell.run("sha256sum < /dev/vdb").split()[0] == numbers
        with raw.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == numbers
        first_boot = shell.run("cat /proc/sys/kernel/random/boot_id")
        shell.run("systemctl reboot")
        shell = log_in(process)
        assert shell.run("cat /proc/sys/kernel/random/boot_id") != first_boot
        assert shell.run("sha256sum big").split()[0] == numbers
        shell.run("systemctl poweroff")
        assert process.wait(BOOT_LIMIT_S) == 0, process.errors()
    (overlay,) = (path for path in (tmp_path / "vmonty").glob("*.qcow2") if not path.name.endswith("-base.qcow2"))
    checked = subprocess.run(["qemu-img", "check", overlay], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "No errors were found" in checked.stdout
