"""A Debian mirror on the loopback: an index of ours, without a signature, of packages that apt fetched and checked."""

from __future__ import annotations

import gzip
import hashlib
import http.server
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import unquote

from tests.serving import serving

from ..apt_root import DEBS, Stanza


def release(codename: str, version: str, indices: dict[str, bytes]) -> bytes:
    """A Release file for *indices*, by their paths below it."""
    lines = [
        "Origin: Debian", "Label: Debian", "Suite: stable", f"Codename: {codename}", f"Version: {version}",
        f"Date: {format_datetime(datetime.now(UTC), usegmt=True)}", "Architectures: amd64", f"Components: {DEBS}",
        "SHA256:",
    ]  # fmt: skip
    lines += [f" {hashlib.sha256(data).hexdigest()} {len(data)} {path}" for path, data in indices.items()]
    return "\n".join([*lines, ""]).encode()


class Mirror:
    """What is served: files on disk and in memory by their paths, and a log line for each request."""

    def __init__(self, log: Callable[[str], object]) -> None:
        self.files: dict[str, Path | bytes] = {}
        self.log = log

    def add(self, codename: str, version: str, packages: dict[str, list[Stanza]], files: dict[str, Path]) -> None:
        """An archive below /debian, with *packages* by component."""
        indices: dict[str, bytes] = {}
        for component, wanted in packages.items():
            # debootstrap takes a stanza when it meets the empty line behind it, the last one too.
            text = "".join(f"{stanza.text}\n\n" for stanza in wanted).encode()
            path = f"{component}/binary-amd64/Packages"
            indices |= {path: text, f"{path}.gz": gzip.compress(text, mtime=0)}
            indices[f"{component}/binary-amd64/Release"] = f"Component: {component}\nArchitecture: amd64\n".encode()
        made = indices | {"Release": release(codename, version, indices)}
        for name in (codename, "stable"):
            self.files |= {f"/debian/dists/{name}/{path}": data for path, data in made.items()}
        self.files |= {f"/debian/{path}": file for path, file in files.items()}

    @contextmanager
    def serve(self) -> Iterator[int]:
        """Serve on the loopback while the block runs; its port."""
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = mirror.files.get(unquote(self.path))
                data = found.read_bytes() if isinstance(found, Path) else found
                mirror.log(f"{200 if data is not None else 404} {self.path}")
                self.send_response(200 if data is not None else 404)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data or b"")

            do_HEAD = do_GET  # noqa: N815  # the base class's name

            def log_message(self, *words: object) -> None:
                """Say nothing: the mirror's log has a line for each request."""

        with serving(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
            yield port
