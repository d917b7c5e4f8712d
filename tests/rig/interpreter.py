"""The files of the running Python interpreter, of some of its packages, and of the libraries they need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

# What no test in the rig imports, and what would only make the image larger.
_LEFT_OUT = {
    "config-" + sysconfig.get_config_var("LDVERSION") + "-" + sysconfig.get_config_var("MULTIARCH"),
    "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "tkinter", "turtledemo",
}  # fmt: skip
_LEFT_OUT_MODULE = re.compile(r"(_tkinter|_test\w+|_ctypes_test|xxlimited\w*|_xxtestfuzz)\..*\.so")
_LIBRARY = re.compile(r"(?:=>\s+|^\s*)(/\S+) \(0x", re.MULTILINE)


def binary() -> Path:
    """The interpreter's own executable, behind all virtual environments and links."""
    return Path(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]


def standard_library() -> Iterator[Path]:
    """The standard library's files, sources and compiled ones."""
    for directory, subdirectories, names in os.walk(sysconfig.get_path("stdlib")):
        subdirectories[:] = sorted(set(subdirectories) - _LEFT_OUT)
        for name in sorted(names):
            if not (_LEFT_OUT_MODULE.fullmatch(name) or name.endswith((".opt-1.pyc", ".opt-2.pyc", ".a"))):
                yield Path(directory, name)


def packages(roots: Iterable[str]) -> Iterator[Path]:
    """The files of the installed distributions *roots*, as far as there, and of all that they require."""
    done: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        found = None if name in done else _distribution(name)
        done.add(name)
        if found is None:
            continue
        requirements = map(Requirement, found.requires or ())
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
        for file in sorted(found.files or ()):
            path = Path(os.path.normpath(str(file.locate())))
            if path.is_file():
                yield path


def libraries(objects: Iterable[Path]) -> list[Path]:
    """The shared libraries that ELF *objects* load, the loader included, by the names they load them by."""
    command = ["ldd", *map(str, objects)]
    # Status 1 only says that one of them is linked statically.
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    # A run path may lead up and down again: the loader finds it by the short name also.
    return sorted({Path(os.path.normpath(path)) for path in _LIBRARY.findall(listing)})


def environment_configuration() -> str:
    """A ``pyvenv.cfg`` for the running environment that names the interpreter by its real path."""
    return f"home = {binary().parent}\ninclude-system-site-packages = false\n"


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
