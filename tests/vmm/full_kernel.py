"""Debian's kernel for all machines, whose modules the cloud kernel lacks; fetched once, by the host's apt."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import closing

from vmonty.guests import debian
from vmonty.guests.cache import Artefact, Shelf

META_PACKAGES = ("linux-image-amd64", "linux-image-generic")


def archive() -> Artefact:
    """Its package. Raises GuestError where there is none."""
    shelf = Shelf("tests", "kernel")
    with shelf.lock(lambda *_: None):
        held = debian.held(shelf, debian.is_kernel)
        return held[1] if held is not None else debian.fetch(debian.resolve_kernel(META_PACKAGES), shelf)


def files(modules: Sequence[str]) -> tuple[bytes, dict[str, bytes]]:
    """The bzImage, and *modules* by name."""
    names = "|".join(re.escape(name) for name in modules)
    kernel, found = b"", {}
    pattern = rf"boot/vmlinuz-[^/]+|(?:usr/)?lib/modules/[^/]+/kernel/(?:.*/)?(?:{names})\.ko"
    with closing(debian.members(archive().path, pattern)) as members:
        for member in members:
            contents = io.BytesIO()
            member.copy_to(contents)
            name = member.name.rpartition("/")[2]
            if name.startswith("vmlinuz"):
                kernel = contents.getvalue()
            else:
                found[name.removesuffix(".ko")] = contents.getvalue()
    assert kernel
    assert not set(modules) - found.keys(), "this kernel has other modules"
    return kernel, found
