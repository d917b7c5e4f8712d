"""Guests' programs, compiled by gcc when they are measured."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vmonty.base.cachedir import cache_root
from vmonty.base.errors import VmontyError


class PayloadError(VmontyError):
    """The payloads cannot be built or run here."""


def compiled(name: str, command: Sequence[str], sources: Sequence[Path], also: Sequence[Path] = ()) -> Path:
    """What *command* makes of *sources*, once for each of their contents, which include the headers *also*.

    *name* is the file's, in which ``*`` stands for a digest. Raises PayloadError.
    """
    contents = b"".join(path.read_bytes() for path in (*sources, *also))
    digest = hashlib.sha256(" ".join(command).encode() + contents).hexdigest()
    path = cache_root() / "bench" / name.replace("*", digest[:16])
    if not path.exists():
        if shutil.which("gcc") is None:
            raise PayloadError("the benchmark's guest is compiled by gcc, which is not there: apt-get install gcc")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        done = subprocess.run(
            [*command, "-o", part, *sources], capture_output=True, text=True, timeout=120, check=False
        )  # fmt: skip
        if done.returncode:
            raise PayloadError(f"gcc could not build the benchmark's guest: {done.stderr.strip().splitlines()[-1]}")
        part.replace(path)
    return path
