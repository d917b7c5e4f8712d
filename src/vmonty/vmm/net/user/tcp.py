"""TCP towards the guest: one connection's state, its window, its retransmissions.

Source: RFC 9293, 3.10 "Event Processing"; RFC 7323 (window scale); RFC 6298 (retransmission timer);
RFC 5681 and 6582 (congestion control, fast recovery); RFC 5827 (early retransmit); RFC 5961 (blind attacks);
RFC 2018 (SACK, as receiver).

Sequence numbers are kept unwrapped: a segment's 32 bits are taken as the number nearest to what is expected.
Nothing is read from the application that cannot be sent now: what is kept is what is in flight, so the host's
socket feels the guest's window.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from vmonty.vmm.net.checksum import Buffer
from vmonty.vmm.net.loop import Timer
from vmonty.vmm.net.user.tcp_segment import ACK, FIN, MOST_PAYLOAD, PSH, RST, SYN, Options, sack_option

# What waits for the application, and what has come out of order, together, for one connection.
RECEIVE_BUFFER = 1 << 20
RECEIVE_SCALE = 7
# Out-of-order segments that are kept; each costs memory beyond its bytes.
MOST_OUT_OF_ORDER = 512

FIRST_RTO, LEAST_RTO, MOST_RTO = 1.0, 0.2, 30.0
MOST_RETRIES = 10
MOST_SYN_RETRIES = 6
TIME_WAIT_SECONDS = 2.0
# There is no network between here and the guest, only its ring, which pushes back.
FIRST_CWND, LEAST_CWND, MOST_CWND = 256 << 10, MOST_PAYLOAD, 8 << 20
DUPLICATE_ACKS = 3
# Reads of the application at a stretch, before others have their turn.
MOST_READS = 16

# Acknowledgements wait this long for an answer to ride on, or for this many bytes: each one interrupts a guest,
# and with fewer of them the guest sends larger segments. RFC 9293, 3.8.6.3 allows half a second.
ACK_SECONDS, ACK_BYTES = 0.002, 8192

HALF, MASK = 1 << 31, (1 << 32) - 1


class State(Enum):
    """RFC 9293, 3.3.2 "State Machine Overview". CONNECTING: the guest's SYN is here, the host has yet to agree."""

    CONNECTING = 0
    SYN_SENT = 1
    SYN_RECEIVED = 2
    ESTABLISHED = 3
    FIN_WAIT_1 = 4
    FIN_WAIT_2 = 5
    CLOSE_WAIT = 6
    CLOSING = 7
    LAST_ACK = 8
    TIME_WAIT = 9
    CLOSED = 10


_SENDING = (State.ESTABLISHED, State.CLOSE_WAIT)
_RECEIVING = (State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2)


class Application(Protocol):
    """What is behind a connection: the host's socket."""

    def established(self) -> None:
        """The handshake is done."""

    def read(self, size: int) -> bytes | None:
        """At most *size* bytes for the guest; b"" at the end, None when there is nothing now."""

    def write(self, data: Buffer) -> int:
        """Take bytes from the guest; how many were taken. After fewer than all, ``Tcb.writable()`` is to be called."""

    def finish(self) -> None:
        """The guest will send no more, and all of it was written."""

    def aborted(self) -> None:
        """The guest, or its silence, ended the connection."""

    def closed(self) -> None:
        """The connection is over: forget it. Follows the orderly end as well as ``aborted``."""


class Wire(Protocol):
    """The way to the guest, and time."""

    @property
    def congested(self) -> bool:
        """Whether the guest has no room now."""

    def output(self, flags: int, seq: int, ack: int, window: int, options: bytes, payload: Buffer) -> None:
        """Send a segment, which may be cut into smaller ones."""

    def clock(self) -> float:
        """Seconds, never less than before."""

    def call_later(self, seconds: float, fn: Callable[[], None]) -> Timer:
        """Call *fn* later on the same thread."""


class Budget:
    """Bytes that all connections together may keep beyond what one always may."""

    def __init__(self, limit: int) -> None:
        self.left = limit


class Tcb:
    """One connection (the transmission control block). Everything happens on one thread.

    Call ``receive`` for each segment, ``flush`` when a batch of them is over: it answers and sends.
    """

    def __init__(self, wire: Wire, application: Application, budget: Budget, mss: int, iss: int) -> None:
        self._wire = wire
        self._application = application
        self._budget = budget
        self.state = State.CLOSED
        self.mss = self.mss_offered = mss  # offered: what this side takes in one packet
        self.iss = iss
        # Sending. [snd_una, snd_max) is in flight, of which [snd_nxt, snd_max) is to be sent again.
        self.snd_una = self.snd_nxt = self.snd_max = iss
        self.snd_wnd = self._largest_window = 0
        self._snd_wl1 = self._snd_wl2 = 0
        self._snd_scale = 0
        self._chunks: deque[Buffer] = deque()
        self._cursor = 0
        self._end_of_input = self._fin_sent = False
        self._cwnd, self._ssthresh = FIRST_CWND, MOST_CWND
        self._duplicates = 0
        self._recover: int | None = None
        # Receiving.
        self.rcv_nxt = self._rcv_edge = 0
        self._rcv_scale = 0
        self._sack = False
        self._pending: deque[Buffer] = deque()
        self._pending_size = 0
        self._early: list[tuple[int, bytes]] = []
        self._early_size = 0
        self._latest_early = 0
        self._fin_at: int | None = None
        self._finished = False
        self._ack_due = False
        self._prompt = False  # the acknowledgement must not wait
        self._acked = 0  # what the guest knows that we have
        self._ack_timer: Timer | None = None
        # Time.
        self._srtt = self._rttvar = 0.0
        self.rto = FIRST_RTO
        self._timed: tuple[int, float] | None = None
        self._deadline: float | None = None
        self._timer: Timer | None = None
        self._timer_due = 0.0
        self._retries = 0
        self.starved = False

    def over(self) -> bool:
        """Whether the connection has ended."""
        return self.state is State.CLOSED

    # ---- opening ----------------------------------------------------------------------------------------

    def syn_arrived(self, seq: int, window: int, options: Options) -> None:
        """The guest wants this connection; ``accept`` or ``refuse`` follows when the host has decided."""
        self.state = State.CONNECTING
        self._learn(seq, window, options)

    def accept(self) -> None:
        """The host agreed: answer the guest's SYN."""
        if self.state is State.CONNECTING:
            self.state = State.SYN_RECEIVED
            self._send_syn()

    def refuse(self) -> None:
        """The host refused: so do we."""
        if self.state is State.CONNECTING:
            self._wire.output(RST | ACK, 0, self.rcv_nxt, 0, b"", b"")
            self._close()

    def connect(self) -> None:
        """Open towards the guest."""
        self.state = State.SYN_SENT
        self._rcv_scale, self._sack = RECEIVE_SCALE, True
        self._send_syn()

    def _send_syn(self) -> None:
        self.snd_nxt = self.snd_max = self.iss + 1
        mine = Options(self.mss_offered, self._rcv_scale or None, self._sack)
        flags = SYN if self.state is State.SYN_SENT else SYN | ACK
        window = min(RECEIVE_BUFFER, 0xFFFF)
        self._rcv_edge = max(self._rcv_edge, self.rcv_nxt + window)
        self._wire.output(flags, self.iss, self.rcv_nxt, window, mine.build(), b"")
        if self._retries == 0:
            self._timed = self.snd_max, self._wire.clock()
        self._arm()

    def _learn(self, seq: int, window: int, options: Options) -> None:
        """From the guest's SYN."""
        self.rcv_nxt = self._rcv_edge = seq + 1
        self._fin_at = None
        self.mss = min(self.mss, options.mss)
        scaled = options.scale is not None
        self._snd_scale = options.scale or 0
        self._rcv_scale = RECEIVE_SCALE if scaled else 0
        self._sack = options.sack
        self.snd_wnd = self._largest_window = window  # that of a SYN is not scaled
        self._snd_wl1, self._snd_wl2 = seq, self.snd_una

    # ---- segments ---------------------------------------------------------------------------------------

    def receive(self, seq: int, ack: int, flags: int, window: int, options: Buffer, payload: Buffer) -> None:
        """One segment from the guest; its checksum was right. *seq* and *ack* are the header's 32 bits."""
        match self.state:
            case State.CLOSED:
                return
            case State.SYN_SENT:
                self._in_syn_sent(seq, ack, flags, window, options)
                return
            case State.CONNECTING:
                if flags & RST and (seq - self.rcv_nxt & MASK) in (0, MASK):
                    self._abort()
                return
            case _:
                pass
        expected = self.rcv_nxt
        seq = expected + ((seq - expected + HALF) & MASK) - HALF
        fin = flags & FIN
        length = len(payload) + (1 if fin else 0)
        edge = self._rcv_edge
        if flags & SYN:
            if self.state is State.SYN_RECEIVED and seq == expected - 1 and not flags & ACK:
                self._send_syn()  # our answer was lost
            elif not flags & RST:
                self._challenge()
            return
        # At a closed window what stands at its edge is still looked at, for its acknowledgement.
        begins = expected <= seq <= edge
        fits = seq + length > expected and (seq < edge or seq == expected) if length else begins
        if flags & RST:
            if seq == expected:
                self._abort()
            elif fits:
                self._challenge()
            return
        if not fits:
            self._challenge()
            return
        if not flags & ACK:
            return
        if not self._acknowledgement(seq, ack, window, length):
            return
        if length and self.state in _RECEIVING:
            self._text(seq, payload, bool(fin))
        elif length:
            self._ack_due = self._prompt = True  # after the guest's FIN

    def _in_syn_sent(self, seq: int, ack: int, flags: int, window: int, options: Buffer) -> None:
        acceptable = bool(flags & ACK) and ack == self.snd_max & MASK
        if flags & ACK and not acceptable:
            if not flags & RST:
                self._wire.output(RST, ack, 0, 0, b"", b"")
            return
        if flags & RST:
            if acceptable:
                self._abort()
            return
        if not flags & SYN:
            return
        scale, sack = self._rcv_scale, self._sack
        self._learn(seq, window, Options.parse(options))
        self._rcv_scale = min(scale, self._rcv_scale)
        self._sack = sack and self._sack
        self._rcv_edge = self.rcv_nxt + min(RECEIVE_BUFFER, 0xFFFF)  # as our SYN said
        if not acceptable:
            # Both sides open at once.
            self.state = State.SYN_RECEIVED
            self._send_syn()
            return
        self._established(self.snd_max)
        self._ack_due = self._prompt = True

    def _established(self, ack: int) -> None:
        self.state = State.ESTABLISHED
        self._measure(ack)
        self.snd_una = ack
        self._retries = 0
        self._deadline = None
        self._rcv_edge = max(self._rcv_edge, self.rcv_nxt)
        self._application.established()

    def _acknowledgement(self, seq: int, ack: int, window: int, length: int) -> bool:
        """Take the acknowledgement and window of a segment at *seq*; False ends its processing."""
        una = self.snd_una
        ack = una + ((ack - una + HALF) & MASK) - HALF
        if self.state is State.SYN_RECEIVED:
            if ack != self.snd_max:
                self._wire.output(RST, ack, 0, 0, b"", b"")
                return False
            self._snd_wl1 = seq - 1
            self._established(ack)
            una = ack
        if ack > self.snd_max or ack < una - max(self._largest_window, 0xFFFF):
            self._challenge()
            return False
        size = window << self._snd_scale
        same_window = size == self.snd_wnd
        if ack >= una and (seq > self._snd_wl1 or (seq == self._snd_wl1 and ack >= self._snd_wl2)):
            self.snd_wnd = size
            self._largest_window = max(self._largest_window, size)
            self._snd_wl1, self._snd_wl2 = seq, ack
        if ack > una or not self._chunks or not self.snd_wnd:
            self._retries = 0
        if ack > una:
            self._advance(ack)
        elif ack == una and not length and same_window and self._chunks and self.snd_wnd:
            self._duplicate()
        return not self.over()

    def _advance(self, ack: int) -> None:
        """Everything below *ack* has arrived."""
        acked = ack - self.snd_una
        self.snd_una = ack
        self._duplicates = 0
        left = acked
        chunks = self._chunks
        while left and chunks:
            size = len(chunks[0])
            if size > left:
                chunks[0] = memoryview(chunks[0])[left:]
                self._budget.left += left
                break
            left -= size
            chunks.popleft()
            self._cursor = max(self._cursor - 1, 0)
            self._budget.left += size
        if self.snd_nxt < ack:
            self.snd_nxt, self._cursor = ack, 0
        self._measure(ack)
        if self._recover is not None and ack >= self._recover:
            self._recover = None
            self._cwnd = max(self._ssthresh, LEAST_CWND)
        elif self._recover is not None:
            self._resend_head()  # a partial acknowledgement: the next hole
        elif self._cwnd < self._ssthresh:
            self._cwnd = min(self._cwnd + acked, MOST_CWND)
        else:
            self._cwnd = min(self._cwnd + max(self.mss * acked // self._cwnd, 1), MOST_CWND)
        self._deadline = None
        if self.snd_una < self.snd_max:
            self._arm()
        elif self._fin_sent:
            match self.state:
                case State.FIN_WAIT_1:
                    self.state = State.FIN_WAIT_2
                case State.CLOSING:
                    self._time_wait()
                case State.LAST_ACK:
                    self._close()
                case _:
                    pass

    def _duplicate(self) -> None:
        self._duplicates += 1
        if self._recover is not None:
            self._cwnd = min(self._cwnd + self.mss, MOST_CWND)
            return
        # With little in flight there are never three: early retransmit.
        if self._duplicates >= min(DUPLICATE_ACKS, max(len(self._chunks) - 1, 1)):
            self._ssthresh = max((self.snd_max - self.snd_una) // 2, LEAST_CWND)
            self._cwnd = self._ssthresh + DUPLICATE_ACKS * self.mss
            self._recover = self.snd_max
            self._resend_head()

    def _resend_head(self) -> None:
        self._timed = None  # Karn: an answer could be to either
        if self._chunks:
            self._segment_out(ACK | PSH, self.snd_una, self._chunks[0])
        elif self._fin_sent and self.snd_una < self.snd_max:
            self._segment_out(FIN | ACK, self.snd_una, b"")

    def _text(self, seq: int, payload: Buffer, fin: bool) -> None:
        """Payload that overlaps the window."""
        end = seq + len(payload)
        if fin and (self._fin_at is None or self._fin_at == end) and end <= self._rcv_edge:
            self._fin_at = end
        if seq < self.rcv_nxt:
            self._prompt = True  # repeated: the guest missed something of ours
            payload = memoryview(payload)[self.rcv_nxt - seq :]
            seq = self.rcv_nxt
        if end > self._rcv_edge:
            payload = memoryview(payload)[: self._rcv_edge - seq]
            end = self._rcv_edge
        if self._fin_at is not None and end > self._fin_at:
            payload = memoryview(payload)[: max(self._fin_at - seq, 0)]
        if seq > self.rcv_nxt:
            if payload:
                self._keep_early(seq, payload)
            self._ack_now()  # a duplicate acknowledgement tells the guest of the hole
            return
        self._ack_due = True
        if payload:
            self.rcv_nxt += len(payload)
            self._deliver(payload)
        if self._early and not self.over():
            self._prompt = True
            self._take_early()
        if self._fin_at == self.rcv_nxt and self.state in _RECEIVING:
            self._guest_finished()

    def _keep_early(self, seq: int, payload: Buffer) -> None:
        if len(self._early) >= MOST_OUT_OF_ORDER or self._budget.left < len(payload):
            return  # the guest will send it again
        at = bisect.bisect_left(self._early, seq, key=lambda entry: entry[0])
        if at < len(self._early) and self._early[at][0] == seq:
            if len(self._early[at][1]) >= len(payload):
                return
            self._drop_early(at)
        elif at and self._early[at - 1][0] + len(self._early[at - 1][1]) >= seq + len(payload):
            return  # contained in one that is here
        # A copy: the frame around it may be much larger.
        self._early.insert(at, (seq, bytes(payload)))
        self._early_size += len(payload)
        self._budget.left -= len(payload)
        self._latest_early = seq
        while self._early_size > RECEIVE_BUFFER:
            self._drop_early(len(self._early) - 1)  # overlaps, as only a hostile guest sends

    def _drop_early(self, at: int) -> None:
        size = len(self._early.pop(at)[1])
        self._early_size -= size
        self._budget.left += size

    def _take_early(self) -> None:
        while self._early and self._early[0][0] <= self.rcv_nxt and not self.over():
            seq, data = self._early[0]
            self._drop_early(0)
            fresh = memoryview(data)[self.rcv_nxt - seq :]
            if fresh:
                self.rcv_nxt += len(fresh)
                self._deliver(fresh)

    def _deliver(self, data: Buffer) -> None:
        taken = 0 if self._pending else self._application.write(data)
        if taken < len(data) and not self.over():
            rest = bytes(memoryview(data)[taken:])
            self._pending.append(rest)
            self._pending_size += len(rest)
            self._budget.left -= len(rest)

    def writable(self) -> None:
        """The application takes more."""
        while self._pending and not self.over():
            data = self._pending.popleft()
            taken = self._application.write(data)
            if self.over():
                return
            self._pending_size -= taken
            self._budget.left += taken
            if taken < len(data):
                self._pending.appendleft(memoryview(data)[taken:])
                break
        self._tell_finished()
        # Tell a guest that waits; in steps that are worth a packet. RFC 9293, 3.8.6.2.2.
        if self.state in _RECEIVING and self._window() - (self._rcv_edge - self.rcv_nxt) >= RECEIVE_BUFFER // 4:
            self._ack_due = self._prompt = True

    def _guest_finished(self) -> None:
        self.rcv_nxt += 1
        self._ack_due = self._prompt = True
        while self._early:
            self._drop_early(0)
        match self.state:
            case State.ESTABLISHED:
                self.state = State.CLOSE_WAIT
            case State.FIN_WAIT_1:
                self.state = State.CLOSING
            case _:
                self._time_wait()
        self._finished = True
        self._tell_finished()

    def _tell_finished(self) -> None:
        if self._finished and not self._pending and not self.over():
            self._finished = False
            self._application.finish()

    # ---- answers ----------------------------------------------------------------------------------------

    def _window(self) -> int:
        room = RECEIVE_BUFFER - self._pending_size
        if self._budget.left < RECEIVE_BUFFER:
            room = min(room, max(self._budget.left, 0))
        return max(room, 0)

    def _advertised(self) -> int:
        """The window field; its right edge never moves back. RFC 9293, 3.8.6 "Managing the Window"."""
        window = max(self._rcv_edge - self.rcv_nxt, self._window())
        field = min(window >> self._rcv_scale, 0xFFFF)
        self._rcv_edge = max(self._rcv_edge, self.rcv_nxt + (field << self._rcv_scale))
        return field

    def _segment_out(self, flags: int, seq: int, payload: Buffer) -> None:
        options = b""
        if self._early and self._sack and not payload:
            options = sack_option(self._sack_blocks())
        self._ack_due = self._prompt = False
        self._acked = self.rcv_nxt
        self._wire.output(flags, seq, self.rcv_nxt, self._advertised(), options, payload)

    def _sack_blocks(self) -> list[tuple[int, int]]:
        blocks: list[tuple[int, int]] = []
        first = 0
        for seq, data in self._early:
            if blocks and seq <= blocks[-1][1]:
                blocks[-1] = blocks[-1][0], max(blocks[-1][1], seq + len(data))
            else:
                blocks.append((seq, seq + len(data)))
            if seq == self._latest_early:
                first = len(blocks) - 1
        # The one with the newest segment comes first; four fit.
        return [blocks[first], *blocks[:first], *blocks[first + 1 :]][:4]

    def _ack_now(self) -> None:
        self._segment_out(ACK, self.snd_nxt, b"")

    def _challenge(self) -> None:
        # At the end of a batch: a flood of these gets one answer. RFC 5961, 7 "ACK throttling".
        self._ack_due = self._prompt = True

    def flush(self) -> None:
        """Send what is to be sent: data, and the acknowledgement that is due."""
        if self.state in (State.CLOSED, State.CONNECTING, State.SYN_SENT):
            return
        if self.state in _SENDING or self.snd_nxt < self.snd_max:
            self._transmit()
        if not self._ack_due or self.over():
            return
        if self._prompt or self.rcv_nxt - self._acked >= ACK_BYTES:
            self._ack_now()
        elif self._ack_timer is None:
            self._ack_timer = self._wire.call_later(ACK_SECONDS, self._ack_waited)

    def _ack_waited(self) -> None:
        self._ack_timer = None
        if self._ack_due and not self.over():
            self._ack_now()

    def _transmit(self) -> None:
        self.starved = False
        reads = 0
        data_end = self.snd_max - (1 if self._fin_sent else 0)
        while True:
            room = self.snd_una + min(self.snd_wnd, self._cwnd) - self.snd_nxt
            if self.snd_nxt < data_end:
                chunk = self._chunks[self._cursor]
                if room < len(chunk):
                    if room < min(self.mss, len(chunk)):
                        break
                    self._split(room)
                    chunk = self._chunks[self._cursor]
                self._cursor += 1
                self._segment_out(ACK | PSH, self.snd_nxt, chunk)
                self.snd_nxt += len(chunk)
            elif self._fin_sent:
                if self.snd_nxt < self.snd_max:
                    self.snd_nxt = self.snd_max
                    self._segment_out(FIN | ACK, self.snd_max - 1, b"")
                break
            else:
                # Silly windows are waited out. RFC 9293, 3.8.6.2.1.
                if room < min(self.mss, max(self._largest_window // 2, 1)) or self._wire.congested:
                    self.starved = True
                    break
                if self._budget.left <= 0 and self._chunks:
                    self.starved = True
                    break
                if reads == MOST_READS:
                    break
                reads += 1
                size = min(room, MOST_PAYLOAD)
                data = self._application.read(size - size % self.mss if size > self.mss else size)
                if data is None or self.state not in _SENDING:
                    break
                if not data:
                    self._send_fin()
                    break
                self._new_data(data)
                data_end = self.snd_max
        if not self.over() and (self.snd_una < self.snd_max or self.starved) and self._deadline is None:
            self._arm()

    def _new_data(self, data: bytes) -> None:
        self._chunks.append(data)
        self._budget.left -= len(data)
        self._cursor = len(self._chunks)
        if self._timed is None:
            self._timed = self.snd_nxt + len(data), self._wire.clock()
        self._segment_out(ACK | PSH, self.snd_nxt, data)
        self.snd_nxt += len(data)
        self.snd_max = self.snd_nxt

    def _split(self, size: int) -> None:
        chunk = memoryview(self._chunks[self._cursor])
        self._chunks[self._cursor] = chunk[:size]
        self._chunks.insert(self._cursor + 1, chunk[size:])

    def _send_fin(self) -> None:
        self._end_of_input = self._fin_sent = True
        self.state = State.FIN_WAIT_1 if self.state is State.ESTABLISHED else State.LAST_ACK
        seq = self.snd_nxt
        self.snd_nxt += 1
        self.snd_max = self.snd_nxt
        self._segment_out(FIN | ACK, seq, b"")

    # ---- time -------------------------------------------------------------------------------------------

    def _measure(self, ack: int) -> None:
        """RFC 6298, 2 "The Basic Algorithm"."""
        if self._timed is None or ack < self._timed[0]:
            return
        sample = self._wire.clock() - self._timed[1]
        self._timed = None
        if self._srtt:
            self._rttvar = 0.75 * self._rttvar + 0.25 * abs(self._srtt - sample)
            self._srtt = 0.875 * self._srtt + 0.125 * sample
        else:
            self._srtt, self._rttvar = max(sample, 1e-6), sample / 2
        self.rto = min(max(self._srtt + 4 * self._rttvar, LEAST_RTO), MOST_RTO)

    def _arm(self, seconds: float | None = None) -> None:
        wait = self.rto if seconds is None else seconds
        self._deadline = self._wire.clock() + wait
        # One that is under way looks at the deadline when it fires, unless that were too late.
        if self._timer is not None and self._timer_due > self._deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer_due = self._deadline
            self._timer = self._wire.call_later(wait, self._timeout)

    def _timeout(self) -> None:
        self._timer = None
        if self._deadline is None or self.state is State.CLOSED:
            return
        left = self._deadline - self._wire.clock()
        if left > 0.001:
            self._timer_due = self._deadline
            self._timer = self._wire.call_later(left, self._timeout)
            return
        self._deadline = None
        if self.state is State.TIME_WAIT:
            self._close()
            return
        if self._wire.congested:
            self._arm()  # it is we who have not sent
            return
        most = MOST_SYN_RETRIES if self.state in (State.SYN_SENT, State.SYN_RECEIVED) else MOST_RETRIES
        self._retries += 1
        if self._retries > most:
            self._application.aborted()
            self.abort()
            return
        self.rto = min(self.rto * 2, MOST_RTO)
        self._timed = None
        if self.state in (State.SYN_SENT, State.SYN_RECEIVED):
            self._send_syn()
        elif self.snd_una == self.snd_max or (self.snd_wnd == 0 and self._chunks):
            # Probe the window with an old byte's number. RFC 9293, 3.8.6.1 "Zero-Window Probing".
            self._segment_out(ACK, self.snd_una - 1, b"")
            self._arm()
        else:
            self._ssthresh = max((self.snd_max - self.snd_una) // 2, LEAST_CWND)
            self._cwnd = LEAST_CWND
            self._recover = None
            self._duplicates = 0
            self.snd_nxt, self._cursor = self.snd_una, 0
            self._transmit()
            self._arm()

    def _time_wait(self) -> None:
        self.state = State.TIME_WAIT
        self._arm(TIME_WAIT_SECONDS)

    # ---- the end ----------------------------------------------------------------------------------------

    def abort(self) -> None:
        """Reset the connection from this side: the host's socket failed."""
        if self.state in (State.CLOSED, State.CONNECTING):
            self.refuse()
            return
        if self.state is not State.TIME_WAIT:
            self._wire.output(RST | ACK, self.snd_nxt, self.rcv_nxt, 0, b"", b"")
        self._close()

    def _abort(self) -> None:
        """The guest reset it."""
        self._application.aborted()
        self._close()

    def _close(self) -> None:
        if self.state is State.CLOSED:
            return
        self.state = State.CLOSED
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ack_timer is not None:
            self._ack_timer.cancel()
            self._ack_timer = None
        self._deadline = None
        self._budget.left += sum(map(len, self._chunks)) + self._pending_size + self._early_size
        self._chunks.clear()
        self._pending.clear()
        self._early.clear()
        self._pending_size = self._early_size = 0
        self._application.closed()
