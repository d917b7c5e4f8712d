"""TCP towards the guest, segment by segment, on a clock that the test moves."""

from __future__ import annotations

import itertools
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmonty.testing.net import FakeLoop
from vmonty.vmm.net.user import tcp
from vmonty.vmm.net.user.tcp import Budget, State, Tcb
from vmonty.vmm.net.user.tcp_segment import ACK, FIN, PSH, RST, SYN, Options

MASK = 0xFFFF_FFFF


class Ends:
    """The wire and the application of one connection, both in the test's hands."""

    def __init__(self, loop: FakeLoop | None = None, iss: int = 5000, mss: int = 1460) -> None:
        self.loop = loop or FakeLoop()
        self.sent: list[tuple[int, int, int, int, bytes]] = []
        self.options: list[bytes] = []
        self.congested = False
        self.got = bytearray()
        self.capacity: int | None = None
        self.supply: deque[bytes] = deque()
        self.events: list[str] = []
        self.budget = Budget(64 << 20)
        self.tcb = Tcb(self, self, self.budget, mss, iss)

    clock = property(lambda self: self.loop.clock)
    call_later = property(lambda self: self.loop.call_later)

    def output(self, flags, seq, ack, window, options, payload):
        self.sent.append((flags, seq & MASK, ack & MASK, window, bytes(payload)))
        self.options.append(options)

    def established(self):
        self.events.append("established")

    def read(self, size):
        if not self.supply:
            return None
        data = self.supply.popleft()
        if len(data) > size:
            self.supply.appendleft(data[size:])
        return data[:size]

    def write(self, data):
        taken = len(data) if self.capacity is None else min(len(data), self.capacity)
        if self.capacity is not None:
            self.capacity -= taken
        self.got += data[:taken]
        return taken

    def finish(self):
        self.events.append("finish")

    def aborted(self):
        self.events.append("aborted")

    def closed(self):
        self.events.append("closed")

    # The guest's side of a script.

    def take(self):
        self.tcb.flush()
        self.loop.advance(tcp.ACK_SECONDS)
        taken, self.sent = self.sent, []
        return taken

    def guest(self, seq, ack, flags=ACK, payload=b"", window=0xFFFF, options=b""):
        self.tcb.receive(seq & MASK, ack & MASK, flags, window, options, payload)


def opened(iss: int = 5000, irs: int = 1000, window: int = 0xFFFF, scale: int | None = 0) -> Ends:
    """A connection that the guest opened; its next number is irs + 1, ours iss + 1."""
    ends = Ends(iss=iss)
    ends.tcb.syn_arrived(irs, window, Options(1460, scale, True))
    ends.tcb.accept()
    ends.guest(irs + 1, iss + 1, window=window)
    assert ends.tcb.state is State.ESTABLISHED
    ends.take()
    return ends


def test_the_answer_to_a_syn_waits_for_the_host_and_offers_what_the_guest_offered():
    ends = Ends()
    ends.tcb.syn_arrived(1000, 0xFFFF, Options(1400, 7, True))
    assert ends.take() == []
    ends.tcb.accept()
    ((flags, seq, ack, _, _),) = ends.take()
    assert (flags, seq, ack) == (SYN | ACK, 5000, 1001)
    assert Options.parse(ends.options[0]) == Options(1460, tcp.RECEIVE_SCALE, True)
    assert ends.tcb.mss == 1400


def test_options_that_the_guest_did_not_offer_are_not_used():
    ends = Ends()
    ends.tcb.syn_arrived(1000, 0xFFFF, Options())
    ends.tcb.accept()
    assert Options.parse(ends.options[0]) == Options(1460, None, False)


def test_a_refused_connection_is_reset():
    ends = Ends()
    ends.tcb.syn_arrived(1000, 0xFFFF, Options())
    ends.tcb.refuse()
    assert ends.take() == [(RST | ACK, 0, 1001, 0, b"")]
    assert ends.events == ["closed"]


def test_a_lost_answer_to_a_syn_is_sent_again_when_the_guest_repeats_it():
    ends = Ends()
    ends.tcb.syn_arrived(1000, 0xFFFF, Options())
    ends.tcb.accept()
    ends.take()
    ends.guest(1000, 0, SYN)
    assert ends.take()[0][0] == SYN | ACK


def test_our_syn_is_repeated_ever_more_slowly_until_we_give_up():
    ends = Ends()
    ends.tcb.connect()
    times = []
    for _ in range(2000):
        if ends.sent:
            times.append(ends.loop.now)
            ends.sent.clear()
        ends.loop.advance(0.1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[:4] == pytest.approx([1, 2, 4, 8], abs=0.2)
    assert ends.events == ["aborted", "closed"]


def test_an_open_from_our_side_is_complete_with_the_guests_answer():
    ends = Ends()
    ends.tcb.connect()
    ends.guest(1000, 5001, SYN | ACK, options=Options(1000, 3, False).build())
    assert ends.tcb.state is State.ESTABLISHED
    assert ends.tcb.mss == 1000
    assert ends.take()[-1][:3] == (ACK, 5001, 1001)


def test_an_answer_that_acknowledges_nothing_of_ours_is_reset():
    ends = Ends()
    ends.tcb.connect()
    ends.take()
    ends.guest(1000, 77, SYN | ACK)
    assert ends.take() == [(RST, 77, 0, 0, b"")]
    assert ends.tcb.state is State.SYN_SENT


@pytest.mark.parametrize("irs", [1000, MASK - 5, MASK, (1 << 31) - 4])
def test_data_in_order_is_delivered_and_acknowledged_once_for_a_batch(irs):
    ends = opened(irs=irs)
    ends.guest(irs + 1, 5001, ACK, b"hello ")
    ends.guest(irs + 7, 5001, ACK | PSH, b"world")
    assert ends.got == b"hello world"
    assert [(flags, ack) for flags, _, ack, _, _ in ends.take()] == [(ACK, irs + 12 & MASK)]


def test_acknowledgements_wait_for_an_answer_or_for_more():
    ends = opened()
    ends.guest(1001, 5001, ACK, b"question")
    ends.tcb.flush()
    assert ends.sent == []
    ends.supply.append(b"answer")
    ends.tcb.flush()
    assert [(ack, payload) for _, _, ack, _, payload in ends.sent] == [(1009, b"answer")]
    ends.sent.clear()
    ends.guest(1009, 5007, ACK, bytes(tcp.ACK_BYTES))
    ends.tcb.flush()
    assert ends.sent[0][2] == 1009 + tcp.ACK_BYTES


def test_a_hole_is_told_at_once_with_what_is_behind_it():
    ends = opened()
    ends.options.clear()
    ends.guest(1006, 5001, ACK, b"second")
    assert ends.sent[-1][2] == 1001
    assert ends.options[-1] == bytes((1, 1, 5, 10)) + (1006).to_bytes(4, "big") + (1012).to_bytes(4, "big")
    ends.guest(1001, 5001, ACK, b"first")
    assert ends.got == b"firstsecond"
    assert ends.take()[-1][2] == 1012


@given(st.randoms(use_true_random=False), st.binary(min_size=1, max_size=400), st.booleans())
@settings(max_examples=200, deadline=None)
def test_pieces_in_any_order_overlapping_and_repeated_give_the_stream(rng, stream, near_wrap):
    irs = MASK - 100 if near_wrap else 1000
    ends = opened(irs=irs)
    pieces = [(at, min(at + rng.randint(1, 60), len(stream))) for at in range(0, len(stream), rng.randint(1, 20))]
    pieces += [(at, at + 1) for at in range(len(stream))]
    pieces += rng.choices(pieces, k=10)
    rng.shuffle(pieces)
    for start, end in pieces:
        fin = FIN if end == len(stream) and rng.random() < 0.5 else 0
        ends.guest(irs + 1 + start, 5001, ACK | fin, stream[start:end])
        assert ends.tcb._early_size <= len(stream) * 60
    ends.guest(irs + 1 + len(stream), 5001, ACK | FIN)
    assert ends.got == stream
    assert ends.events == ["established", "finish"]
    assert ends.tcb.state is State.CLOSE_WAIT


def test_a_slow_application_closes_the_window_and_opens_it_again():
    ends = opened()
    ends.capacity = 0
    sent = 0
    while True:
        *_, (_, _, _, window, _) = ends.take() or [(0, 0, 0, 0xFFFF, b"")]
        room = (window << tcp.RECEIVE_SCALE) if sent else 0xFFFF
        if not room:
            break
        ends.guest(1001 + sent, 5001, ACK, bytes(min(room, 30000)))
        sent += min(room, 30000)
        assert sent <= 2 * tcp.RECEIVE_BUFFER
    assert tcp.RECEIVE_BUFFER - 128 <= sent <= tcp.RECEIVE_BUFFER + 0xFFFF
    ends.guest(1001 + sent, 5001, ACK, bytes(1000))
    # The field counts in steps of the scale.
    assert ends.take()[-1][2] - (1001 + sent) < 1 << tcp.RECEIVE_SCALE
    sent = ends.tcb.rcv_nxt - 1001
    ends.capacity = None
    ends.tcb.writable()
    assert ends.take()[-1][3] << tcp.RECEIVE_SCALE >= tcp.RECEIVE_BUFFER // 2
    assert len(ends.got) == sent


def test_no_more_is_read_from_the_host_than_the_guests_window_takes():
    ends = opened(window=4000)
    ends.supply.extend([bytes(3000)] * 4)
    payload = sum(len(segment[4]) for segment in ends.take())
    assert payload <= 4000
    assert sum(map(len, ends.supply)) == 12000 - payload
    ends.guest(1001, 5001 + payload, window=4000)
    assert ends.take()[0][4]


def test_a_closed_window_is_probed_and_the_connection_lives():
    ends = opened(window=2000)
    ends.supply.append(bytes(5000))
    first = ends.take()
    ends.guest(1001, 5001 + sum(len(s[4]) for s in first), window=0)
    ends.take()
    for _ in range(300):
        ends.loop.advance(1)
        for flags, seq, *_ in ends.take():
            assert (flags, seq) == (ACK, ends.tcb.snd_una - 1)
            ends.guest(1001, ends.tcb.snd_una, window=0)
    assert ends.tcb.state is State.ESTABLISHED
    ends.guest(1001, ends.tcb.snd_una, window=8000)
    assert ends.take()[0][4]


def test_what_is_not_acknowledged_is_sent_again_later_and_later_until_the_end():
    ends = opened()
    ends.supply.append(b"data")
    ends.take()
    times = [ends.loop.now]
    for _ in range(4000):
        ends.loop.advance(0.1)
        if ends.sent and ends.sent[0][4]:
            assert ends.sent[0][1:] == (5001, 1001, ends.sent[0][3], b"data")
            times.append(ends.loop.now)
        ends.sent.clear()
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert all(later >= earlier - 0.2 for earlier, later in itertools.pairwise(gaps))
    assert len(gaps) == tcp.MOST_RETRIES
    assert ends.events[-2:] == ["aborted", "closed"]


def test_duplicate_acknowledgements_bring_the_missing_segment_without_waiting():
    ends = opened()
    ends.supply.extend([bytes([n]) * 1000 for n in range(6)])
    assert len(ends.take()) == 6
    for _ in range(1 + tcp.DUPLICATE_ACKS):
        assert not ends.sent
        ends.guest(1001, 6001)
    resent = [segment for segment in ends.take() if segment[4]]
    assert [(seq, payload[:1]) for _, seq, _, _, payload in resent] == [(6001, b"\1")]


def test_a_partial_acknowledgement_shrinks_what_is_kept():
    ends = opened()
    before = ends.budget.left
    ends.supply.append(bytes(1000))
    ends.take()
    ends.guest(1001, 5301)
    assert ends.budget.left == before - 700
    ends.loop.advance(5)
    assert {(segment[1], len(segment[4])) for segment in ends.sent} == {(5301, 700)}
    ends.guest(1001, 6001)
    assert ends.budget.left == before


def test_half_closed_by_the_guest_we_may_still_send():
    ends = opened()
    ends.guest(1001, 5001, FIN | ACK)
    assert ends.events[-1] == "finish"
    ends.supply.append(b"more")
    assert ends.take()[0][4] == b"more"
    ends.guest(1002, 5005)
    ends.supply.append(b"")
    assert ends.take()[-1][0] & FIN
    assert ends.tcb.state is State.LAST_ACK
    ends.guest(1002, 5006)
    assert ends.events[-1] == "closed"


def test_half_closed_by_us_we_still_receive_and_end_after_time_wait():
    ends = opened()
    ends.supply.append(b"")
    ends.take()
    ends.guest(1001, 5002)
    assert ends.tcb.state is State.FIN_WAIT_2
    ends.guest(1001, 5002, ACK, b"late")
    assert ends.got == b"late"
    ends.guest(1005, 5002, FIN | ACK)
    assert ends.take()[-1][2] == 1006
    assert ends.tcb.state is State.TIME_WAIT
    ends.guest(1005, 5002, FIN | ACK)
    assert ends.take()[-1][2] == 1006
    ends.loop.advance(tcp.TIME_WAIT_SECONDS + 0.1)
    assert ends.events[-1] == "closed"


def test_both_close_at_once():
    ends = opened()
    ends.supply.append(b"")
    ends.take()
    ends.guest(1001, 5001, FIN | ACK)
    assert ends.tcb.state is State.CLOSING
    ends.guest(1002, 5002)
    assert ends.tcb.state is State.TIME_WAIT


def test_the_end_of_the_stream_waits_for_a_slow_application():
    ends = opened()
    ends.capacity = 0
    ends.guest(1001, 5001, FIN | ACK, b"tail")
    assert "finish" not in ends.events
    ends.capacity = None
    ends.tcb.writable()
    assert ends.got == b"tail"
    assert ends.events[-1] == "finish"


def test_a_reset_at_the_expected_number_ends_it_and_others_are_challenged():
    ends = opened()
    ends.guest(1500, 5001, RST)
    assert ends.take() == [(ACK, 5001, 1001, ends.tcb._advertised(), b"")]
    ends.guest(900, 5001, RST)
    assert ends.take() == []
    ends.guest(1001, 5001, RST)
    assert ends.events[-2:] == ["aborted", "closed"]


@pytest.mark.parametrize(
    ("seq", "ack", "flags"),
    [
        (1001, 5001, SYN),
        (1500, 5001, SYN | ACK),
        (90_000_000, 5001, ACK),
        (1001, 9001, ACK),
        (1001, 4_000_000_000, ACK),
    ],
)
def test_what_does_not_fit_is_answered_with_where_we_are(seq, ack, flags):
    ends = opened()
    ends.guest(seq, ack, flags, b"")
    assert [(segment[0], segment[1], segment[2]) for segment in ends.take()] == [(ACK, 5001, 1001)]
    assert ends.tcb.state is State.ESTABLISHED
    assert not ends.got


def test_a_full_ring_stops_reading_the_host():
    ends = opened()
    ends.congested = True
    ends.supply.append(b"data")
    assert ends.take() == []
    assert ends.tcb.starved
    ends.congested = False
    assert ends.take()[0][4] == b"data"


def _connected_pair(seed: int, loss: float) -> tuple[Ends, Ends, FakeLoop]:
    """Two of our own, joined by a cable that loses, reorders and repeats."""
    loop, rng = FakeLoop(), random.Random(seed)
    left, right = Ends(loop, iss=MASK - 3000), Ends(loop, iss=17)

    def join(a: Ends, b: Ends) -> None:
        def output(flags, seq, ack, window, options, payload):
            if rng.random() < loss:
                return

            def arrive():
                if flags & SYN and b.tcb.state is State.CLOSED and not b.events:
                    b.tcb.syn_arrived(seq & MASK, window, Options.parse(options))
                    b.tcb.accept()
                else:
                    b.tcb.receive(seq & MASK, ack & MASK, flags, window, options, bytes(payload))
                b.tcb.flush()

            for _ in range(1 if rng.random() > loss / 4 else 2):
                loop.call_later(rng.random() * 0.004, arrive)

        a.output = output

    join(left, right)
    join(right, left)
    left.tcb.connect()
    return left, right, loop


@pytest.mark.parametrize("loss", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_both_streams_arrive_whole_over_a_bad_cable(seed, loss):
    left, right, loop = _connected_pair(seed, loss)
    rng = random.Random(seed)
    streams = [rng.randbytes(200_000), rng.randbytes(150_000)]
    for ends, stream in zip((left, right), streams, strict=True):
        at = 0
        while at < len(stream):
            size = rng.choice((1, 100, 1460, 9000, 60000))
            ends.supply.append(stream[at : at + size])
            at += size
        ends.supply.append(b"")
    for _ in range(4000):
        loop.advance(0.05)
        left.tcb.flush()
        right.tcb.flush()
        if left.tcb.over() and right.tcb.over():
            break
    assert right.got == streams[0]
    assert left.got == streams[1]
    assert "aborted" not in left.events + right.events
    assert left.budget.left == right.budget.left == 64 << 20
