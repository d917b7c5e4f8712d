"""The contract between a network device and what is behind it.

A frame is an Ethernet frame without preamble and checksum, up to 64 KiB and its header when it is to be segmented.
Offload metadata has the meaning of virtio 1.2, 5.1.6 "Device Operation", struct virtio_net_hdr.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import TYPE_CHECKING

from vmonty.base.closing import Closing
from vmonty.vmm.net.loop import Loop

if TYPE_CHECKING:
    from vmonty.vmm.net.user.hostfwd import HostForward

ETHERNET_HEADER = 14

# The largest IPv4 packet behind an Ethernet header with a VLAN tag.
MOST_FRAME = ETHERNET_HEADER + 4 + 65535


class Gso(Enum):
    """How a large frame is to be cut into packets."""

    NONE = 0
    TCP4 = 1
    UDP = 3
    TCP6 = 4


@dataclass(frozen=True, slots=True)
class Offload:
    """What is still to be done to a frame. Offsets and sizes in bytes; their meaning as in struct virtio_net_hdr.

    With *needs_checksum* the field at csum_start + csum_offset holds the pseudo header's sum, and the checksum of all
    from *csum_start* is to be put there. With a *gso* other than NONE the payload behind *header_size* bytes is to be
    cut into pieces of *gso_size*.
    """

    needs_checksum: bool = False
    csum_start: int = 0
    csum_offset: int = 0
    gso: Gso = Gso.NONE
    gso_size: int = 0
    header_size: int = 0


class Accepts(Flag):
    """Which unfinished frames somebody takes; nothing until told."""

    NOTHING = 0
    CHECKSUM = auto()
    TCP4 = auto()
    TCP6 = auto()
    UDP = auto()
    ECN = auto()


# Takes a frame for the guest; False when the guest has no buffer: the backend keeps the frame until ready().
# It may be called on any thread, but not on two at once, and copies what it wants to keep.
Receive = Callable[["bytes | bytearray | memoryview", "Offload | None"], bool]


class NetBackend(ABC):
    """One end of a cable, the guest's device being the other.

    *offloads* says that it takes and gives unfinished frames: partial checksums, and TCP segments of up to 64 KiB.
    Frames from the guest are hostile: a backend drops what it cannot use, within bounded memory. *forwards* are the
    host's ports that lead to the guest.
    """

    offloads: bool = False
    forwards: Sequence[HostForward] = ()

    @abstractmethod
    def start(self, receive: Receive) -> None:
        """Deliver frames for the guest to *receive* from now on. Called once."""

    def guest_accepts(self, accepts: Accepts) -> None:
        """The guest's driver takes these unfinished frames (after feature negotiation, or a reset: NOTHING).

        Only meaningful with ``offloads``; a backend gives only what was accepted. From any thread.
        """

    @abstractmethod
    def send(self, frame: Sequence[bytes | bytearray | memoryview], offload: Offload | None) -> None:
        """Take a frame from the guest, given in pieces; consumed or copied on return. From any thread; never blocks.

        Without a place for it, it is dropped, as a cable does.
        """

    @abstractmethod
    def ready(self) -> None:
        """The guest has buffers again: give what was refused. From any thread."""

    @abstractmethod
    def close(self) -> None:
        """Stop; *receive* is not called any more after the return. A second call does nothing."""


class Cable(Closing):
    """What of the host a network card is connected to: it stays when a reset makes another machine.

    Kept are listening ports, a tap interface, a capture file. The guest's connections end with its machine.
    """

    @abstractmethod
    def plug(self, loop: Loop) -> NetBackend:
        """The end for the card of one machine, whose loop it is; closed before the next one is asked for.

        After close() it leads nowhere.
        """
