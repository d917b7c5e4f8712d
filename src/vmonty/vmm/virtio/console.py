"""Console device with several ports. Source: virtio 1.2, 5.3 "Console Device"."""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence

from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.queue import Chain, Queue

# 5.3.3 "Feature bits".
SIZE, MULTIPORT, EMERG_WRITE = 1, 2, 4
# 5.3.6.2 "Multiport Device Operation".
DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = range(8)

CONFIG = struct.Struct("<HHII")
CONTROL = struct.Struct("<IHH")
EMERG_OFFSET = 8

QUEUE_SIZE = 128
MOST_PORTS = 31
CONTROL_RECEIVE, CONTROL_TRANSMIT = 2, 3
# A driver that asks for messages without taking them is not believed any more.
MOST_MESSAGES = 1024
# After so many bytes of output others on the loop have their turn, the machine's end among them: a ring of buffers may
# name half a terabyte. Those of the usual drivers have a page.
MOST_OUTPUT = 64 << 10


class Port:
    """One port; *name* is what the guest finds in /dev/virtio-ports, and a *console* gets an hvc terminal.

    *output* takes what the guest writes, on the event loop's thread, which waits for it. ``receive`` and ``backlog``
    are those of a serial line: input waits until the guest has opened the port.
    """

    def __init__(self, output: Callable[[bytes], None], *, name: str = "", console: bool = False) -> None:
        self.output = output
        self.name = name
        self.console = console
        self.guest_open = False
        self._device: Console | None = None
        self._waiting: deque[bytes] = deque()
        self._backlog = 0
        self._lock = threading.Lock()

    def receive(self, data: bytes) -> None:
        """Queue *data* for the guest. From any thread."""
        with self._lock:
            self._waiting.append(bytes(data))
            self._backlog += len(data)
        if device := self._device:
            device.loop.call_soon(lambda: device.feed(self))

    def backlog(self) -> int:
        """How many bytes wait for the guest to take them. From any thread."""
        return self._backlog

    def take(self, size: int) -> bytes:
        """Up to *size* bytes of what waits."""
        with self._lock:
            if not self._waiting:
                return b""
            first = self._waiting.popleft()
            if len(first) > size:
                self._waiting.appendleft(first[size:])
                first = first[:size]
            self._backlog -= len(first)
            return first


class Console(VirtioDevice):
    """Up to MOST_PORTS *ports*; the first is the one that a driver without MULTIPORT sees."""

    device_id, name = 3, "virtio-console"
    pci_class = 0x078000

    def __init__(
        self, memory: GuestMemory, loop: EventLoop, ports: Sequence[Port], *, columns: int = 80, rows: int = 25
    ) -> None:
        if not 1 <= len(ports) <= MOST_PORTS:
            raise ValueError(f"{len(ports)} ports: a console has 1 to {MOST_PORTS}")
        sizes = [QUEUE_SIZE] * (2 * len(ports) + 2)
        config = CONFIG.pack(columns, rows, len(ports), 0)
        super().__init__(memory, loop, sizes, SIZE | MULTIPORT | EMERG_WRITE, config)
        self.ports = list(ports)
        self._messages: deque[bytes] = deque()
        # Of transmit queues, by index: the buffer that is handed on, with the bytes that are left.
        self._unfinished: dict[int, tuple[Chain, int]] = {}
        for port in ports:
            port._device = self

    @staticmethod
    def _queues_of(port: int) -> tuple[int, int]:
        """The indices of a port's receive and transmit queues (5.3.2)."""
        return (0, 1) if port == 0 else (2 * port + 2, 2 * port + 3)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal's size changed. From any thread."""

        def tell() -> None:
            config = CONFIG.pack(columns, rows, len(self.ports), 0)
            if not self.has(MULTIPORT):
                self.change_config(config)
                return
            self.config[:] = config
            for index, port in enumerate(self.ports):
                if port.console:
                    self._send(index, RESIZE, 0, struct.pack("<HH", rows, columns))

        self.loop.call_soon(tell)

    def config_written(self, offset: int, size: int, value: int) -> None:
        """A byte of emergency output (5.3.4)."""
        if offset == EMERG_OFFSET:
            self.ports[0].output(bytes((value & 0xFF,)))

    def started(self) -> None:
        """Without MULTIPORT the only port is open from the start."""
        if not self.has(MULTIPORT):
            self.ports[0].guest_open = True

    def stopped(self) -> None:
        """All ports are closed."""
        self._messages.clear()
        while self._unfinished:
            # The rest is not handed on; the buffer is the driver's again where its queue stays.
            index, (chain, _) = self._unfinished.popitem()
            self.queues[index].push(chain)
        for port in self.ports:
            port.guest_open = False

    def close(self) -> None:
        """Also ends output that is under way: what takes it is closed next."""
        super().close()
        self.status = 0

    def handle(self, queue: Queue) -> None:
        """Control messages, output, or room for input."""
        index = queue.index
        if index in (CONTROL_RECEIVE, CONTROL_TRANSMIT) and not self.has(MULTIPORT):
            return
        if index == CONTROL_RECEIVE:
            self._flush_messages()
        elif index == CONTROL_TRANSMIT:
            self.serve(queue, self._control)
        else:
            port = self.ports[0 if index < 2 else index // 2 - 1]
            if index % 2:
                self._output(port, queue)
            else:
                self.feed(port)

    # ---- data ---------------------------------------------------------------------------------------------

    def _output(self, port: Port, queue: Queue) -> None:
        if queue.index in self._coming_back:
            return  # one turn at a time, however often the driver notifies
        more = True  # whatever happens: the driver was told not to notify
        try:
            more = self._hand_on(port, queue)
        finally:
            if more:
                self._come_back(queue.index)
            self.signal(queue)

    def _hand_on(self, port: Port, queue: Queue) -> bool:
        """Hand on up to MOST_OUTPUT bytes of what the guest wrote; whether there may be more."""
        room = MOST_OUTPUT
        for _ in range(QUEUE_SIZE):  # empty buffers cost time, too
            if (unfinished := self._unfinished.pop(queue.index, None)) is not None:
                chain, left = unfinished
            else:
                queue.suppress_notifications()
                if (popped := queue.pop()) is None:
                    if queue.wait_for_more():
                        return False
                    continue
                chain, left = popped, popped.readable_size
            piece = chain.take(min(left, room)) or b""
            left -= len(piece)
            room -= len(piece)
            try:
                if piece:
                    port.output(piece)
            finally:
                if left:
                    self._unfinished[queue.index] = chain, left
                else:
                    queue.push(chain)
            if not room:
                break
        return True

    def feed(self, port: Port) -> None:
        """Give the guest what waits for it, as far as it has room. On the loop's thread."""
        number = self.ports.index(port)
        queue = self.queues[self._queues_of(number)[0]]
        if not self.running or not port.guest_open:
            return
        while port.backlog():
            chain = queue.pop()
            if chain is None:
                if queue.wait_for_more():
                    break
                continue
            queue.push(chain, chain.put(port.take(chain.writable_size)))
        self.signal(queue)

    # ---- control --------------------------------------------------------------------------------------------

    def _send(self, port: int, event: int, value: int, more: bytes = b"") -> None:
        if len(self._messages) < MOST_MESSAGES:
            self._messages.append(CONTROL.pack(port, event, value) + more)
        self._flush_messages()

    def _flush_messages(self) -> None:
        queue = self.queues[CONTROL_RECEIVE]
        while self._messages and self.running:
            chain = queue.pop()
            if chain is None:
                if queue.wait_for_more():
                    break
                continue
            queue.push(chain, chain.put(self._messages.popleft()))
        self.signal(queue)

    def _control(self, chain: Chain) -> int:
        message = chain.take(CONTROL.size)
        if message is None:
            return 0
        number, event, value = CONTROL.unpack(message)
        if event == DEVICE_READY:
            if value:
                for index in range(len(self.ports)):
                    self._send(index, DEVICE_ADD, 0)
        elif number < len(self.ports):
            port = self.ports[number]
            if event == PORT_READY and value:
                if port.console:
                    self._send(number, CONSOLE_PORT, 1)
                    columns, rows, *_ = CONFIG.unpack(self.config)
                    self._send(number, RESIZE, 0, struct.pack("<HH", rows, columns))
                if port.name:
                    self._send(number, PORT_NAME, 1, port.name.encode() + b"\0")
                self._send(number, PORT_OPEN, 1)
            elif event == PORT_OPEN:
                port.guest_open = bool(value)
                self.feed(port)
        return 0
