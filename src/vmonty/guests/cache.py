"""Artefacts that were fetched or built once, kept under the XDG cache directory and never trusted blindly.

A ``Shelf`` is one directory:

    <XDG_CACHE_HOME>/vmonty/<shelf>/manifest.json    name → size, SHA-256 and notes of every finished artefact
                                    <artefact>       appears by rename, complete and on disk
                                    lock             held while a builder works

What the manifest does not name, or whose checksum differs, does not exist: it is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import IO, Any

from vmonty.base.cachedir import cache_root
from vmonty.base.errors import GuestError
from vmonty.guests.progress import Progress, silent

_MANIFEST = "manifest.json"
_LOCK = "lock"
_FORMAT = 1


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, as hexadecimal digits."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


@dataclass(frozen=True)
class Artefact:
    """A finished file: it was complete, and its checksum was right, when it was handed out."""

    path: Path
    sha256: str
    notes: Mapping[str, str] = field(default_factory=dict)


class Shelf:
    """One directory of artefacts. Any number of processes may read; one at a time holds ``lock()``."""

    def __init__(self, *parts: str, root: Path | None = None) -> None:
        self.directory = (root or cache_root()).joinpath(*parts)

    @contextmanager
    def lock(self, progress: Progress = silent) -> Iterator[None]:
        """Be the only builder on this shelf; waits for another one to finish. Not reentrant."""
        with _writable(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"waiting for another build in {self.directory}", 0, 0)
                fcntl.flock(handle, fcntl.LOCK_EX)
            self._sweep()
            yield
        finally:
            os.close(handle)

    def get(self, name: str) -> Artefact | None:
        """The artefact *name* if it is there and its checksum is right, else None."""
        entry = self._manifest().get(name)
        path = self.directory / name
        if entry is None:
            return None
        try:
            # The size is compared first: it finds most damage without reading the file.
            if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                return None
        except OSError:
            return None
        return Artefact(path, entry["sha256"], entry["notes"])

    @contextmanager
    def write(self, name: str, notes: Mapping[str, str] | None = None) -> Iterator[IO[bytes]]:
        """Make or replace the artefact *name* with what the ``with`` body writes.

        It appears, complete and synced to disk, only when the body ends without an exception; until then
        an older one stays. Call it with the lock held.
        """
        if name in {"", _MANIFEST, _LOCK} or name != os.path.basename(name) or name.startswith("."):
            raise ValueError(f"{name!r} cannot be an artefact's name")
        with _writable(self.directory):
            with _replacing(self.directory / name) as out:
                yield out
                out.flush()
                out.seek(0)
                digest = hashlib.file_digest(out, "sha256").hexdigest()
                size = out.tell()
            # In this order a crash between the two leaves a checksum that differs: noticed, and redone.
            entries = self._manifest()
            entries[name] = {"size": size, "sha256": digest, "notes": dict(notes or {})}
            self._save(entries)

    def remove(self, name: str) -> None:
        """Forget the artefact *name* and delete its file. Call it with the lock held."""
        with _writable(self.directory):
            entries = self._manifest()
            if entries.pop(name, None) is not None:
                self._save(entries)
            (self.directory / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The names in the manifest; ``get`` tells which of them are sound."""
        return sorted(self._manifest())

    def _manifest(self) -> dict[str, Any]:
        try:
            content = json.loads((self.directory / _MANIFEST).read_bytes())
            if content["format"] != _FORMAT:
                return {}
            return {name: entry for name, entry in content["artefacts"].items() if _is_entry(entry)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}

    def _save(self, entries: Mapping[str, Any]) -> None:
        content = {"format": _FORMAT, "artefacts": entries}
        with _replacing(self.directory / _MANIFEST) as out:
            out.write(json.dumps(content, indent=1, sort_keys=True).encode())

    def _sweep(self) -> None:
        """Delete what a killed builder left; only the holder of the lock may."""
        for leftover in self.directory.glob(".*.partial"):
            with suppress(OSError):
                leftover.unlink()


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("notes"), dict)
        and all(isinstance(text, str) for text in entry["notes"].values())
    )


@contextmanager
def _replacing(path: Path) -> Iterator[BufferedRandom]:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "w+b") as out:
            yield out
            out.flush()
            os.fchmod(out.fileno(), 0o644)
            os.fsync(out.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _writable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # A failed write carries no file name, mkdir() that of a parent; other files' errors pass by.
        named = Path(os.fsdecode(error.filename)) if error.filename is not None else directory
        if not (named.is_relative_to(directory) or directory.is_relative_to(named)):
            raise
        raise GuestError(
            f"cannot write to the cache {directory}: {error.strerror}; "
            "make room there, or set XDG_CACHE_HOME to another directory"
        ) from error
