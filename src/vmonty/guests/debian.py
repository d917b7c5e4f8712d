"""Packages from the host's own apt: which version, fetched, checked, and single files out of it.

Only the tools ``apt-cache``, ``apt-get`` and ``dpkg-deb`` are called; where packages come from is the
host's configuration. Nothing is installed. Each failure is one GuestError line with the remedy.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vmonty.base.errors import GuestError
from vmonty.guests.cache import Artefact, Shelf, sha256
from vmonty.guests.progress import Progress, silent

_POLL_S = 0.1


@dataclass(frozen=True)
class Package:
    """One version of a package as apt's lists describe it. *size* is the archive's, in bytes."""

    name: str
    version: str
    architecture: str
    size: int
    sha256: str
    depends: tuple[str, ...] = ()

    @property
    def archive(self) -> str:
        """The file name under which the archive is kept; an epoch's colon is written as apt writes it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


def find(name: str) -> Package | None:
    """The version of *name* that apt would install, or None if apt's lists have no such package.

    Raises GuestError when there are no lists to look into.
    """
    found = _describe(name)
    if found is None and not _has_lists():
        raise GuestError("apt has no package lists: run `apt-get update` as root and try again")
    return found


def require(name: str) -> Package:
    """As ``find``, but a package that is not there is a GuestError."""
    found = find(name)
    if found is None:
        raise GuestError(
            f"apt knows no package {name}: run `apt-get update` as root, "
            "or use a Debian or Ubuntu release for x86-64 that has it"
        )
    return found


def resolve_kernel(candidates: Sequence[str]) -> Package:
    """The real kernel package behind the first of the meta-packages *candidates* that apt knows.

    A meta-package only depends on the kernel of the day (``linux-image-6.1.0-56-cloud-amd64``).
    """
    for candidate in candidates:
        package = find(candidate)
        for _ in range(4):  # Ubuntu chains meta-packages; more links than these mean a loop
            if package is None or is_kernel(package.name):
                break
            kernels = [name for name in package.depends if name.startswith("linux-image-")]
            package = find(kernels[0]) if kernels else None
        if package is not None and is_kernel(package.name):
            return package
    raise GuestError(
        f"apt knows none of the kernel packages {', '.join(candidates)}: run `apt-get update` as root, "
        "or use a Debian or Ubuntu release for x86-64 that has one"
    )


def is_kernel(name: str) -> bool:
    """Whether *name* is that of a real kernel package, not of a meta-package."""
    return re.match(r"linux-image-(unsigned-)?\d+\.\d+", name) is not None


def held(shelf: Shelf, accept: Callable[[str], bool]) -> tuple[Package, Artefact] | None:
    """A package on *shelf* whose name *accept* takes, with its sound archive: no apt is needed for it."""
    for name in shelf.names():
        artefact = shelf.get(name)
        if artefact is not None and accept(artefact.notes.get("package", "")):
            notes = artefact.notes
            package = Package(
                notes["package"],
                notes.get("version", ""),
                notes.get("architecture", ""),
                artefact.path.stat().st_size,
                artefact.sha256,
                tuple(notes.get("depends", "").split()),
            )
            return package, artefact
    return None


def fetch(package: Package, shelf: Shelf, progress: Progress = silent) -> Artefact:
    """The archive of *package* from *shelf*, downloaded first if need be. Call it with the shelf locked.

    An archive whose checksum is not that of apt's lists is never kept: it is fetched again, then refused.
    """
    kept = shelf.get(package.archive)
    if kept is not None and kept.sha256 == package.sha256:
        return kept
    notes = {
        "package": package.name,
        "version": package.version,
        "architecture": package.architecture,
        "depends": " ".join(package.depends),
    }
    for _ in range(2):
        with _download(package, progress) as archive:
            if sha256(archive) == package.sha256:
                with archive.open("rb") as source, shelf.write(package.archive, notes) as out:
                    shutil.copyfileobj(source, out)
                break
    else:
        raise GuestError(f"{package.archive} was damaged on its way, twice: run `apt-get update` as root and try again")
    artefact = shelf.get(package.archive)
    if artefact is None:
        raise GuestError(f"{shelf.directory / package.archive} changed while it was written; try again")
    return artefact


@dataclass(frozen=True)
class Member:
    """A regular file of a package. Its contents can be copied until the next member is asked for."""

    name: str
    size: int
    mode: int
    mtime: int
    _contents: IO[bytes]

    def copy_to(self, out: IO[bytes]) -> None:
        """Append the contents to *out*."""
        try:
            shutil.copyfileobj(self._contents, out, 1 << 20)
        except tarfile.TarError as error:
            raise GuestError(f"{self.name}: its package is damaged ({error}); delete it and try again") from error


def members(archive: Path, wanted: str) -> Generator[Member, None, None]:
    """Yield the regular files of a .deb whose whole path (no leading slash) matches the pattern *wanted*.

    Nothing is written under a name from the archive: the caller decides where the contents go.
    """
    command = [tool("dpkg-deb"), "--fsys-tarfile", str(archive)]
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages) as process,
    ):
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                for info in tar:
                    name = info.name.removeprefix("./")
                    contents = tar.extractfile(info) if info.isreg() and re.fullmatch(wanted, name) else None
                    if contents is not None:
                        yield Member(name, info.size, info.mode, int(info.mtime), contents)
            # Let dpkg-deb end by itself: it may be writing padding behind the archive's end.
            while process.stdout.read(1 << 16):
                pass
        except tarfile.TarError as error:
            raise GuestError(f"{archive} is no sound package ({error}); delete it and try again") from error
        except BaseException:
            process.kill()
            raise
        if process.wait():
            reason = _last_line(_text(messages))
            raise GuestError(f"{archive} is no sound package ({reason}); delete it and try again")


def tool(name: str) -> str:
    """The path of a host program. GuestError names the package to install."""
    path = shutil.which(name)
    if path is None:
        package = {"dpkg-deb": "dpkg", "zstd": "zstd"}.get(name, "apt")
        raise GuestError(
            f"{name} is not on this host, and guests are made from Debian packages with it; "
            f"install the package {package}, or boot a kernel and initrd of your own"
        )
    return path


def _describe(name: str) -> Package | None:
    # The candidate is what apt would install. An installed version that the lists no longer hold has no
    # checksum, and cannot be downloaded: then any listed version will do.
    for options in (["--no-all-versions"], []):
        for stanza in _query([tool("apt-cache"), "show", *options, name]).split("\n\n"):
            fields = dict(
                line.split(": ", 1) for line in stanza.splitlines() if not line.startswith(" ") and ": " in line
            )
            if fields.get("Package") == name and "SHA256" in fields:
                return Package(
                    name,
                    fields["Version"],
                    fields["Architecture"],
                    int(fields.get("Size", 0)),
                    fields["SHA256"].lower(),
                    _dependencies(fields.get("Depends", "")),
                )
    return None


def _dependencies(text: str) -> tuple[str, ...]:
    """Package names in the order of a Depends field, versions dropped, the first of each alternative."""
    names = (re.match(r"[a-z0-9][a-z0-9+.-]*", clause.strip()) for clause in text.split(","))
    return tuple(match[0] for match in names if match)


def _has_lists() -> bool:
    return bool(_query([tool("apt-get"), "indextargets", "--format", "$(FILENAME)", "Created-By: Packages"]).strip())


def _query(command: Sequence[str]) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=_environment(),
        check=False,
    )
    return done.stdout


def _environment() -> dict[str, str]:
    # Field names and messages must not be translated.
    return {**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": "", "DEBIAN_FRONTEND": "noninteractive"}


@contextmanager
def _download(package: Package, progress: Progress) -> Iterator[Path]:
    """Download into a directory that lives as long as the context; yields the archive."""
    phase = f"downloading {package.name} {package.version}"
    with tempfile.TemporaryDirectory(prefix="vmonty-apt-") as name:
        directory = Path(name)
        _give_to_apt(directory)
        command = [
            tool("apt-get"),
            "-q",
            "-o",
            "Acquire::Retries=3",
            "download",
            f"{package.name}={package.version}",
        ]
        with (
            tempfile.TemporaryFile() as messages,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=messages,
                cwd=directory,
                env=_environment(),
            ) as process,
        ):
            try:
                while process.poll() is None:
                    progress(phase, _bytes_in(directory), package.size)
                    time.sleep(_POLL_S)
            except BaseException:
                process.terminate()
                raise
            reason = _text(messages)
        archives = sorted(directory.glob("*.deb"))
        if process.returncode or len(archives) != 1:
            raise _download_error(package, reason)
        progress(phase, package.size, package.size)
        yield archives[0]


def _download_error(package: Package, messages: str) -> GuestError:
    errors = [line.removeprefix("E: ") for line in messages.splitlines() if line.startswith("E: ")]
    reason = errors[0] if errors else _last_line(messages) or "apt-get gave no reason"
    # The lists name a version that the archive has replaced since.
    stale = any(sign in messages for sign in ("404", "was not found", "Unable to locate"))
    remedy = "run `apt-get update` as root" if stale else "check the network and apt's proxy settings"
    return GuestError(f"cannot download {package.name} {package.version}: {reason}; {remedy} and try again")


def _give_to_apt(directory: Path) -> None:
    """Let apt drop its privileges: as root it downloads as the user ``_apt``, who must own the place."""
    if os.geteuid() == 0:
        try:
            os.chown(directory, pwd.getpwnam("_apt").pw_uid, -1)
        except (KeyError, OSError):
            return  # no such user here: apt downloads as root


def _bytes_in(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # renamed by apt in between
    return total


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
