"""The rig's initramfs: a base segment that is cached, and a segment for each run with our tree in it.

Everything lies in the guest where it lies on the host: then the interpreter's library paths hold, compiled
.pyc files stay valid, and a traceback's paths can be opened here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import stat
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from packaging.requirements import Requirement

from vmonty.guests import busybox, cpio
from vmonty.guests.busybox import Guest
from vmonty.guests.cache import Artefact, Shelf
from vmonty.guests.progress import Progress

from . import interpreter

PROJECT = Path(__file__).resolve().parents[2]
_TEST_PACKAGES = ("pytest", "hypothesis", "iced-x86")
_PROGRAMS = ("nasm",)
_MODULES = (
    "irqbypass", "kvm", "kvm-amd",
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_console",
)  # fmt: skip
_NOT_OURS = {".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
# Raise it when this file writes something else into the base segment.
_RECIPE = 1

_VMONTY = """\
#!/bin/sh
exec python -c 'import sys; from vmonty.cli.main import main; sys.exit(main())' "$@"
"""


def base(guest: Guest, progress: Progress) -> Artefact:
    """The base segment, from the cache if nothing in it has changed since it was built."""
    programs = [Path(path) for path in map(shutil.which, _PROGRAMS) if path]
    files = [
        interpreter.binary(),
        *interpreter.standard_library(),
        *interpreter.packages(_required()),
        *programs,
    ]
    # With the checkout, which it belongs to: another checkout has other packages, and would throw this one out.
    shelf = Shelf("rig", root=PROJECT / "build")
    name = f"base-{_key(guest, files)}.cpio"
    if (artefact := shelf.get(name)) is not None:
        return artefact
    modules = busybox.kernel_modules(_MODULES, progress=progress)
    with shelf.lock(progress):
        progress("building the rig's base image", 0, 0)
        with shelf.write(name) as out:
            _write_base(out, guest, files, modules)
        for other in set(shelf.names()) - {name}:
            shelf.remove(other)
        artefact = shelf.get(name)
    assert artefact is not None
    return artefact


def write_run(
    out: IO[bytes],
    command: Sequence[str],
    *,
    kvm_amd: Mapping[str, str],
    files: Mapping[str, Path],
    environment: Mapping[str, str],
    shell: bool = False,
) -> None:
    """Write the segment of one run: our tree as it is now, the *command* and its settings, and *files*.

    *files* maps absolute paths in the guest to files here; *kvm_amd* are the vendor module's parameters.
    """
    variables = {
        "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(PROJECT / "src"),
        "VMONTY_RIG_OUT": "/rig/out",
        **environment,
    }
    settings = [
        f"KVM_AMD={shlex.quote(' '.join(f'{name}={value}' for name, value in kvm_amd.items()))}",
        f"SHELL_WANTED={'yes' if shell else ''}",
        f"WORKING_DIRECTORY={shlex.quote(str(PROJECT))}",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
    ]
    with cpio.Writer(out) as writer:
        for path in _tree():
            writer.host_file(_inside(path), path)
        for name, path in files.items():
            writer.host_file(name.lstrip("/"), path)
        writer.file("rig/settings", "\n".join([*settings, ""]).encode())
        writer.file("rig/command", f"cd {shlex.quote(str(PROJECT))}\n{shlex.join(command)}\n".encode())


def default_guest(guest: Guest) -> dict[str, Path]:
    """Files that put *guest* into the cache inside the rig, so that ``vmonty run`` there finds it."""
    directory = "/root/.cache/vmonty/guests/busybox"
    manifest = guest.kernel.with_name("manifest.json")
    return {f"{directory}/{path.name}": path for path in (guest.kernel, guest.initrd, manifest)}


def _write_base(out: IO[bytes], guest: Guest, files: Sequence[Path], modules: Mapping[str, bytes]) -> None:
    objects = [path for path in files if path.suffix == ".so" or os.access(path, os.X_OK)]
    cache = Path("/etc/ld.so.cache")
    with guest.initrd.open("rb") as source, cpio.Writer(out) as writer:
        for entry in cpio.read(source):
            if entry.name == "bin/busybox":
                writer.file(entry.name, entry.data, mode=0o755, mtime=entry.mtime)
        init = Path(__file__).with_name("init.sh")
        writer.host_file("init", init, mode=0o755)
        writer.directory("dev")
        writer.device("dev/console", stat.S_IFCHR, 5, 1)
        for name, data in modules.items():
            writer.file(f"rig/modules/{name}.ko", data)
        for path in sorted({*files, *interpreter.libraries(objects), *filter(Path.exists, [cache])}):
            writer.host_file(_inside(path), path)
        if sys.prefix != sys.base_prefix:
            configuration = interpreter.environment_configuration().encode()
            writer.file(_inside(Path(sys.prefix, "pyvenv.cfg")), configuration)
        for name in ("python", "python3"):
            target = Path(sys.prefix, "bin", name)
            if target != interpreter.binary():
                writer.symlink(_inside(target), str(interpreter.binary()))
        writer.file("usr/local/bin/vmonty", _VMONTY.encode(), mode=0o755)


def _key(guest: Guest, files: Iterable[Path]) -> str:
    """A name for the base segment's contents. The libraries are covered by the loader's cache of them."""
    extra = [Path("/etc/ld.so.cache"), Path(__file__).with_name("init.sh")]
    stats = [
        (str(path), status.st_size, status.st_mtime_ns)
        for path in [*files, *extra]
        if (status := _stat(path)) is not None
    ]
    content = [_RECIPE, guest.kernel_sha256, guest.initrd_sha256, sys.prefix, _MODULES, stats]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _required() -> list[str]:
    """The distributions that vmonty declares, and those its tests in the rig import: no more than a user has."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return [*(Requirement(text).name for text in project["dependencies"]), *_TEST_PACKAGES]


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _tree() -> Iterator[Path]:
    yield PROJECT / "pyproject.toml"
    for top in ("src", "tests"):
        for directory, subdirectories, names in os.walk(PROJECT / top):
            subdirectories[:] = sorted(set(subdirectories) - _NOT_OURS)
            yield from (Path(directory, name) for name in sorted(names))


def _inside(path: Path) -> str:
    return str(path).lstrip("/")
