"""What a guest sends on a serial port that KVM answers for itself: a thread hands it on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vmonty.kvm.api import PortWindow

# A guest that prints goes on printing: one wake-up for what comes within this time, which nobody notices.
GATHER_S = 0.001


class Transmitter:
    """Calls *output* with what is collected in *window*, and with what is sent otherwise, in the guest's order.

    *failed* is called when *output* raises, on a thread named *name*.
    """

    def __init__(
        self, window: PortWindow, output: Callable[[bytes], None], failed: Callable[[Exception], None], name: str
    ) -> None:
        self._window = window
        self._output = output
        self._failed = failed
        self._order = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def send(self, data: bytes) -> None:
        """Hand on what was collected, then *data*. From any thread; as long as the output takes."""
        with self._order:
            if data := self._window.take() + data:
                self._output(data)

    def flush(self) -> None:
        """Hand on what was collected."""
        self.send(b"")

    def close(self) -> None:
        """Hand on the rest and end the thread; afterwards send() works on. A second call does nothing."""
        self._closing = True
        self._window.wake()
        self._thread.join()

    def _main(self) -> None:
        try:
            while not self._closing:
                self._window.wait()
                if not self._closing:
                    time.sleep(GATHER_S)
                self.flush()
        except Exception as error:  # nobody else would notice this thread's death
            self._failed(error)
