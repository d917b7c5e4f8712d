"""A network start as people do it: iPXE from the card's ROM, DHCP and TFTP of the user network, Debian's installer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import vmonty
from vmonty.guests import busybox
from vmonty.vmm.optionrom import IPXE_VIRTIO

LIMIT_S = 240.0
FOLDER = Path("/usr/lib/debian-installer/images/12/amd64/text")
SPLASH = FOLDER / "debian-installer" / "amd64" / "boot-screens" / "splash.png"


@pytest.mark.skipif(
    not SPLASH.exists() or not IPXE_VIRTIO.exists(),
    reason="debian-installer-12-netboot-amd64 or ipxe-qemu is not installed",
)
def test_the_installers_first_screen() -> None:
    """PXELINUX gets its menu and its picture by TFTP, and shows them: the picture's left edge has no text on it."""
    from PIL import Image

    with Image.open(SPLASH) as picture:
        size, wanted = picture.size, picture.convert("RGB").crop((0, 0, 60, picture.height))
    with vmonty.VM(
        memory="256M", accel="soft", devices="VGA", firmware="bios", boot="order=n",
        net=f"user,tftp={FOLDER},bootfile=pxelinux.0",
    ) as machine:  # fmt: skip
        machine.start()
        end = time.monotonic() + LIMIT_S
        alike = 0.0
        while alike < 0.95:
            assert time.monotonic() < end, f"{alike:.0%} of the picture is there"
            time.sleep(0.3)
            frame = machine.screen.frame()
            if (frame.width, frame.height) != size:
                continue
            shown = Image.frombytes("RGB", size, bytes(frame.pixels), "raw", "BGRX").crop((0, 0, 60, size[1]))
            # The mode may have fewer bits per colour than the picture.
            pairs = list(zip(shown.tobytes(), wanted.tobytes(), strict=True))
            alike = sum(abs(a - b) <= 8 for a, b in pairs) / len(pairs)


CONFIGURATION = """\
SERIAL 0
DEFAULT it
LABEL it
 KERNEL linux
 APPEND console=ttyS0 earlyprintk=serial
"""


@pytest.mark.skipif(
    not (FOLDER / "ldlinux.c32").exists() or not IPXE_VIRTIO.exists(),
    reason="debian-installer-12-netboot-amd64 or ipxe-qemu is not installed",
)
def test_a_kernel_by_tftp(tmp_path: Path) -> None:
    """All of a kernel's blocks come, in order: it says its first line, and checks itself before that."""
    for name in ("pxelinux.0", "ldlinux.c32"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    (tmp_path / "linux").write_bytes(busybox.build().kernel.read_bytes())
    (tmp_path / "pxelinux.cfg").mkdir()
    (tmp_path / "pxelinux.cfg" / "default").write_text(CONFIGURATION)
    with vmonty.VM(
        memory="256M", accel="soft", firmware="bios", boot="order=n",
        net=f"user,tftp={tmp_path},bootfile=pxelinux.0",
    ) as machine:  # fmt: skip
        machine.start()
        machine.console.expect("Loading linux", timeout=LIMIT_S)
        machine.console.expect("Linux version", timeout=LIMIT_S)


GRUB = FOLDER / "debian-installer" / "amd64" / "grub" / "grub.cfg"
OVMF = Path("/usr/share/ovmf/OVMF.fd")


@pytest.mark.skipif(
    not GRUB.exists() or not OVMF.exists(), reason="debian-installer-12-netboot-amd64 or ovmf is not installed"
)
def test_uefi_starts_grub_from_the_network() -> None:
    """OVMF's own driver of the card, and its TFTP client; the order reaches it as bootorder."""
    with vmonty.VM(
        memory="256M", accel="soft", machine="q35", firmware="uefi", boot="order=n",
        net=f"user,romfile=,tftp={FOLDER},bootfile=debian-installer/amd64/bootnetx64.efi",
    ) as machine:  # fmt: skip
        machine.start()
        machine.console.expect("Downloading NBP file", timeout=LIMIT_S)
        machine.console.expect("Welcome to GRUB!", timeout=LIMIT_S)
