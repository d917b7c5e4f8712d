"""Tiny guests written in nasm's syntax."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from vmonty.base.errors import UsageError, VmontyError


@functools.cache
def assemble(source: str, bits: int = 16, org: int = 0) -> bytes:
    """The flat binary that nasm makes of *source*, assembled for *bits* (16, 32 or 64) at address *org*.

    Raises UsageError when nasm is not installed, VmontyError with nasm's own message when it refuses the source.
    """
    if shutil.which("nasm") is None:
        raise UsageError("nasm is needed to assemble test guests; on Debian or Ubuntu: apt-get install nasm")
    with tempfile.TemporaryDirectory() as folder:
        listing, image = Path(folder, "guest.asm"), Path(folder, "guest.bin")
        listing.write_text(f"bits {bits}\norg {org:#x}\n{source}\n")
        done = subprocess.run(["nasm", "-f", "bin", "-o", image, listing], capture_output=True, text=True, check=False)
        if done.returncode:
            raise VmontyError(f"nasm: {done.stderr.strip()}")
        return image.read_bytes()
