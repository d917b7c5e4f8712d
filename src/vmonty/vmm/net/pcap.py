"""Write what passes a cable to a capture file. Source: draft-ietf-opsawg-pcap, "General File Structure"."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vmonty.base.errors import UsageError
from vmonty.vmm.net.backend import MOST_FRAME, Accepts, Cable, NetBackend, Offload, Receive
from vmonty.vmm.net.checksum import Buffer
from vmonty.vmm.net.loop import Loop

MAGIC_NANOSECONDS, VERSION, LINKTYPE_ETHERNET = 0xA1B2_3C4D, (2, 4), 1


class PcapFile:
    """A capture file. *snap_length* bytes of each frame are kept. Raises UsageError if the file cannot be written.

    A disk that fills up ends the capture, not the network: ``failure`` then says why.
    """

    def __init__(self, path: Path, snap_length: int = MOST_FRAME, clock: Callable[[], int] = time.time_ns) -> None:
        self.failure: str | None = None
        self._snap_length = snap_length
        self._clock = clock
        self._lock = threading.Lock()
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise UsageError(f"the capture file {path} cannot be written: {error.strerror}") from error
        self._write(struct.pack("<IHHIIII", MAGIC_NANOSECONDS, *VERSION, 0, 0, snap_length, LINKTYPE_ETHERNET))

    def record(self, frame: Sequence[Buffer]) -> None:
        """Append one frame, given in pieces, with the time of now. From any thread."""
        data = b"".join(frame)
        kept = data[: self._snap_length]
        seconds, nanoseconds = divmod(self._clock(), 1_000_000_000)
        self._write(struct.pack("<IIII", seconds & 0xFFFF_FFFF, nanoseconds, len(kept), len(data)) + kept)

    def _write(self, data: bytes) -> None:
        with self._lock:
            if self.failure is not None or self._file.closed:
                return
            try:
                self._file.write(data)
            except OSError as error:
                self.failure = f"the capture ended: {error.strerror}"

    def flush(self) -> None:
        """What was recorded up to now is in the file."""
        self._finish(lambda: None if self._file.closed else self._file.flush())

    def close(self) -> None:
        """Complete the file. A second call does nothing."""
        self._finish(self._file.close)

    def _finish(self, write: Callable[[], None]) -> None:
        with self._lock:
            try:
                write()
            except OSError as error:
                self.failure = f"the capture ended: {error.strerror}"


class PcapBackend(NetBackend):
    """Any backend, with all that passes in both directions recorded in *capture*; frames as they pass, unsegmented.

    The capture stays its owner's to close.
    """

    def __init__(self, inner: NetBackend, capture: PcapFile) -> None:
        self.offloads, self.forwards = inner.offloads, inner.forwards
        self._inner = inner
        self._capture = capture

    def start(self, receive: Receive) -> None:
        def recorded(frame: Buffer, offload: Offload | None) -> bool:
            if not receive(frame, offload):
                return False
            self._capture.record((frame,))
            return True

        self._inner.start(recorded)

    def guest_accepts(self, accepts: Accepts) -> None:
        self._inner.guest_accepts(accepts)

    def send(self, frame: Sequence[Buffer], offload: Offload | None) -> None:
        self._capture.record(frame)
        self._inner.send(frame, offload)

    def ready(self) -> None:
        self._inner.ready()

    def close(self) -> None:
        self._inner.close()
        self._capture.flush()


class PcapCable(Cable):
    """The cable *inner*, which it closes, recorded in the file *path*. Raises UsageError if that cannot be written."""

    def __init__(self, inner: Cable, path: Path) -> None:
        self._inner = inner
        self._capture = PcapFile(path)

    def plug(self, loop: Loop) -> NetBackend:
        return PcapBackend(self._inner.plug(loop), self._capture)

    def close(self) -> None:
        self._inner.close()
        self._capture.close()
