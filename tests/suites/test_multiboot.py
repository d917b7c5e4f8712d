"""The runner of Multiboot test images, with images of our own."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from vmonty.testing.nasm import assemble

from . import multiboot

HEADER = "dd 0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000)\n dd {at}, {at}, 0, 0, {at} + 32\n"
SAYS = """
    mov edx, 0x3f8
    mov al, 'k'
    out dx, al
    mov eax, 0x12345678
    out 0xe0, eax
    in al, 0xe8
    cmp al, 0x78
    jne bad
    mov [0xff000010], eax
    cmp [0xff000010], eax
    jne bad
    mov eax, {status}
    out 0xf4, eax
bad: mov al, 1
    out 0xf4, al
"""


def image(folder: Path, at: int, source: str) -> Path:
    path = folder / "test.flat"
    path.write_bytes(assemble(HEADER.format(at=at) + source, 32, at))
    return path


@pytest.mark.parametrize("at", [0x8000, 0x400000])
@pytest.mark.parametrize(("status", "word"), [(0, "PASS"), (38, "SKIP"), (2, "FAIL")])
def test_status_text_and_devices(tmp_path: Path, at: int, status: int, word: str) -> None:
    result = multiboot.run(multiboot.Run("t", image(tmp_path, at, SAYS.format(status=status))), "soft")
    assert (result.status, result.word, result.text) == (status, word, "k")


def test_an_image_that_does_not_end(tmp_path: Path) -> None:
    run = multiboot.Run("t", image(tmp_path, 0x400000, "jmp $"), seconds=0.3)
    assert multiboot.run(run, "soft").word == "TIMEOUT"


def test_configuration(tmp_path: Path) -> None:
    config = tmp_path / "tests.cfg"
    config.write_text(
        "# what there is\n[one]\nfile = a.flat\nsmp = 2\ntest_args = 'x y'\n"
        "qemu_params = -cpu qemu64,+x2apic,vendor=Any -m 2048\n[two]\nfile = b.flat\narch = i386\n"
    )
    assert list(multiboot.configured(config, "x86_64")) == [
        multiboot.Run("one", tmp_path / "a.flat", "x y", 2, "qemu64,+x2apic", 2 << 30)
    ]


def test_images_elsewhere_stay_as_they_are(tmp_path: Path) -> None:
    data = image(tmp_path, 0x400000, "hlt").read_bytes()
    assert multiboot.movable(data) == data
    moved = multiboot.movable(image(tmp_path, 0x8000, "hlt").read_bytes())
    assert struct.unpack_from("<I", moved, 16)[0] == multiboot.STAGING
