"""Where this user's caches are."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/vmonty``, by default ``~/.cache/vmonty``.

    Source: XDG Base Directory Specification, which says to ignore a relative path in the variable.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "vmonty"
