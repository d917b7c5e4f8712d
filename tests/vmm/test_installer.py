"""The Debian installer's kernel, Debian's stock one, and its initrd, to the installer's first question."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vmonty

LIMIT_S = 240.0
FOLDER = Path("/usr/lib/debian-installer/images/12/amd64/text/debian-installer/amd64")


@pytest.mark.skipif(not FOLDER.is_dir(), reason="debian-installer-12-netboot-amd64 is not installed")
def test_first_question() -> None:
    with vmonty.VM(
        kernel=FOLDER / "linux",
        initrd=FOLDER / "initrd.gz",
        memory="1G",
        accel="soft",
        append="console=ttyS0 TERM=linux",
    ) as machine:
        machine.start()
        machine.console.expect(re.compile(rb"Linux version 6\.1\.0-\d+-amd64 "), timeout=LIMIT_S)
        # Its languages, the first of them without letters of its own alphabet.
        machine.console.expect(re.compile(b"Choose the language|Select a language|English"), timeout=LIMIT_S)
