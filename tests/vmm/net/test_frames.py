"""Checksums, segmentation, capture files, hub and loopback."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.base.errors import UsageError
from vmonty.testing.net import FrameGuest
from vmonty.vmm.net.backend import Accepts, Gso, Offload
from vmonty.vmm.net.checksum import TCP, checksum, correct, partial_sum, pseudo_header
from vmonty.vmm.net.hub import MOST_WAITING, Hub, LoopbackBackend
from vmonty.vmm.net.pcap import PcapBackend, PcapFile
from vmonty.vmm.net.segment import ACK, CWR, FIN, PSH, finish
from vmonty.vmm.net.user.tcp_segment import Takes, Template

EVERYTHING = ~Accepts.NOTHING


def naive(data: bytes, start: int = 0) -> int:
    """RFC 1071, 4.1, word by word."""
    total = start
    for at in range(0, len(data) - 1, 2):
        total += data[at] << 8 | data[at + 1]
    if len(data) & 1:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.binary(max_size=300), st.integers(0, 0x2FFFF))
def test_the_checksum_is_the_word_by_word_sum(data, start):
    assert partial_sum(data, start) == naive(data, start)
    assert checksum(data, start) == naive(data, start) ^ 0xFFFF


def test_the_example_of_the_rfc():
    assert partial_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2


@given(st.binary(min_size=2, max_size=100), st.integers(0, 799))
def test_a_flipped_bit_is_noticed(data, bit):
    data = data[: len(data) & ~1]
    whole = bytearray(data + checksum(data).to_bytes(2, "big"))
    assert correct(whole)
    bit %= len(whole) * 8
    whole[bit >> 3] ^= 1 << (bit & 7)
    assert not correct(whole)


def large_frame(payload: bytes, mss: int = 1000, flags: int = ACK | PSH | FIN | CWR) -> tuple[bytes, Offload]:
    template = Template((bytes(6), bytes(6)), bytes((10, 0, 2, 2)), bytes((10, 0, 2, 15)), (80, 4000))
    ((frame, offload),) = template.build(Takes(True, True), mss, flags, 0xFFFF_FF00, 7, 100, b"", payload)
    return bytes(frame), offload


@pytest.mark.parametrize("size", [1001, 2000, 5555, 64000])
def test_a_large_segment_becomes_packets_that_any_receiver_takes(size):
    payload = bytes(n % 251 for n in range(size))
    frame, offload = large_frame(payload)
    pieces = finish(frame, offload, Accepts.CHECKSUM)
    assert len(pieces) == -(-size // 1000)
    rebuilt = b""
    for number, (piece, left) in enumerate(pieces):
        assert left is None
        assert correct(piece[14:34])
        assert int.from_bytes(piece[16:18], "big") == len(piece) - 14
        assert correct(piece[34:], pseudo_header(piece[26:34], TCP, len(piece) - 34))
        assert int.from_bytes(piece[38:42], "big") == 0xFFFF_FF00 + 1000 * number & 0xFFFF_FFFF
        last = number == len(pieces) - 1
        assert piece[47] == ACK | (CWR if number == 0 else 0) | (PSH | FIN if last else 0)
        rebuilt += piece[54:]
    assert rebuilt == payload


def test_the_two_ways_to_a_whole_checksum_agree():
    frame, offload = large_frame(b"some bytes!")
    ((finished, _),) = finish(frame, offload, Accepts.NOTHING)
    template = Template((bytes(6), bytes(6)), bytes((10, 0, 2, 2)), bytes((10, 0, 2, 15)), (80, 4000))
    ((built, _),) = template.build(Takes(), 1000, ACK | PSH | FIN | CWR, 0xFFFF_FF00, 7, 100, b"", b"some bytes!")
    assert finished == built


def test_what_is_accepted_is_left_as_it_is():
    frame, offload = large_frame(bytes(3000))
    assert finish(frame, offload, EVERYTHING) == [(frame, offload)]


@given(
    st.binary(max_size=200),
    st.builds(
        Offload, st.booleans(), st.integers(0, 300), st.integers(0, 300), st.sampled_from(Gso), st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
    ),
)  # fmt: skip
def test_contradictory_metadata_is_refused_or_finished(frame, offload):
    try:
        pieces = finish(frame, offload, Accepts.NOTHING)
    except ValueError:
        return
    assert all(left is None or not left.needs_checksum for _, left in pieces)


def records(data: bytes) -> list[tuple[int, bytes]]:
    """(time in nanoseconds, frame) of a capture file."""
    magic, major, minor, _, _, _, link = struct.unpack_from("<IHHIIII", data)
    assert (magic, major, minor, link) == (0xA1B23C4D, 2, 4, 1)
    found, at = [], 24
    while at < len(data):
        seconds, nanoseconds, kept, length = struct.unpack_from("<IIII", data, at)
        assert kept <= length
        found.append((seconds * 10**9 + nanoseconds, data[at + 16 : at + 16 + kept]))
        at += 16 + kept
    assert at == len(data)
    return found


def test_a_capture_holds_both_directions_in_order(tmp_path):
    ticks = iter((5, 1_500_000_007))
    capture = PcapFile(tmp_path / "dump", clock=lambda: next(ticks))
    backend = PcapBackend(LoopbackBackend(), capture)
    guest = FrameGuest(backend)
    backend.send([b"a frame ", b"in pieces" + bytes(60)], None)
    backend.close()
    sent = b"a frame in pieces" + bytes(60)
    assert guest.frames == [sent]
    assert records((tmp_path / "dump").read_bytes()) == [(5, sent), (1_500_000_007, sent)]
    capture.close()


def test_a_capture_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        PcapFile(tmp_path / "no" / "dump")


def test_a_full_disk_ends_the_capture_and_not_the_network():
    with open("/dev/full", "wb"):
        pass
    from pathlib import Path

    capture = PcapFile(Path("/dev/full"))
    for _ in range(3):
        capture.record([bytes(60000)])
    capture.close()
    assert "ended" in (capture.failure or "")


def test_a_hub_gives_a_frame_to_all_others_as_each_takes_it():
    hub = Hub()
    guests = [FrameGuest(hub.port()) for _ in range(3)]
    guests[1].backend.guest_accepts(EVERYTHING)
    frame, offload = large_frame(bytes(3000))
    guests[0].backend.send([frame], offload)
    assert [len(guest.take()) for guest in guests] == [0, 1, 3]
    guests[1].backend.close()
    guests[0].backend.send([frame], offload)
    assert [len(guest.take()) for guest in guests] == [0, 0, 3]


def test_frames_wait_for_a_guest_without_room_but_not_without_end():
    hub = Hub()
    sender, slow = FrameGuest(hub.port()), FrameGuest(hub.port())
    slow.room = 0
    for number in range(MOST_WAITING + 50):
        sender.backend.send([number.to_bytes(2, "big") + bytes(60)], None)
    slow.room = None
    slow.backend.ready()
    assert [frame[:2] for frame in slow.frames] == [n.to_bytes(2, "big") for n in range(MOST_WAITING)]


def test_a_guests_nonsense_does_not_reach_another():
    hub = Hub()
    sender, other = FrameGuest(hub.port()), FrameGuest(hub.port())
    sender.backend.send([bytes(60)], Offload(True, 500, 500, Gso.TCP4, 1, 9))
    assert other.frames == []
