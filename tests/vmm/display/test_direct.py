"""A kernel that is entered directly: text on the screen as after a video BIOS, drawn with that one's font."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.vmm.display.card import Driver

import vmonty
from vmonty.base.errors import UsageError
from vmonty.vm import StateError
from vmonty.vmm.display.screen import Screen
from vmonty.vmm.hw.vga import textmode

LIMIT_S = 120.0
BIOS = Path("/usr/share/seabios/vgabios-stdvga.bin")
needs_bios = pytest.mark.skipif(not BIOS.exists(), reason="no video BIOS: apt-get install seabios")


@needs_bios
def test_characters_are_drawn() -> None:
    driver = Driver()
    textmode.set_text_mode(driver.card.registers, driver.card.memory, BIOS.read_bytes())
    screen = Screen(driver.card.mode, driver.card.memory)
    assert screen.text().strip() == ""
    driver.poke(0xB8000, b"A\x1e")
    assert screen.text().startswith("A")
    frame = screen.frame()
    assert (frame.width, frame.height) == (720, 400)
    # Yellow on blue, as an EGA has them; the bar of the letter is in its eighth line.
    pixels = {bytes(frame.pixels[at : at + 3]) for at in range(7 * 4 * 720, 7 * 4 * 720 + 4 * 8, 4)}
    assert pixels == {b"\x55\xff\xff", b"\xaa\x00\x00"}


def test_a_bios_without_a_font_is_no_mistake() -> None:
    assert textmode.font(b"\x55\xaa" * 100) == bytes(textmode.GLYPH_ROOM * textmode.CHARACTERS)
    assert textmode.font(textmode.SMILE) == bytes(textmode.GLYPH_ROOM * textmode.CHARACTERS)


@needs_bios
@pytest.mark.usefixtures("busybox_guest")
def test_the_default_guest_has_a_shell_on_the_screen() -> None:
    with vmonty.VM(memory="128M", accel="soft", devices="VGA") as vm:
        vm.start()
        until(vm, "/root #")
        vm.type("echo $((6 * 7)) $(tty); exit\n")
        # The next shell's prompt, too: what is typed while the terminal is hung up is lost in part.
        until(vm, "\n42 /dev/tty1\n", then="/root #")
        vm.type("echo $((7 * 7))\n")
        until(vm, "\n49\n")
        vm.console.expect("/root # ", LIMIT_S)
        vm.console.sendline("tty; poweroff -f")
        vm.console.expect("/dev/ttyS0", LIMIT_S)
        assert vm.wait(LIMIT_S) is not None


@needs_bios
@pytest.mark.usefixtures("busybox_guest")
@pytest.mark.parametrize("board", ["pc", "q35"])
def test_linux_shows_its_messages(board: str) -> None:
    line = "console=ttyS0 console=tty0 cryptomgr.notests=1"
    with vmonty.VM(append=line, machine=board, memory="128M", accel="soft", devices="VGA") as vm:
        assert vm._machine is not None
        assert vm._machine.platform().vga, "ACPI says that there is an adapter"
        vm.start()
        until(vm, "userspace is up")
        vm.reset()
        until(vm, "userspace is up", but="userspace is up")


def until(vm: vmonty.VM, text: str, but: str = "", then: str = "") -> None:
    """Wait for *text* on the screen and *then* behind it, with *but* for a screen without that before."""
    end = time.monotonic() + LIMIT_S
    while but and but in (seen := shown(vm)):
        assert time.monotonic() < end, seen
        time.sleep(0.02)
    while True:
        seen = "\n".join(line.rstrip() for line in shown(vm).splitlines()) + "\n"
        if then in seen.partition(text)[2] and text in seen:
            return
        assert time.monotonic() < end, seen
        time.sleep(0.1)


def shown(vm: vmonty.VM) -> str:
    try:
        return vm.screen.text()
    except (UsageError, StateError) as error:  # a picture, or between two machines
        return str(error)
