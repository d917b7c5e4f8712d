"""A UART whose plain accesses KVM answers: no guest can tell, and its output comes in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.vmm.hw.serial import IER, IER_TRANSMIT_EMPTY, LCR, LCR_DIVISOR_LATCH, LSR, MCR, MCR_LOOP, RBR_THR, Serial
from vmonty.vmm.transmitter import Transmitter

WAIT_S = 30


class FakeWindow:
    """A PortWindow; ``answer`` is what KVM does with an access."""

    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        self.idle = 0
        self.collects = False
        self._kept = bytearray()
        self._lock = threading.Lock()
        self._told = threading.Semaphore(0)

    def show(self, values: Mapping[int, int], idle: int, collects: bool) -> None:
        self.values, self.idle, self.collects = dict(values), idle, collects

    def answer(self, register: int, value: int | None) -> int | None:
        """What a read (no *value*) gives, or 0 for a write that it took; None: an exit."""
        if value is None:
            return self.values.get(register)
        if self.idle >> register & 1 and self.values.get(register) == value:
            return 0
        if register == RBR_THR and self.collects:
            with self._lock:
                self._kept.append(value)
            self._told.release()
            return 0
        return None

    def take(self) -> bytes:
        with self._lock:
            taken, self._kept = bytes(self._kept), bytearray()
        return taken

    def wait(self) -> None:
        self._told.acquire()

    def wake(self) -> None:
        self._told.release()


class Port:
    """A guest's side of a UART, with a window or without."""

    def __init__(self, window: FakeWindow | None, polled: bool) -> None:
        self.edges: list[int] = []
        self.sent = bytearray()
        self.window = window
        self.uart = Serial(self.edges.append, self._output, polled=polled, window=window)

    def _output(self, data: bytes) -> None:
        self.flush()
        self.sent += data

    def flush(self) -> None:
        if self.window is not None:
            self.sent += self.window.take()

    def access(self, register: int, value: int | None) -> int:
        if self.window is not None and (found := self.window.answer(register, value)) is not None:
            return found
        if value is None:
            return self.uart.read(register, 1)
        self.uart.write(register, 1, value)
        return 0


# Values that drivers write are likelier than all others.
VALUES = st.one_of(st.sampled_from([0, 1, 2, 3, 5, 7, 0xB, LCR_DIVISOR_LATCH, MCR_LOOP]), st.integers(0, 0xFF))
ACCESSES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 7), st.none()),
        st.tuples(st.integers(0, 7), VALUES),
        st.binary(min_size=1, max_size=20),
    ),
    max_size=80,
)


@pytest.mark.parametrize("polled", [False, True])
@given(ACCESSES)
def test_no_guest_can_tell(polled: bool, accesses: list[tuple[int, int | None] | bytes]) -> None:
    plain, windowed = Port(None, polled), Port(FakeWindow(), polled)
    for access in accesses:
        if isinstance(access, bytes):
            plain.uart.receive(access)
            windowed.uart.receive(access)
        else:
            assert windowed.access(*access) == plain.access(*access)
        assert windowed.edges == plain.edges
    windowed.flush()
    assert windowed.sent == plain.sent


def test_what_a_console_driver_does_is_answered() -> None:
    """As Linux prints: interrupts off, then status and byte in turns, interrupts on."""
    window = FakeWindow()
    Serial(lambda level: None, lambda data: None, window=window)
    assert window.answer(IER, None) == 0
    assert window.answer(IER, 0) == 0
    assert window.answer(LSR, None) == 0x60
    assert window.answer(RBR_THR, ord("x")) == 0
    assert window.take() == b"x"


@pytest.mark.parametrize(("register", "value"), [(IER, IER_TRANSMIT_EMPTY), (LCR, LCR_DIVISOR_LATCH), (MCR, MCR_LOOP)])
def test_bytes_that_do_more_than_go_out_are_exits(register: int, value: int) -> None:
    window = FakeWindow()
    uart = Serial(lambda level: None, lambda data: None, window=window)
    uart.write(register, 1, value)
    assert window.answer(RBR_THR, 0) is None
    uart.write(register, 1, 0)
    assert window.answer(RBR_THR, 0) == 0


def test_hidden_it_answers_nothing() -> None:
    window = FakeWindow()
    uart = Serial(lambda level: None, lambda data: None, window=window)
    uart.hide()
    uart.write(IER, 1, 1)
    uart.write(IER, 1, 0)
    assert [window.answer(register, 0) for register in range(8)] == [None] * 8
    assert [window.answer(register, None) for register in range(8)] == [None] * 8


# ---- the thread that hands output on -----------------------------------------------------------------------------


def transmitter(window: FakeWindow, output: Callable[[bytes], None]) -> tuple[Transmitter, list[Exception]]:
    failures: list[Exception] = []
    window.show({}, 0, True)
    return Transmitter(window, output, failures.append, "test"), failures


def test_what_is_collected_comes_by_itself() -> None:
    window, heard, came = FakeWindow(), bytearray(), threading.Event()

    def output(data: bytes) -> None:
        heard.extend(data)
        came.set()

    port, _ = transmitter(window, output)
    window.answer(RBR_THR, ord("a"))
    assert came.wait(WAIT_S)
    port.close()
    assert heard == b"a"


def test_what_is_sent_comes_behind_what_was_collected() -> None:
    window, heard = FakeWindow(), bytearray()
    port, _ = transmitter(window, heard.extend)
    for byte in b"one ":
        window.answer(RBR_THR, byte)
    port.send(b"two")
    assert heard == b"one two"
    port.close()
    port.close()


def test_the_end_hands_on_the_rest() -> None:
    window, heard = FakeWindow(), bytearray()
    port, _ = transmitter(window, heard.extend)
    for byte in b"last words":
        window.answer(RBR_THR, byte)
    port.close()
    assert heard == b"last words"
    port.send(b".")
    assert heard == b"last words."


def test_an_output_that_fails_is_told() -> None:
    def output(data: bytes) -> None:
        raise RuntimeError("no paper")

    window = FakeWindow()
    port, failures = transmitter(window, output)
    window.answer(RBR_THR, 0)
    port.close()
    assert [str(failure) for failure in failures] == ["no paper"]
