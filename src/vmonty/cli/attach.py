"""A connection to the control socket of a running machine: `vmonty run --control`, `VM.listen()`."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmonty.base.closing import Closing
from vmonty.base.errors import UsageError, VmontyError
from vmonty.vmm.control import socket_path


class Attached(Closing):
    """Connected while the block lasts. Raises UsageError when nobody listens."""

    def __init__(self, name: str | Path) -> None:
        path = socket_path(name)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise UsageError(
                f"no machine listens at {path} ({error.strerror}); start one with `vmonty run --control {name}`"
            ) from error
        self._lines = self._socket.makefile("rb")
        # Traced exits that came before an answer.
        self.waiting: deque[dict[str, Any]] = deque()

    def request(self, command: str, **arguments: Any) -> Any:
        """What the machine answers. Raises VmontyError when it refuses, or has ended."""
        self._socket.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
        while (message := self._read()) is not None:
            if "error" in message:
                raise VmontyError(str(message["error"]))
            if "return" in message:
                return message["return"]
            self.waiting.append(message)
        raise VmontyError("the machine has ended")

    def messages(self) -> Iterator[dict[str, Any]]:
        """What comes unasked, until the machine ends."""
        while self.waiting:
            yield self.waiting.popleft()
        while (message := self._read()) is not None:
            yield message

    def _read(self) -> dict[str, Any] | None:
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            return None
        if not line.endswith(b"\n"):
            return None
        message = json.loads(line)
        return message if isinstance(message, dict) else {}

    def hang_up(self) -> None:
        """messages() ends. From any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self._socket.close()
