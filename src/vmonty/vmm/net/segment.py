"""Finish frames for somebody who takes fewer offloads than the sender left undone: checksums, segmentation.

Source: virtio 1.2, 5.1.6 "Device Operation"; RFC 9293, 3.1 "Header Format". Frames come from guests: whatever does
not fit together raises ValueError.
"""

from __future__ import annotations

from vmonty.vmm.net.backend import ETHERNET_HEADER, Accepts, Gso, Offload
from vmonty.vmm.net.checksum import TCP, Buffer, checksum, partial_sum, pseudo_header

ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_VLAN = b"\x08\x00", b"\x86\xdd", b"\x81\x00"
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))

Frame = tuple[Buffer, "Offload | None"]

# A segment size below this is an attack: 64 KiB would become thousands of frames.
LEAST_SEGMENT = 88

_NEEDED = {Gso.TCP4: Accepts.TCP4, Gso.TCP6: Accepts.TCP6, Gso.UDP: Accepts.UDP}


def finish(frame: Buffer, offload: Offload | None, accepts: Accepts) -> list[Frame]:
    """*frame* as one who takes only *accepts* wants it: as it is, with its checksum, or in segments.

    Raises ValueError for metadata or headers that contradict each other, or for UDP that would need fragments.
    """
    if offload is None:
        return [(frame, None)]
    if offload.gso is not Gso.NONE:
        if _NEEDED[offload.gso] in accepts and Accepts.CHECKSUM in accepts:
            return [(frame, offload)]
        return [(piece, None) for piece in _segments(frame, offload)]
    if not offload.needs_checksum or Accepts.CHECKSUM in accepts:
        return [(frame, offload)]
    return [(_with_checksum(frame, offload), None)]


def _with_checksum(frame: Buffer, offload: Offload) -> bytearray:
    done = bytearray(frame)
    start, at = offload.csum_start, offload.csum_start + offload.csum_offset
    if not 0 <= start <= at <= len(done) - 2:
        raise ValueError(f"a checksum at {at} of a frame of {len(done)} bytes")
    # The field itself holds the pseudo header's sum, so summing over it adds that.
    value = checksum(memoryview(done)[start:])
    done[at : at + 2] = (value or 0xFFFF).to_bytes(2, "big")  # UDP must not send 0; for TCP the two are the same
    return done


def _segments(frame: Buffer, offload: Offload) -> list[bytearray]:
    if offload.gso is Gso.UDP:
        raise ValueError("a UDP datagram that needs fragments")
    view = memoryview(frame)
    network = ETHERNET_HEADER + (4 if view[12:14] == ETHERTYPE_VLAN else 0)
    size = offload.gso_size
    if size < LEAST_SEGMENT:
        raise ValueError(f"segments of {size} bytes")
    four = offload.gso is Gso.TCP4
    if len(view) < network + (20 if four else 40):
        raise ValueError("no IP header")
    if view[network - 2 : network] != (ETHERTYPE_IPV4 if four else ETHERTYPE_IPV6):
        raise ValueError("not the protocol that the metadata names")
    transport = network + ((view[network] & 0xF) * 4 if four else 40)
    protocol = view[network + (9 if four else 6)]
    if protocol != TCP or transport < network + 20 or len(view) < transport + 20:
        raise ValueError("no TCP header")
    head = transport + (view[transport + 12] >> 4) * 4
    if head < transport + 20 or head > len(view):
        raise ValueError("a TCP header of a wrong length")
    addresses = view[network + 12 : network + 20] if four else view[network + 8 : network + 40]
    identification = int.from_bytes(view[network + 4 : network + 6], "big")
    sequence = int.from_bytes(view[transport + 4 : transport + 8], "big")
    flags = view[transport + 13]
    pieces = []
    payload = view[head:]
    for number, at in enumerate(range(0, max(len(payload), 1), size)):
        part = payload[at : at + size]
        piece = bytearray(view[:head]) + part
        first, last = number == 0, at + size >= len(payload)
        if four:
            piece[network + 2 : network + 4] = (len(piece) - network).to_bytes(2, "big")
            piece[network + 4 : network + 6] = (identification + number & 0xFFFF).to_bytes(2, "big")
            piece[network + 10 : network + 12] = b"\0\0"
            piece[network + 10 : network + 12] = checksum(piece[network:transport]).to_bytes(2, "big")
        else:
            piece[network + 4 : network + 6] = (len(piece) - transport).to_bytes(2, "big")
        piece[transport + 4 : transport + 8] = (sequence + at & 0xFFFF_FFFF).to_bytes(4, "big")
        piece[transport + 13] = flags & ~(0 if first else CWR) & ~(0 if last else FIN | PSH)
        piece[transport + 16 : transport + 18] = b"\0\0"
        start = pseudo_header(addresses, TCP, len(piece) - transport)
        total = partial_sum(memoryview(piece)[transport:], start) ^ 0xFFFF
        piece[transport + 16 : transport + 18] = total.to_bytes(2, "big")
        pieces.append(piece)
    return pieces
