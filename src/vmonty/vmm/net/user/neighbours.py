"""Which guest is at which MAC: what ARP and Neighbor Discovery learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

MOST_NEIGHBOURS, MOST_WAITING = 256, 64


class Neighbours(ABC):
    """Remembers guests of the net; *mine* are the addresses that are served here, which nobody can take."""

    def __init__(self, mine: tuple[bytes, ...], belongs: Callable[[bytes], bool]) -> None:
        self._mine = mine
        self._belongs = belongs
        self._known: dict[bytes, bytes] = {}
        self._waiting: list[tuple[bytes, Callable[[], None]]] = []

    @abstractmethod
    def request(self, address: bytes) -> None:
        """Ask the guests who *address* is."""

    def learn(self, address: bytes, mac: bytes) -> None:
        """*address* is at *mac*, unless it is ours, not of the network, or the MAC is no station's."""
        if self._known.get(address) == mac:
            return
        if address in self._mine or not self._belongs(address) or mac[0] & 1 or not any(mac):
            return
        if len(self._known) >= MOST_NEIGHBOURS and address not in self._known:
            self._known.pop(next(iter(self._known)))  # the oldest
        self._known[address] = mac
        ready = [fn for wanted, fn in self._waiting if wanted == address]
        self._waiting = [entry for entry in self._waiting if entry[0] != address]
        for fn in ready:
            fn()

    def lookup(self, address: bytes) -> bytes | None:
        """The MAC of *address*, None when it is not known."""
        return self._known.get(address)

    def when_known(self, address: bytes, fn: Callable[[], None]) -> None:
        """Call *fn* once *address* is known; asks for it. With too many that wait, the oldest is forgotten."""
        if address in self._known:
            fn()
            return
        self._waiting = [*self._waiting[-MOST_WAITING + 1 :], (address, fn)]
        self.request(address)
