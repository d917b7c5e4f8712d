"""Network device. Source: virtio 1.2, 5.1 "Network Device"."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Sequence

from vmonty.vmm.eventloop import EventLoop
from vmonty.vmm.memory import GuestMemory
from vmonty.vmm.net.backend import ETHERNET_HEADER, MOST_FRAME, Accepts, Gso, NetBackend, Offload
from vmonty.vmm.virtio.device import VirtioDevice
from vmonty.vmm.virtio.queue import BrokenRing, Chain, Queue

# 5.1.3 "Feature bits".
(
    CSUM, GUEST_CSUM, CTRL_GUEST_OFFLOADS, MTU, MAC, GUEST_TSO4, GUEST_TSO6, GUEST_UFO, HOST_TSO4, HOST_TSO6,
    HOST_UFO, MRG_RXBUF, STATUS, CTRL_VQ, CTRL_RX, CTRL_VLAN, CTRL_RX_EXTRA, CTRL_MAC_ADDR,
) = (1 << bit for bit in (0, 1, 2, 3, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 23))  # fmt: skip
GUEST_OFFLOADS = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO
HOST_OFFLOADS = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_UFO
# 5.1.3.1 "Feature bit requirements": what each needs.
REQUIRES = {
    GUEST_TSO4: GUEST_CSUM, GUEST_TSO6: GUEST_CSUM, GUEST_UFO: GUEST_CSUM,
    HOST_TSO4: CSUM, HOST_TSO6: CSUM, HOST_UFO: CSUM,
    CTRL_RX: CTRL_VQ, CTRL_VLAN: CTRL_VQ, CTRL_MAC_ADDR: CTRL_VQ, CTRL_GUEST_OFFLOADS: CTRL_VQ, CTRL_RX_EXTRA: CTRL_VQ,
}  # fmt: skip
ACCEPTS = {
    GUEST_CSUM: Accepts.CHECKSUM, GUEST_TSO4: Accepts.TCP4, GUEST_TSO6: Accepts.TCP6, GUEST_UFO: Accepts.UDP,
}  # fmt: skip
HOST_GSO = {Gso.TCP4: HOST_TSO4, Gso.TCP6: HOST_TSO6, Gso.UDP: HOST_UFO}

# 5.1.6 "Device Operation", struct virtio_net_hdr.
HEADER = struct.Struct("<BBHHHHH")
NEEDS_CSUM = 1
CONFIG = struct.Struct("<6sHHH")
LINK_UP = 1

RECEIVE, TRANSMIT, CONTROL = 0, 1, 2
QUEUE_SIZE = 256

# 5.1.6.5 "Control Virtqueue".
CLASS_RX, CLASS_MAC, CLASS_VLAN, CLASS_GUEST_OFFLOADS = 0, 1, 2, 5
PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST = range(6)
OK, ERR = 0, 1
MOST_ADDRESSES = 64  # of one table; with more, all are let in
MOST_CONTROL = 8192
VLANS = 4096
BROADCAST = b"\xff" * 6
TPID_VLAN = b"\x81\x00"


class Filter:
    """Which frames the driver wants (5.1.6.5.1 to 3). All, until it says otherwise."""

    def __init__(self, mac: bytes) -> None:
        self.mac = mac
        self.modes = [True, False, False, False, False, False]
        self.unicast: frozenset[bytes] | None = frozenset()  # None: too many to tell apart
        self.multicast: frozenset[bytes] | None = frozenset()
        self.vlans: set[int] | None = None  # None: all

    def passes(self, frame: bytes | bytearray | memoryview) -> bool:
        """Is *frame* for this guest?"""
        modes = self.modes
        if self.vlans is not None and frame[12:14] == TPID_VLAN:
            tag = (frame[14] & 0xF) << 8 | frame[15] if len(frame) >= 16 else 0
            if tag not in self.vlans:
                return False
        if modes[PROMISC]:
            return True
        to = bytes(frame[:6])
        if to == BROADCAST:
            return not modes[NOBCAST]
        if to[0] & 1:
            known = self.multicast is None or to in self.multicast
            return not modes[NOMULTI] and (modes[ALLMULTI] or known)
        known = to == self.mac or self.unicast is None or to in self.unicast
        return not modes[NOUNI] and (modes[ALLUNI] or known)


class Net(VirtioDevice):
    """A network card with address *mac* (6 bytes) on *backend*; *mtu* in bytes, when the network has its own."""

    device_id, name = 1, "virtio-net"
    pci_class = 0x020000

    def __init__(
        self, memory: GuestMemory, loop: EventLoop, backend: NetBackend, mac: bytes, *, mtu: int | None = None
    ) -> None:
        if len(mac) != 6 or mac[0] & 1:
            raise ValueError(f"{mac.hex(':')} is no address of a network card")
        features = MAC | STATUS | MRG_RXBUF | CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN | CTRL_MAC_ADDR
        if backend.offloads:
            features |= GUEST_OFFLOADS | HOST_OFFLOADS | CTRL_GUEST_OFFLOADS
        if mtu is not None:
            features |= MTU
        super().__init__(memory, loop, (QUEUE_SIZE, QUEUE_SIZE, 64), features, CONFIG.pack(mac, LINK_UP, 1, mtu or 0))
        self._mac = mac
        self._backend = backend
        self._lock = threading.Lock()  # of the receive queue and the filter: frames come on other threads
        self._filter = Filter(mac)
        self._open = False
        self._starved = False  # a frame was refused for want of buffers
        backend.start(self._receive)

    def set_link(self, up: bool) -> None:
        """Plug the cable in or pull it. From any thread."""
        mac, _, pairs, mtu = CONFIG.unpack(self.config)
        self.change_config(CONFIG.pack(mac, LINK_UP if up else 0, pairs, mtu))

    @property
    def link_up(self) -> bool:
        """Is the cable plugged in?"""
        return bool(self.config[6] & LINK_UP)

    def accepts(self, features: int) -> bool:
        """5.1.3.1."""
        return all(features & needed == needed for feature, needed in REQUIRES.items() if features & feature)

    def started(self) -> None:
        """Frames may come from now on."""
        with self._lock:
            self._filter = Filter(self._mac)
            if self.has(CTRL_VLAN):
                self._filter.vlans = set()
            self._open = True
        self._backend.guest_accepts(self._accepted(self.driver_features))
        self._backend.ready()

    @staticmethod
    def _accepted(features: int) -> Accepts:
        accepted = Accepts.NOTHING
        for feature, meaning in ACCEPTS.items():
            if features & feature:
                accepted |= meaning
        return accepted

    def reset(self) -> None:
        """As after power-on: with the card's own address, too."""
        super().reset()
        self.config[:6] = self._mac

    def stopped(self) -> None:
        """No frame touches guest RAM after this."""
        with self._lock:
            self._open = False
        self._backend.guest_accepts(Accepts.NOTHING)

    def close(self) -> None:
        """Also closes the backend."""
        self.stopped()
        self._backend.close()

    def handle(self, queue: Queue) -> None:
        """Room for frames, frames to send, or a command."""
        if queue.index == TRANSMIT:
            self.serve(queue, self._transmit)
        elif queue.index == CONTROL:
            if self.has(CTRL_VQ):
                self.serve(queue, self._control)
        else:
            with self._lock:
                starved, self._starved = self._starved, False
            if starved:
                self._backend.ready()

    # ---- from the guest -----------------------------------------------------------------------------------

    def _transmit(self, chain: Chain) -> int:
        header = chain.take(HEADER.size)
        if header is None:
            raise BrokenRing(f"{self.name}: a frame without header")
        size = chain.readable_size - HEADER.size
        if ETHERNET_HEADER <= size <= MOST_FRAME and self.link_up:
            # Metadata that make no sense: the frame is dropped, as one with a bad checksum is.
            with contextlib.suppress(ValueError):
                self._backend.send(chain.readable, self._offload(header, size))
        return 0

    def _offload(self, header: bytes, size: int) -> Offload | None:
        """What the header asks for. Raises ValueError for what was not negotiated or does not fit the frame."""
        flags, gso, header_size, gso_size, start, offset, _ = HEADER.unpack(header)
        kind = Gso(gso)
        if not flags & NEEDS_CSUM and kind is Gso.NONE:
            return None
        if not self.has(CSUM) or (flags & NEEDS_CSUM and start + offset + 2 > size):
            raise ValueError("a checksum outside the frame, or not negotiated")
        if kind is not Gso.NONE and not (self.has(HOST_GSO[kind]) and flags & NEEDS_CSUM and gso_size):
            raise ValueError("segmentation that was not negotiated, or without size or checksum")
        return Offload(bool(flags & NEEDS_CSUM), start, offset, kind, gso_size, min(header_size, size))

    # ---- to the guest ---------------------------------------------------------------------------------------

    def _receive(self, frame: bytes | bytearray | memoryview, offload: Offload | None) -> bool:
        """A frame from the backend, on any thread: False when there is no room for it now."""
        with self._lock:
            if not self._open or not self.running:
                return False
            if not self.link_up or len(frame) < ETHERNET_HEADER or not self._filter.passes(frame):
                return True
            queue = self.queues[RECEIVE]
            try:
                chains = self._room(queue, HEADER.size + len(frame))
            except BrokenRing as error:
                self.loop.call_soon(lambda reason=str(error): self.fail(reason))  # type: ignore[misc]
                return True
            if chains is None:
                self._starved = True
                return False
            self._fill(queue, chains, frame, offload)
        self.signal(queue)
        return True

    def _room(self, queue: Queue, size: int) -> list[Chain] | None:
        """Buffers for *size* bytes: several when they can be merged; none when the frame must be dropped.

        None when the driver has to give more first.
        """
        chains: list[Chain] = []
        room = 0
        while room < size:
            chain = queue.pop()
            if chain is None:
                if queue.wait_for_more():
                    for _ in chains:
                        queue.undo_pop()
                    return None
                continue
            if chain.writable_size < HEADER.size and not chains:
                raise BrokenRing(f"{self.name}: a receive buffer without room for the header")
            chains.append(chain)
            room += chain.writable_size
            if not self.has(MRG_RXBUF):
                if room < size:
                    queue.undo_pop()
                    return []
                break
            if len(chains) == queue.size and room < size:
                for _ in chains:
                    queue.undo_pop()
                return []
        return chains

    def _fill(
        self, queue: Queue, chains: Sequence[Chain], frame: bytes | bytearray | memoryview, offload: Offload | None
    ) -> None:
        if not chains:
            return
        done: list[tuple[Chain, int]] = []
        written = chains[0].put(self._header(offload, len(chains)))
        at, view = 0, memoryview(frame)
        for chain in chains:
            copied = chain.put(view[at:]) if at < len(view) else 0
            at += copied
            done.append((chain, written + copied))
            written = 0
        queue.push_all(done)

    @staticmethod
    def _header(offload: Offload | None, buffers: int) -> bytes:
        if offload is None:
            return HEADER.pack(0, 0, 0, 0, 0, 0, buffers)
        return HEADER.pack(
            NEEDS_CSUM if offload.needs_checksum else 0, offload.gso.value, offload.header_size, offload.gso_size,
            offload.csum_start, offload.csum_offset, buffers,
        )  # fmt: skip

    # ---- commands ---------------------------------------------------------------------------------------------

    def _control(self, chain: Chain) -> int:
        acknowledge = chain.take_last()
        if acknowledge is None or chain.readable_size < 2:
            raise BrokenRing(f"{self.name}: a command without code, or without room for an answer")
        command = chain.take(chain.readable_size) if chain.readable_size <= MOST_CONTROL else None
        done = command is not None and self._execute(command[0], command[1], command[2:])
        acknowledge[0] = OK if done else ERR
        return chain.writable_size

    def _execute(self, group: int, command: int, data: bytes) -> bool:
        if group == CLASS_GUEST_OFFLOADS:
            # Without the lock: a backend may hold its own when it gives us a frame.
            return command == 0 and self.has(CTRL_GUEST_OFFLOADS) and len(data) == 8 and self._set_offloads(data)
        with self._lock:
            if group == CLASS_RX and self.has(CTRL_RX) and command <= NOBCAST and len(data) == 1:
                self._filter.modes[command] = bool(data[0])
                return True
            if group == CLASS_MAC and command == 0 and self.has(CTRL_RX):
                return self._set_tables(data)
            if group == CLASS_MAC and command == 1 and self.has(CTRL_MAC_ADDR) and len(data) == 6:
                self._filter.mac = data
                self.config[:6] = data
                return True
            if group == CLASS_VLAN and self._filter.vlans is not None and len(data) == 2 and command < 2:
                number = int.from_bytes(data, "little")
                if number < VLANS:
                    (self._filter.vlans.discard if command else self._filter.vlans.add)(number)
                return number < VLANS
        return False

    def _set_offloads(self, data: bytes) -> bool:
        chosen = int.from_bytes(data, "little")
        if chosen & ~(self.driver_features & GUEST_OFFLOADS):
            return False
        self._backend.guest_accepts(self._accepted(chosen))
        return True

    def _set_tables(self, data: bytes) -> bool:
        """The addresses to let in: two tables, unicast and multicast, each a 32-bit count and its entries."""
        tables: list[frozenset[bytes] | None] = []
        for _ in range(2):
            count = int.from_bytes(data[:4], "little")
            end = 4 + 6 * count
            if len(data) < end:
                return False
            entries = frozenset(data[at : at + 6] for at in range(4, end, 6))
            tables.append(entries if len(entries) <= MOST_ADDRESSES else None)
            data = data[end:]
        if data:
            return False
        self._filter.unicast, self._filter.multicast = tables
        return True
