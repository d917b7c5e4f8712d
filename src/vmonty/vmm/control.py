"""The control socket: a Unix socket by which other processes of the same user steer a running machine.

Newline-delimited JSON. A request is an object with ``command`` and its arguments; ``id``, if given, comes back:

    {"command": "trace", "on": true, "names": ["HLT"], "vcpus": [0]}   →   {"return": {}}
    {"command": "registers", "cpu": 9, "id": 4}                        →   {"error": "cpu 9: …", "id": 4}

After ``trace`` the connection also gets {"trace": {…}} for each exit, and {"dropped": n} when it reads too slowly.
Whatever comes in, the worst that happens is an error line, or for a line without end that this connection is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vmonty.base.closing import Closing
from vmonty.base.errors import UsageError, VmontyError
from vmonty.vmm.commands import Command, Controlled, execute
from vmonty.vmm.net.loop import FULL, FULL_SECONDS
from vmonty.vmm.tracing import fields
from vmonty.vmm.unixsocket import UnixListener

LONGEST_LINE = 1 << 16
MOST_CONNECTIONS = 32
# How many exits may wait for a reader before they are dropped: a guest must not wait for it.
BACKLOG = 20_000
SEND_SECONDS = 10.0
LONGEST_PATH = 107  # unix(7), sun_path
TRACE_ARGUMENTS = {"on": bool, "names": list, "vcpus": list}


def socket_path(name: str | Path) -> Path:
    """Where the socket *name* is: a path if it has a slash, else in this user's run-time directory.

    Raises UsageError for a name that no socket can have.
    """
    path = Path(name)
    if "/" not in str(name):
        if not str(name):
            raise UsageError("a control socket needs a name or a path")
        folder = os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/vmonty-{os.getuid()}"
        path = Path(folder) / "vmonty" / f"{name}.sock"
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise UsageError(f"{path} is too long for a socket; give a path of at most {LONGEST_PATH} bytes")
    return path


def _private_folder(folder: Path) -> None:
    """Make the folder of named sockets. Raises UsageError when others may write there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise UsageError(f"{folder} belongs to someone else, or others may write there; give a path of your own")


class ControlSocket(Closing):
    """Listens at *name* (see socket_path) for as long as the block lasts. Raises UsageError when it cannot."""

    def __init__(self, name: str | Path, target: Controlled) -> None:
        self.path = socket_path(name)
        self._target = target
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._closed = False
        self._ended = threading.Event()
        try:
            if "/" not in str(name):
                _private_folder(self.path.parent)
            self._listener = UnixListener(self.path)
        except OSError as error:
            raise UsageError(f"the control socket {self.path}: {error.strerror}") from error
        self._socket = self._listener.socket
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                made, _ = self._socket.accept()
            except OSError as error:
                if self._closed or error.errno not in FULL:
                    return
                self._ended.wait(FULL_SECONDS)  # who connects stays pending
                continue
            with self._lock:
                if self._closed or len(self._connections) >= MOST_CONNECTIONS:
                    made.close()
                    continue
                connection = _Connection(made, self._target, self._connections.discard)
                self._connections.add(connection)
            connection.start()

    def close(self) -> None:
        """Close all connections, and take the file away. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._ended.set()
            connections = list(self._connections)
        self._listener.remove()
        # Wakes accept(), which close() does not.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for connection in connections:
            connection.close()


class _Connection:
    """One client: a thread that reads requests, and one that sends what it traces."""

    def __init__(self, made: socket.socket, target: Controlled, gone: Callable[[_Connection], None]) -> None:
        self._socket, self._target, self._gone = made, target, gone
        self._send_lock = threading.Lock()
        self._trace: _Trace | None = None
        made.settimeout(None)
        seconds = int(SEND_SECONDS).to_bytes(8, "little") + bytes(8)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)

    def start(self) -> None:
        """Serve it."""
        self._thread.start()

    def close(self) -> None:
        """End the connection, and wait for its threads; on one of them, which asked for the end, only the first."""
        # What it has asked is still answered.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def hang_up(self) -> None:
        """Nothing comes in or goes out any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        data = b""
        try:
            while part := self._socket.recv(LONGEST_LINE):
                data += part
                *lines, data = data.split(b"\n")
                for line in lines:
                    self.send(self._answer(line))
                if len(data) > LONGEST_LINE:
                    self.send({"error": f"a line has at most {LONGEST_LINE} bytes"})
                    return
        except OSError:
            return  # it has gone away, or does not read
        finally:
            self._stop_trace()
            self._gone(self)
            self._socket.close()

    def send(self, *messages: dict[str, Any]) -> None:
        """Send lines. Raises OSError when the other side does not take them."""
        text = "".join(json.dumps(message) + "\n" for message in messages)
        with self._send_lock:
            self._socket.sendall(text.encode())

    # ---- requests --------------------------------------------------------------------------------------------

    def _answer(self, line: bytes) -> dict[str, Any]:
        mark: dict[str, Any] = {}
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise UsageError("a request is a JSON object")
            if "id" in request:
                mark["id"] = request.pop("id")
            return {"return": self._execute(request), **mark}
        except (ValueError, RecursionError) as error:
            if isinstance(error, VmontyError):
                return {"error": str(error), **mark}
            return {"error": f"that is no JSON: {error}", **mark}
        except VmontyError as error:
            return {"error": str(error), **mark}
        except Exception as error:  # a machine must not end by what is asked of it
            return {"error": f"internal error: {type(error).__name__}: {error}", **mark}

    def _execute(self, request: dict[str, Any]) -> Any:
        return execute(self._target, request, {"trace": Command(TRACE_ARGUMENTS, self._set_trace)})

    def _set_trace(self, _: Controlled, on: bool = True, names: Sequence[Any] = (), vcpus: Sequence[Any] = ()) -> None:
        if not all(isinstance(name, str) for name in names) or not all(type(number) is int for number in vcpus):
            raise UsageError("trace: names are strings, vcpus are numbers")
        self._stop_trace()
        if on:
            trace = _Trace(self, frozenset(names), frozenset(vcpus))
            try:
                self._target.tracers.add(trace)
            except BaseException:
                trace.close()
                raise
            self._trace = trace

    def _stop_trace(self) -> None:
        trace, self._trace = self._trace, None
        if trace is not None:
            self._target.tracers.remove(trace)
            trace.close()


class _Trace:
    """Takes exits on vCPUs' threads, and sends them on its own."""

    def __init__(self, connection: _Connection, names: frozenset[str], vcpus: frozenset[int]) -> None:
        self._connection, self._names, self._vcpus = connection, names, vcpus
        self._queue: queue.Queue[Any] = queue.Queue(BACKLOG)
        self._dropped = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write, name="control-trace", daemon=True)
        self._thread.start()

    def __call__(self, record: Any) -> None:
        if (self._names and record.name not in self._names) or (self._vcpus and record.vcpu not in self._vcpus):
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """No more is sent when this returns."""
        self._ended.set()
        # Wakes the thread; when there is no room it is awake.
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join()

    def _write(self) -> None:
        told = 0
        while not self._ended.is_set():
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < 256:
                    batch.append(self._queue.get_nowait())
            if self._ended.is_set():
                self._dropped += sum(record is not None for record in batch)
                break
            messages: list[dict[str, Any]] = [{"trace": fields(record)} for record in batch]
            if (lost := self._dropped - told) > 0:
                messages.append({"dropped": lost})
                told += lost
            if not self._send(messages):
                return
        self._dropped += sum(record is not None for record in self._queue.queue)
        if self._dropped > told:
            self._send([{"dropped": self._dropped - told}])

    def _send(self, messages: list[dict[str, Any]]) -> bool:
        try:
            self._connection.send(*messages)
        except OSError:
            self._connection.hang_up()
            return False
        return True
