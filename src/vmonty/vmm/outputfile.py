"""Files that a guest's output goes to."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

logger = logging.getLogger(__name__)


class OutputFile:
    """*path*, written at its end and without a buffer; *anew*: emptied first. *what* names it in messages.

    A host that takes no more ends the file, not the guest: that is logged once, and what comes then is dropped.
    Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: Path, what: str, *, anew: bool) -> None:
        self._path, self._what, self._told = path, what, False
        self._lock = threading.Lock()  # a number that is closed may be another file's
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if anew else 0)
        self._fd: int | None = os.open(path, flags, 0o666)

    def write(self, data: bytes) -> None:
        """Append all of *data*; nothing after close(). From any thread."""
        with self._lock:
            try:
                while data and self._fd is not None:
                    data = data[os.write(self._fd, data) :]
            except OSError as error:
                self._tell(error)
                self._close()

    def close(self) -> None:
        """Complete the file. A second call does nothing."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                os.close(fd)
            except OSError as error:
                self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            logger.warning("vmonty: %s: %s: %s; the rest is dropped", self._what, self._path, error.strerror)
