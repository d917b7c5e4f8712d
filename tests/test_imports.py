"""Imports point downwards only: DESIGN's floors, read from the syntax tree of every module, lazy imports too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "src"

# A part imports parts of lower floors; two on one floor do not know each other.
FLOORS = {"base": 0, "cpu": 1, "kvm": 2, "vmm": 3, "guests": 3, "host": 4, "vm": 4, "bench": 4.75, "cli": 5}
TESTING_FLOOR = 4.5
ROOT = {"vmonty": 4.25, "vmonty.__main__": 6}  # the package itself hands out vm.VM

# What these must not import, beyond the floors.
FENCES = [
    ("vmonty.vmm", ("vmonty.cpu", "vmonty.kvm.soft", "vmonty.kvm.linux"), "vmm knows KVM by its API only"),
    ("vmonty.kvm.linux", ("vmonty.kvm.soft", "vmonty.cpu"), "providers do not know each other"),
    ("vmonty.kvm.soft", ("vmonty.kvm.linux",), "providers do not know each other"),
    ("vmonty.kvm.api", ("vmonty.kvm.soft", "vmonty.kvm.linux", "vmonty.cpu"), "the API serves every provider"),
    ("vmonty.kvm.uapi", ("vmonty.kvm.soft", "vmonty.kvm.linux", "vmonty.kvm.api", "vmonty.cpu"), "the ABI is data"),
    ("vmonty.vmm.hw", ("vmonty.vmm.boards", "vmonty.vmm.machine"), "devices do not know where they are"),
    ("vmonty.vmm.virtio", ("vmonty.vmm.boards", "vmonty.vmm.machine"), "devices do not know where they are"),
]
# Folders of siblings that do not know each other → those that all of them may import.
SIBLINGS = {"vmonty.vmm.hw": ("pci",), "vmonty.vmm.virtio": ("queue", "device", "pci")}
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of everything of vmonty that *path* imports: at the top, in functions, for types, by cimport."""
    text = path.read_text()
    if path.suffix == ".pxd":
        for number, line in enumerate(text.splitlines(), 1):
            if found := re.match(r"\s*(?:from\s+(vmonty[\w.]*)\s+c?import|c?import\s+(vmonty[\w.]*))", line):
                yield number, found[1] or found[2]
        return
    package = module_name(path, root) if path.name == "__init__.py" else module_name(path.parent / "__init__.py", root)
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, *filter(None, [base])])
                whole = [f"{base}.{alias.name}" for alias in node.names]
                modules = [name for name in whole if is_module(name, root)]
                names = modules if len(modules) == len(whole) else [base, *modules]
            case ast.Call(func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module")):
                names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            plain = name.removeprefix("cython.cimports.")
            if inside(plain, "vmonty"):
                yield getattr(node, "lineno", 0), plain


def is_module(name: str, root: Path) -> bool:
    place = root.joinpath(*name.removeprefix("cython.cimports.").split("."))
    return place.is_dir() or place.with_suffix(".py").exists()


def floor(name: str) -> float | None:
    if name in ROOT:
        return ROOT[name]
    part = name.split(".")[1]
    return TESTING_FLOOR if part == "testing" else FLOORS.get(part)


def verdict(importer: str, imported: str) -> str | None:
    """Why *importer* must not import *imported*, or None when it may."""
    if imported == "vmonty" and importer != "vmonty.__main__":
        # The bare package: its version, from the command line only.
        return None if inside(importer, "vmonty.cli") else "a part does not import the package around it"
    mine, theirs = floor(importer), floor(imported)
    if mine is None or theirs is None:
        return "a part without a floor: give it one in tests/test_imports.py"
    if inside(imported, "vmonty.testing") and not any(
        inside(importer, user) for user in ("vmonty.testing", "vmonty.bench")
    ):
        return "only tests and measurements import vmonty.testing"
    same = importer.split(".")[1:2] == imported.split(".")[1:2]
    if theirs > mine or (theirs == mine and not same):
        return "imports point downwards only"
    for package, forbidden, why in FENCES:
        if inside(importer, package) and any(inside(imported, name) for name in forbidden):
            return why
    for folder, shared in SIBLINGS.items():
        if importer.startswith(folder + ".") and imported.startswith(folder + "."):
            sibling = imported.removeprefix(folder + ".").split(".")[0]
            if sibling != importer.removeprefix(folder + ".").split(".")[0] and sibling not in shared:
                return "siblings do not know each other"
    return None


def violations(root: Path) -> list[str]:
    """One line for each broken rule in the package below *root*."""
    found = []
    for path in sorted(root.glob("vmonty/**/*.p*")):
        if path.suffix not in (".py", ".pxd"):
            continue
        importer = module_name(path, root)
        if path.stem in NAMELESS or path.parent.name in NAMELESS:
            found.append(f"{path.relative_to(root)}: a name that says nothing")
        for line, imported in imports(path, root):
            if why := verdict(importer, imported):
                found.append(f"{path.relative_to(root)}:{line}: {importer} imports {imported}: {why}")
    return found


def test_the_package_keeps_the_rules() -> None:
    assert len(list(SOURCES.glob("vmonty/**/*.py"))) > 50
    broken = violations(SOURCES)
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("where", "source", "why"),
    [
        ("base/ram.py", "import vmonty.kvm", "downwards"),
        ("base/ram.py", "from vmonty import kvm", "downwards"),
        ("cpu/core.py", "from vmonty.kvm.api import Vm", "downwards"),
        ("cpu/core.pxd", "from vmonty.kvm.soft.mmu cimport walk", "downwards"),
        ("cpu/core.py", "from cython.cimports.vmonty.kvm import api", "downwards"),
        (
            "kvm/api/vm.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vmonty.vmm import bus",
            "downw",
        ),
        ("kvm/api/vm.py", "def late():\n    from ...vmm import bus", "downwards"),
        ("kvm/api/vm.py", "from importlib import import_module\nimport_module('vmonty.vmm.bus')", "downwards"),
        ("kvm/api/vm.py", "from vmonty.kvm import linux", "every provider"),
        ("kvm/uapi/irq.py", "from vmonty.kvm.api import Vm", "ABI is data"),
        ("kvm/linux.py", "import vmonty.kvm.soft.mmu", "providers"),
        ("kvm/soft/mmu.py", "from vmonty.kvm.linux import DEVICE", "providers"),
        ("vmm/machine.py", "from vmonty.cpu import core", "API only"),
        ("vmm/machine.py", "from vmonty.kvm import linux", "API only"),
        ("vmm/machine.py", "def late():\n    import vmonty.kvm.soft", "API only"),
        ("vmm/machine.py", "from vmonty.guests import busybox", "downwards"),
        ("guests/busybox.py", "from vmonty.vmm import machine", "downwards"),
        ("vmm/hw/serial.py", "from . import cmos", "siblings"),
        ("vmm/hw/serial.py", "from vmonty.vmm.hw.cmos import Cmos", "siblings"),
        ("vmm/hw/serial.py", "from ..machine import Machine", "where they are"),
        ("vmm/virtio/blk.py", "from vmonty.vmm.virtio.net import Net", "siblings"),
        ("vmm/boot/linux.py", "from vmonty import __version__", "package around it"),
        ("host.py", "from vmonty.cli import main", "downwards"),
        ("cli/run.py", "from vmonty.testing import nasm", "only tests"),
        ("testing/nasm.py", "from vmonty.cli.main import cli", "downwards"),
        ("newpart/thing.py", "import vmonty.base.ram", "without a floor"),
        ("vmm/utils.py", "", "says nothing"),
        ("vmm/common/thing.py", "", "says nothing"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, where: str, source: str, why: str) -> None:
    for known in ("kvm/linux.py", "kvm/soft/mmu.py", "vmm/bus.py", "vmm/machine.py", "vmm/hw/cmos.py", "cpu/core.py"):
        write(tmp_path, known, "")
    write(tmp_path, where, source)
    broken = violations(tmp_path)
    assert len({line.split(":")[0] for line in broken}) == 1, broken
    assert why in broken[0]


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("vmm/accel.py", "from vmonty import kvm\nfrom vmonty.kvm.api import System\nfrom vmonty.kvm.uapi import Exit"),
        ("vmm/boot/acpi.py", "from vmonty.vmm.hw import acpi_pm"),
        ("vmm/virtio/blk.py", "from vmonty.vmm.virtio.queue import Queue"),
        ("host.py", "from vmonty.guests import cache\nfrom vmonty.kvm import linux\nfrom vmonty.vmm import accel"),
        ("cli/run.py", "from vmonty import __version__, host\nfrom vmonty.guests import busybox"),
        ("testing/guests.py", "from vmonty.vmm import machine\nfrom vmonty.cpu import core"),
        ("kvm/soft/mmu.py", "from vmonty.cpu import core"),
        ("__init__.py", "from vmonty.vm import VM"),
        ("__main__.py", "from vmonty.cli.main import main"),
    ],
)
def test_what_is_allowed(tmp_path: Path, where: str, source: str) -> None:
    for known in ("host.py", "kvm/linux.py", "vmm/accel.py"):
        write(tmp_path, known, "")
    write(tmp_path, where, source)
    assert violations(tmp_path) == []


def write(root: Path, where: str, source: str) -> None:
    path = root / "vmonty" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
