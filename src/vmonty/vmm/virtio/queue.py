"""The device's side of a split virtqueue. Source: virtio 1.2, 2.7 "Split Virtqueues".

Fenced: rings are read through raw pointers, and not trusted. That is safe because enable() checks that the three areas
lie in guest RAM, indices are reduced to the ring's size before use, each word is read once, and each buffer's
address is looked up before it becomes a view. Compiled for the memory barriers that the protocol needs, and for speed.

    descriptor table          driver area (available)         device area (used)
    ┌──────────────────┐      ┌───────┬───────┬────────┐      ┌───────┬───────┬───────────┐
    │ addr  (8 bytes)  │      │ flags │  idx  │ ring[] │      │ flags │  idx  │ id,len [] │
    │ len, flags, next │      └───────┴───────┴────────┘      └───────┴───────┴───────────┘
    └──────────────────┘       then used_event                 then avail_event
"""

from __future__ import annotations

import cython

from vmonty.base.errors import VmontyError

# Of VirtIO features, those that concern a split ring.
FEATURE_INDIRECT_DESC, FEATURE_EVENT_IDX = 1 << 28, 1 << 29

# A chain of more descriptors is refused: preadv(2) takes no more, and no queue of ours is longer.
MOST_CHAIN = 1024
# "A driver MUST NOT create a descriptor chain of more than 2^32 bytes in total", virtio 1.2, 2.7.5.
MOST_TOTAL = 1 << 32


class BrokenRing(VmontyError):
    """The driver broke the protocol: the device must be reset before it goes on (virtio 1.2, 2.1.2)."""


class Chain:
    """A buffer that the driver made available: views of guest RAM that the device reads, and ones that it writes.

    ``readable`` and ``writable`` are lists of byte views, in order, to be used as they are by preadv and pwritev.
    ``take``, ``put`` and ``take_last`` consume from them. ``readable_size`` and ``writable_size`` are the totals at
    first. How the driver cut a message into descriptors means nothing (2.7.4), so use these for headers.
    """

    def __init__(self) -> None:
        self.readable = []
        self.writable = []
        self.places = []  # (guest-physical address, size) of what was writable at first

    def take(self, size: int) -> bytes | None:
        """Consume and return the first *size* bytes of what is readable; None, and nothing consumed, if it has less."""
        views = self.readable
        if views:
            first = views[0]
            if len(first) >= size:
                if len(first) == size:
                    del views[0]
                else:
                    views[0] = first[size:]
                return bytes(first[:size])
        if sum(map(len, views)) < size:
            return None
        return b"".join(_cut(views, size))

    def put(self, data: bytes | bytearray | memoryview) -> int:
        """Copy *data* into what is writable, which is consumed; returns how many bytes had room."""
        source = memoryview(data)
        done: cython.Py_ssize_t = 0
        for piece in _cut(self.writable, len(source)):
            end = done + len(piece)
            piece[:] = source[done:end]
            done = end
        return done

    def take_first(self, size: int) -> list[memoryview]:
        """Consume up to *size* bytes from the front of what is writable: their views, to be filled later."""
        return _cut(self.writable, size)

    def take_last(self) -> memoryview | None:
        """Consume the last writable byte, where several devices put a status; None when nothing is writable."""
        views = self.writable
        while views:
            last = views.pop()
            if len(last):
                if len(last) > 1:
                    views.append(last[:-1])
                return last[-1:]
        return None


def _cut(views: list, size: int) -> list:
    """Remove up to *size* bytes from the front of *views*; returns them as views."""
    left: cython.Py_ssize_t = size
    length: cython.Py_ssize_t
    found: list = []
    used: cython.Py_ssize_t = 0
    for view in views:
        if left == 0:
            break
        length = len(view)
        if length > left:
            found.append(view[:left])
            views[used] = view[left:]
            left = 0
            break
        found.append(view)
        left -= length
        used += 1
    del views[:used]
    return found


class Queue:
    """One virtqueue. The transport sets ``size``, ``descriptors``, ``driver`` and ``device`` (guest-physical addresses)
    and calls ``enable``; the device pops chains and pushes them back.

    Methods hold the GIL from end to end, so each is atomic for threads; one thread at a time may pop.
    """

    def __init__(self, memory, index: int, max_size: int) -> None:
        if not 0 < max_size <= 32768 or max_size & (max_size - 1):
            raise ValueError(f"a queue of {max_size}: the size is a power of two up to 32768")
        self._memory = memory
        self._ram = memory.ram
        self.index = index
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """As after power-on. Chains that are still out can be pushed, without effect."""
        self.size = self.max_size
        self.descriptors = self.driver = self.device = 0
        self.enabled = False
        self.epoch += 1
        self._available = self._used = 0
        self._signalled = 0
        self._signalled_valid = self._news = False
        self._in_flight = 0

    def enable(self, features: int) -> None:
        """Start on the rings that were set. Raises BrokenRing: not in RAM, not aligned, or of a bad size."""
        size = self.size
        if not 0 < size <= self.max_size or size & (size - 1):
            raise BrokenRing(f"queue {self.index} has size {size}")
        for what, address, length, alignment in (
            ("descriptor table", self.descriptors, 16 * size, 16),
            ("driver area", self.driver, 6 + 2 * size, 2),
            ("device area", self.device, 6 + 8 * size, 4),
        ):
            if address % alignment:
                raise BrokenRing(f"queue {self.index}: {what} at {address:#x} is not aligned")
            if self._find(address, length) == cython.NULL:
                raise BrokenRing(f"queue {self.index}: {what} at {address:#x} is not in RAM")
        self._mask = size - 1
        self._descriptor_table = self._find(self.descriptors, 16 * size)
        self._driver_area = self._find(self.driver, 6 + 2 * size)
        self._device_area = self._find(self.device, 6 + 8 * size)
        self._indirect = bool(features & FEATURE_INDIRECT_DESC)
        self._event_idx = bool(features & FEATURE_EVENT_IDX)
        self.enabled = True

    def _find(self, address, size):  # type: ignore[no-untyped-def]  # typed in the .pxd
        """The host address of guest-physical memory, NULL when it is not all RAM of one piece."""
        offset: cython.longlong = self._offset(address, size)
        return cython.NULL if offset < 0 else self._ram._base + offset

    def _offset(self, address, size):  # type: ignore[no-untyped-def]  # typed in the .pxd
        base: uint64_t
        length: uint64_t
        for block in self._memory.blocks:
            base, length = block.base, block.size
            if address >= base and address - base <= length and size <= length - (address - base):
                return address - base + cython.cast(uint64_t, block.offset)
        return -1

    # ---- from the driver --------------------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """The next buffer that the driver made available, None when there is none.

        Raises BrokenRing for a chain that loops, leaves RAM, or is not as the specification has it.
        """
        if not self.enabled:
            return None
        index: uint16_t = load16(cython.cast(cython.pointer(uint16_t), self._driver_area + 2), ACQUIRE)
        pending: uint16_t = index - self._available
        if pending == 0:
            return None
        if pending > self.size:
            raise BrokenRing(f"queue {self.index}: {pending} buffers are available in a ring of {self.size}")
        if self._in_flight >= self.size:
            # Each has a head of its own, which is the driver's again when it was used.
            raise BrokenRing(f"queue {self.index}: more buffers are out than the ring has entries")
        slot: cython.uint = self._available & self._mask
        head: uint16_t = load16(cython.cast(cython.pointer(uint16_t), self._driver_area + 4 + 2 * slot), ACQUIRE)
        if head > self._mask:
            raise BrokenRing(f"queue {self.index}: the ring names descriptor {head} of {self.size}")
        chain: Chain = self._walk(head)
        self._available += 1
        self._in_flight += 1
        return chain

    def _walk(self, head):  # type: ignore[no-untyped-def]  # typed in the .pxd
        chain: Chain = Chain()
        chain.head = head
        chain.epoch = self.epoch
        table: cython.p_uchar = self._descriptor_table
        entries: cython.uint = self.size
        left: cython.uint = entries  # more steps than entries are a loop
        at: cython.uint = head
        total: uint64_t = 0
        count: cython.uint = 0
        inside: cython.bint = False
        writing: cython.bint = False
        address: uint64_t
        word: uint64_t
        length: uint64_t
        flags: cython.uint
        offset: cython.longlong
        ram_view = self._ram._view
        while True:
            if at >= entries:
                raise BrokenRing(f"queue {self.index}: a chain names descriptor {at} of {entries}")
            if left == 0:
                raise BrokenRing(f"queue {self.index}: a chain loops")
            left -= 1
            address = load64(cython.cast(cython.pointer(uint64_t), table + 16 * at), RELAXED)
            word = load64(cython.cast(cython.pointer(uint64_t), table + 16 * at + 8), RELAXED)
            length = word & 0xFFFFFFFF
            flags = (word >> 32) & 0xFFFF
            if flags & INDIRECT:
                if not self._indirect or inside or flags & NEXT:
                    raise BrokenRing(f"queue {self.index}: an indirect descriptor where none may be")
                if length == 0 or length & 15 or length > 16 * 65536:
                    raise BrokenRing(f"queue {self.index}: an indirect table of {length} bytes")
                table = self._find(address, length)
                if table == cython.NULL:
                    raise BrokenRing(f"queue {self.index}: an indirect table at {address:#x} is not in RAM")
                inside = True
                entries = left = cython.cast(cython.uint, length >> 4)
                at = 0
                continue
            count += 1
            if count > MOST_CHAIN:
                raise BrokenRing(f"queue {self.index}: a chain of more than {MOST_CHAIN} descriptors")
            total += length
            if total > MOST_TOTAL:
                raise BrokenRing(f"queue {self.index}: a buffer of more than 4 GiB")
            offset = self._offset(address, length)
            if offset < 0:
                raise BrokenRing(f"queue {self.index}: {length} bytes at {address:#x} are not in RAM")
            if flags & WRITE:
                writing = True
                chain.writable.append(ram_view[offset : offset + cython.cast(cython.longlong, length)])
                chain.places.append((address, length))
                chain.writable_size += length
            elif writing:
                raise BrokenRing(f"queue {self.index}: a readable descriptor behind a writable one")
            else:
                chain.readable.append(ram_view[offset : offset + cython.cast(cython.longlong, length)])
                chain.readable_size += length
            if not flags & NEXT:
                return chain
            at = (word >> 48) & 0xFFFF

    def wait_for_more(self) -> bool:
        """Ask for notifications again; False when buffers came meanwhile: pop them first."""
        if not self.enabled:
            return True
        if self._event_idx:
            event: cython.p_uchar = self._device_area + 4 + 8 * cython.cast(cython.uint, self.size)
            store16(cython.cast(cython.pointer(uint16_t), event), self._available, RELAXED)
        else:
            store16(cython.cast(cython.pointer(uint16_t), self._device_area), 0, RELAXED)
        # The index must be read after the request is visible, or a buffer that comes in between is never noticed.
        fence(SEQUENTIAL)
        index: uint16_t = load16(cython.cast(cython.pointer(uint16_t), self._driver_area + 2), ACQUIRE)
        return index == self._available

    def suppress_notifications(self) -> None:
        """Say that the device looks by itself for now. Only a hint: notifications may still come."""
        if self.enabled and not self._event_idx:
            store16(cython.cast(cython.pointer(uint16_t), self._device_area), 1, RELAXED)

    def waiting(self) -> int:
        """How many buffers are available and not popped, as far as the ring can be believed."""
        if not self.enabled:
            return 0
        index: uint16_t = load16(cython.cast(cython.pointer(uint16_t), self._driver_area + 2), ACQUIRE)
        pending: uint16_t = index - self._available
        return min(pending, self.size)

    def undo_pop(self) -> None:
        """Give the buffer that was popped last back, unused: the next pop returns it again."""
        if self.enabled:
            self._available -= 1
            self._in_flight -= 1

    # ---- to the driver ----------------------------------------------------------------------------------

    def push(self, chain: Chain, written: int = 0) -> None:
        """Give *chain* back; *written* counts the bytes that the device wrote from the start of what was writable."""
        self.push_all([(chain, written)])

    def push_all(self, chains: list[tuple[Chain, int]]) -> None:
        """Give several back at once: the driver sees all or none."""
        area: cython.p_uchar
        used: uint16_t
        chain: Chain
        for chain, written in chains:
            if written and chain.epoch == self.epoch:
                self._tell(chain, written)
        if not self.enabled:
            return
        used = self._used
        for chain, written in chains:
            if chain.epoch != self.epoch:
                continue  # from before a reset
            area = self._device_area + 4 + 8 * (used & self._mask)
            store64(
                cython.cast(cython.pointer(uint64_t), area),
                cython.cast(uint64_t, chain.head) | cython.cast(uint64_t, written & 0xFFFFFFFF) << 32,
                RELAXED,
            )
            used += 1
            self._in_flight -= 1
        self._used = used
        self._news = True
        store16(cython.cast(cython.pointer(uint16_t), self._device_area + 2), used, RELEASE)

    def _tell(self, chain: Chain, written: int) -> None:
        """Announce a DMA write: code may lie there."""
        for address, length in chain.places:
            self._memory.written(address, min(length, written))
            written -= length
            if written <= 0:
                return

    def wants_interrupt(self) -> bool:
        """Whether the driver asked to be told of what was pushed since this was last asked (2.7.7)."""
        if not self.enabled or not self._news:
            return False
        self._news = False
        # The request must be read after what was pushed is visible, or a driver that goes to sleep is not woken.
        fence(SEQUENTIAL)
        if not self._event_idx:
            return not load16(cython.cast(cython.pointer(uint16_t), self._driver_area), RELAXED) & 1
        before: uint16_t = self._signalled
        valid: cython.bint = self._signalled_valid
        now: uint16_t = self._used
        self._signalled = now
        self._signalled_valid = True
        where: cython.p_uchar = self._driver_area + 4 + 2 * cython.cast(cython.uint, self.size)
        event: uint16_t = load16(cython.cast(cython.pointer(uint16_t), where), RELAXED)
        passed: uint16_t = now - event - 1
        moved: uint16_t = now - before
        return not valid or passed < moved

    @property
    def in_flight(self) -> int:
        """How many chains are popped and not pushed."""
        return self._in_flight

    @property
    def indices(self) -> tuple[int, int]:
        """(next available, next used) positions, modulo 2^16: with the addresses all that a snapshot needs."""
        return self._available, self._used

    def resume(self, available: int, used: int) -> None:
        """Go on at these positions after ``enable``."""
        self._available, self._used = available, used
