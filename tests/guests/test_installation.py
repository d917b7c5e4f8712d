"""A real installation, from a CD on to a disk: SeaBIOS, GRUB's menu by keys, the Debian installer, a reset, a login."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vmonty
from vmonty.base.cachedir import cache_root
from vmonty.base.errors import GuestError, UsageError
from vmonty.vm import Outcome

from .apt_root import AptRoot
from .installer import media
from .installer.mirror import Mirror

LIMIT_S = 3600.0
SHOWN_EVERY_S = 20.0


class Log:
    """Lines with the seconds since the beginning, in a file: what the machine showed and the installer told."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Complete it."""
        with self._lock:
            self._file.close()

    def __call__(self, line: str) -> None:
        with self._lock:
            self._file.write(f"[{time.monotonic() - self._began:7.1f}] {line}\n")

    @contextmanager
    def syslog(self) -> Iterator[int]:
        """Take syslog datagrams while the block runs; the port."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heard:
            heard.bind(("127.0.0.1", 0))

            def listen() -> None:
                while data := heard.recv(1 << 16):
                    self(re.sub(r"^<\d+>", "", data.decode(errors="replace")).strip())

            thread = threading.Thread(target=listen)
            thread.start()
            try:
                yield heard.getsockname()[1]
            finally:
                # An empty datagram ends it.
                heard.sendto(b"", heard.getsockname())
                thread.join()


def until(machine: vmonty.VM, log: Log, holds: Callable[[str], bool], limit_s: float) -> None:
    """Wait until *holds* is true of the screen's text; the log gets what it shows now and then."""
    end = time.monotonic() + limit_s
    logged, again = "", 0.0
    while True:
        try:
            text = machine.screen.text()
        except UsageError as error:  # a picture
            text = str(error)
        held = holds(text)
        if held or (text != logged and time.monotonic() > again):
            log("\n".join(line for line in text.splitlines() if line.strip()))
            logged, again = text, time.monotonic() + SHOWN_EVERY_S
        if held:
            return
        assert time.monotonic() < end, text
        time.sleep(0.5)


@pytest.fixture(scope="module")
def apt() -> AptRoot:
    if "VMONTY_INSTALL" not in os.environ:
        pytest.skip("half an hour: run `make test-install`")
    for program in ("grub-mkrescue", "dpkg-deb", "apt-get", "qemu-img"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not here; see debian-packages.txt")
    if not media.FOLDER.is_dir():
        pytest.skip("debian-installer-12-netboot-amd64 is not installed")
    return AptRoot(cache_root() / "installation", codename())


def codename() -> str:
    (name,) = re.findall(r"\((\w+)\)", (media.IMAGES / "version.info").read_text())
    return str(name)


@pytest.mark.parametrize("interface", ["virtio", "ide"])
def test_debian_is_installed(apt: AptRoot, tmp_path: Path, interface: str) -> None:
    folder = Path(os.environ.get("VMONTY_INSTALL_LOG", tmp_path))
    with contextlib.closing(Log(folder / f"install-{interface}.log")) as log:
        install(apt, folder, tmp_path, interface, log)


def install(apt: AptRoot, folder: Path, tmp_path: Path, interface: str, log: Log) -> None:
    """The whole way, from the mirror to the installed system's login."""
    mirror = Mirror(log)
    try:
        media.fill(mirror, apt, tmp_path, codename(), "12")
    except GuestError as error:
        pytest.skip(f"apt cannot fetch what an installation needs: {error}")
    disk, cd = tmp_path / "disk.qcow2", tmp_path / "install.iso"
    with mirror.serve() as port, log.syslog() as log_port:
        mirror.files["/preseed.cfg"] = media.PRESEED.format(codename=codename()).encode()
        media.make_cd(cd, media.command_line(port, log_port), tmp_path)
        with vmonty.VM(
            cdroms=cd, disks=f"{disk},size=8G,if={interface}", memory="1G", accel="soft", devices="VGA", net="user",
        ) as machine:  # fmt: skip
            resets: list[Outcome] = []
            machine.on("reset", resets.append)
            machine.listen(str(folder / f"{interface}.sock"))
            machine.start()
            until(machine, log, lambda text: "Install Debian" in text, 300)
            machine.type("i")
            until(machine, log, lambda text: "Debian archive mirror hostname" in text, LIMIT_S)
            machine.type("\b" * 40 + f"{media.HOST}:{port}\n")
            until(machine, log, lambda text: bool(resets) or "failed" in text, LIMIT_S)
            assert resets, machine.screen.text()
            machine.console.expect(f"{media.HOSTNAME} login: ", timeout=LIMIT_S)
            machine.console.sendline("root")
            machine.console.expect("# ", timeout=LIMIT_S)
            machine.console.sendline("cat /etc/debian_version; uname -r; findmnt -no SOURCE,FSTYPE /; dpkg -l | wc -l")
            said = machine.console.expect(re.compile(rb"ext4\s+\d+\s"), timeout=LIMIT_S)
            machine.console.sendline("systemctl poweroff")
            outcome = machine.wait(LIMIT_S)
            log(machine.console.text[-4000:])
    assert said is not None
    assert outcome is not None
    assert outcome.ending.value == "power-off"
    assert subprocess.run(["qemu-img", "check", disk], capture_output=True, timeout=600, check=False).returncode == 0
