"""Make the pictures in docs/images (`make screenshots`): each is what a machine on the software KVM shows.

Needs seabios, debian-installer-12-netboot-amd64, chromium and novnc; see debian-packages.txt.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.vmm.display.browser import NOVNC, files, page  # noqa: E402

import vmonty  # noqa: E402
from vmonty.base.errors import UsageError  # noqa: E402

IMAGES = ROOT / "docs/images"
INSTALLER = Path("/usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64")
LIMIT_S = 600.0
SOCKET_PORT = 5777
# How many pixels of the canvas are the installer's blue.
BLUE = """(() => { const c = document.querySelector('canvas'); if (!c || !c.width) return 0;
const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;
for (let i = 0; i < d.length; i += 4) n += d[i] < 10 && d[i + 2] > 150; return n; })()"""


def until(holds: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + LIMIT_S
    while not holds():
        if time.monotonic() > end:
            raise SystemExit("the picture did not come")
        time.sleep(0.5)


def shows(machine: vmonty.VM, text: str) -> bool:
    """Whether the screen is in a text mode, and has it."""
    try:
        return text in machine.screen.text()
    except UsageError:
        return False


def save(png: bytes, name: str) -> None:
    """Few colours are few bytes."""
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(64).save(IMAGES / name, optimize=True)
    print(IMAGES / name, (IMAGES / name).stat().st_size, "bytes")


def save_screen(machine: vmonty.VM, name: str, folder: Path) -> None:
    """What *machine* shows."""
    machine.screen.save(folder / "screen.png")
    save((folder / "screen.png").read_bytes(), name)


def bios_menu(folder: Path) -> None:
    """SeaBIOS with two disks and a network card to choose from."""
    disks = [f"{folder}/first.qcow2,size=1G", f"{folder}/second.qcow2,size=1G,if=ide"]
    with vmonty.VM(
        firmware="bios", boot="menu=on,wait=60000", memory="64M", accel="soft", devices=["VGA"], disks=disks,
        net=[{"type": "user"}],
    ) as machine:  # fmt: skip
        machine.start()
        until(lambda: shows(machine, "Press ESC for boot menu"))
        machine.type("\x1b")
        until(lambda: shows(machine, "\n3. "))
        time.sleep(1)
        save_screen(machine, "seabios.png", folder)


def settled(machine: vmonty.VM) -> bool:
    """Whether the installer's background is there, and nothing moves for some seconds."""
    before = machine.screen.frame()
    if before.height < 400 or bytes(before.pixels[:3]) != b"\xaa\0\0":
        return False
    time.sleep(10)
    return bytes(before.pixels) == bytes(machine.screen.frame().pixels)


def installer(folder: Path) -> None:
    """Its first questions, on its own screen and in a browser, which has answered the first one."""
    with vmonty.VM(
        kernel=INSTALLER / "linux", initrd=INSTALLER / "initrd.gz", append="priority=high quiet", memory="1G",
        accel="soft", vnc=f"127.0.0.1:77,websocket={SOCKET_PORT}",
    ) as machine:  # fmt: skip
        machine.start()
        until(lambda: settled(machine))
        save_screen(machine, "installer.png", folder)
        first = bytes(machine.screen.frame().pixels)
        with files(NOVNC) as port:
            url = f"http://127.0.0.1:{port}/vnc_lite.html?host=127.0.0.1&port={SOCKET_PORT}"
            with page(url, folder / "profile") as shown:
                shown.call(
                    "Emulation.setDeviceMetricsOverride", width=1090, height=800, deviceScaleFactor=1, mobile=False
                )
                shown.wait(f"{BLUE} > 1000")
                shown.evaluate("document.querySelector('canvas').focus()")
                shown.press("Enter", "Enter", "\r", 13)
                until(lambda: bytes(machine.screen.frame().pixels) != first and settled(machine))
                time.sleep(1)
                save(shown.screenshot(), "novnc.png")


def main() -> None:
    """Make them all."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        bios_menu(Path(folder))
        installer(Path(folder))


if __name__ == "__main__":
    main()
