"""The event loop: files, timers, calls from other threads, and callbacks that fail."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from vmonty.vmm.eventloop import EventLoop

from .conftest import LIMIT_S


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    made = EventLoop("loop under test")
    made.start()
    yield made
    made.stop()
    assert not any(thread.name == "loop under test" for thread in threading.enumerate())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


class Mark:
    """Something that a callback reaches, and the test waits for."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self.thread = ""

    def __call__(self) -> None:
        self.thread = threading.current_thread().name
        self._reached.set()

    def wait(self) -> None:
        assert self._reached.wait(LIMIT_S)


def test_a_readable_file_is_reported_until_it_is_read(loop: EventLoop, pipe: tuple[int, int]) -> None:
    calls: list[bytes] = []
    done = Mark()

    def readable() -> None:
        # The first call leaves the data: level-triggered, it must come again.
        calls.append(os.read(pipe[0], 10) if calls else b"")
        if len(calls) == 2:
            loop.unwatch(pipe[0])
            done()

    loop.watch(pipe[0], readable)
    os.write(pipe[1], b"news")
    done.wait()
    assert calls == [b"", b"news"]
    assert done.thread == "loop under test"


def test_writable_and_hung_up(loop: EventLoop) -> None:
    reader, writer = os.pipe()
    done = Mark()

    def writable() -> None:
        loop.unwatch(writer)
        done()

    loop.watch(writer, writable, read=False, write=True)
    done.wait()
    gone = Mark()

    def hung_up() -> None:
        loop.unwatch(reader)
        gone()

    loop.watch(reader, hung_up, read=False)
    os.close(writer)
    gone.wait()
    os.close(reader)


def test_a_second_watch_replaces_the_first(loop: EventLoop, pipe: tuple[int, int]) -> None:
    second = Mark()

    def once() -> None:
        loop.unwatch(pipe[0])
        second()

    loop.watch(pipe[0], lambda: pytest.fail("replaced"))
    loop.watch(pipe[0], once)
    os.write(pipe[1], b"x")
    second.wait()


def test_an_event_for_a_file_that_the_batch_unwatched_is_dropped() -> None:
    """Both are ready when the loop first looks; the one that comes first ends the other."""
    loop = EventLoop("loop under test")
    ends = [os.eventfd(1), os.eventfd(1)]
    called: list[int] = []

    def call(index: int) -> None:
        called.append(index)
        for fd in ends:
            loop.unwatch(fd)

    loop.watch(ends[0], lambda: call(0))
    loop.watch(ends[1], lambda: call(1))
    loop.start()
    loop.run(lambda: None)
    loop.run(lambda: None)
    assert len(called) == 1
    loop.stop()
    for fd in ends:
        os.close(fd)


def test_calls_keep_their_order_and_those_before_start_wait() -> None:
    loop = EventLoop("loop under test")
    order: list[int] = []
    done = Mark()
    for number in range(5):
        loop.call_soon(lambda number=number: order.append(number))  # type: ignore[misc]
    loop.call_soon(done)
    assert order == []
    loop.start()
    done.wait()
    loop.stop()
    assert order == [0, 1, 2, 3, 4]


def test_timers_fire_in_order_of_time(loop: EventLoop) -> None:
    order: list[str] = []
    done = Mark()
    loop.call_later(0.05, lambda: (order.append("late"), done())[0])
    loop.call_later(0.001, lambda: order.append("early"))
    cancelled = loop.call_later(0.002, lambda: order.append("never"))
    cancelled.cancel()
    done.wait()
    assert order == ["early", "late"]
    assert not cancelled.active


def test_a_callback_that_raises_is_reported_and_the_loop_lives(
    loop: EventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)

    def fail() -> None:
        raise ZeroDivisionError("on purpose")

    loop.call_soon(fail)
    after = Mark()
    loop.call_soon(after)
    after.wait()
    assert [str(args.exc_value) for args in reported] == ["on purpose"]
    assert reported[0].thread is not None
    assert reported[0].thread.name == "loop under test"


def test_run_waits_and_raises_here(loop: EventLoop) -> None:
    names: list[str] = []
    loop.run(lambda: names.append(threading.current_thread().name))
    assert names == ["loop under test"]
    with pytest.raises(ZeroDivisionError):
        loop.run(lambda: 1 // 0)


def test_stop_from_a_callback_and_twice() -> None:
    loop = EventLoop("loop under test")
    loop.start()
    loop.call_soon(loop.stop)
    loop.stop()
    loop.stop()
    loop.call_soon(lambda: pytest.fail("after the end"))
    assert not loop._thread.is_alive()


def test_a_loop_that_never_started_can_be_stopped() -> None:
    EventLoop("loop under test").stop()


# ---- callbacks on another thread, in the loop's place -------------------------------------------------------------


def test_who_borrows_an_idle_loop_is_its_thread_meanwhile(loop: EventLoop) -> None:
    seen: list[object] = []
    assert not loop.on_thread()

    def callback() -> None:
        loop.run(lambda: seen.append("at once"))
        seen.extend((threading.current_thread().name, loop.on_thread(), loop.lent))

    assert loop.borrow(callback)
    assert seen == ["at once", threading.current_thread().name, True, True]
    assert not loop.on_thread()
    loop.run(lambda: seen.append(loop.lent))
    assert seen[-1] is False


def test_a_loop_that_is_busy_is_not_lent(loop: EventLoop) -> None:
    inside, go_on = Mark(), threading.Event()

    def busy() -> None:
        inside()
        assert go_on.wait(LIMIT_S)

    loop.call_soon(busy)
    inside.wait()
    try:
        assert not loop.borrow(lambda: pytest.fail("two callbacks at a time"))
    finally:
        go_on.set()


def test_it_is_not_lent_past_those_who_wait_for_it() -> None:
    loop = EventLoop("loop under test")
    order: list[int] = []
    loop.call_soon(lambda: order.append(1))
    assert not loop.borrow(lambda: order.append(2)), "nor before it was started"
    loop.start()
    loop.stop()
    assert order == [1]
    assert not loop.borrow(lambda: order.append(3)), "nor after its end"


def test_while_it_is_lent_the_thread_waits(loop: EventLoop) -> None:
    done, order = Mark(), []

    def later() -> None:
        order.append("thread")
        done()

    def callback() -> None:
        loop.call_soon(later)
        loop.call_later(0.0, lambda: order.append("timer"))
        # Long enough for the thread to wake up and try.
        assert not threading.Event().wait(0.05)
        order.append("borrower")

    assert loop.borrow(callback)
    done.wait()
    loop.run(lambda: None)
    assert order[0] == "borrower"
    assert done.thread == "loop under test"


def test_a_timer_of_a_borrower_fires(loop: EventLoop) -> None:
    done = Mark()
    assert loop.borrow(lambda: loop.call_later(0.01, done) and None)
    done.wait()
    assert done.thread == "loop under test"


def test_stop_waits_for_a_borrower() -> None:
    loop = EventLoop("loop under test")
    loop.start()
    inside, go_on = Mark(), threading.Event()

    def callback() -> None:
        inside()
        assert go_on.wait(LIMIT_S)

    borrower = threading.Thread(target=loop.borrow, args=(callback,))
    borrower.start()
    inside.wait()
    stopping = threading.Thread(target=loop.stop)
    stopping.start()
    stopping.join(0.05)
    assert stopping.is_alive()
    go_on.set()
    for thread in (stopping, borrower):
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_a_borrowed_callback_that_fails_is_reported(loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))

    def callback() -> None:
        raise RuntimeError("on purpose")

    assert loop.borrow(callback)
    assert [str(error) for error in told] == ["on purpose"]
    assert loop.borrow(lambda: None)
