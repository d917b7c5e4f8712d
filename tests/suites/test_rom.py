"""The runner of ROM images, with images of our own; --rom runs a user's (see rom.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmonty.base.errors import UsageError
from vmonty.testing.nasm import assemble

from . import rom

SOURCE = """
    mov al, 1
    out 0x80, al
    mov dx, 0x3fd
    in al, dx
    test al, 0x20
    jz stop
    mov dx, 0x3f8
    mov al, 'k'
    out dx, al
    mov al, 0xff
    out 0x80, al
stop:
    hlt
    times 0xff0 - ($ - $$) db 0
    jmp 0xf000:0xf000
    times 0x1000 - ($ - $$) db 0xff
"""


def test_image_runs_from_the_reset_vector() -> None:
    outcome = rom.run(assemble(SOURCE, 16, 0xF000), 0x80)
    assert (outcome.codes, outcome.text, outcome.reason) == ([1, 0xFF], "k", "halt")


def test_endless_image_ends_with_its_time() -> None:
    image = assemble("times 0xff0 db 0x90\n jmp $\n times 0x1000 - ($ - $$) db 0", 16, 0xF000)
    assert rom.run(image, 0x80, seconds=0.1).reason == "run_flag"


def test_size_of_the_image() -> None:
    with pytest.raises(UsageError, match="multiple of 4096"):
        rom.run(b"\xf4", 0x80)


def test_image_of_the_user(request: pytest.FixtureRequest) -> None:
    """--rom FILE,POST_PORT: success is POST code FF."""
    given = request.config.getoption("--rom")
    if given is None:
        pytest.skip("no ROM image given: --rom FILE,POST_PORT")
    path, _, port = given.rpartition(",")
    outcome = rom.run(Path(path).read_bytes(), int(port, 0))
    assert outcome.codes[-1:] == [0xFF], f"{outcome.codes} {outcome.reason} at {outcome.where}"
