"""Timers on virtual and real clocks."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from vmonty.kvm.soft.timer import HrTimers, VirtualTimers


@pytest.fixture
def timers() -> VirtualTimers:
    return VirtualTimers(now_ns=0)


def test_callbacks_run_in_the_order_of_their_deadlines_and_see_their_own_time(timers: VirtualTimers) -> None:
    seen: list[tuple[str, int]] = []
    for name, deadline in (("late", 300), ("early", 100), ("same", 100)):
        timers.arm(deadline, lambda name=name: seen.append((name, timers.clock.now_ns())))
    assert timers.advance(99) == 0
    assert timers.advance(1000) == 3
    assert seen == [("early", 100), ("same", 100), ("late", 300)]
    assert timers.clock.now_ns() == 1099


def test_a_cancelled_timer_does_not_run_and_is_no_deadline(timers: VirtualTimers) -> None:
    timer = timers.arm(10, lambda: pytest.fail("cancelled"))
    timers.arm(20, lambda: None)
    timer.cancel()
    timer.cancel()
    assert timers.next_deadline_ns() == 20
    assert timers.advance(100) == 1


def test_a_callback_may_arm_and_cancel(timers: VirtualTimers) -> None:
    ticks: list[int] = []
    other = timers.arm(25, lambda: pytest.fail("cancelled by the second tick"))

    def tick() -> None:
        ticks.append(timers.clock.now_ns())
        if len(ticks) == 2:
            other.cancel()
        timers.arm(timers.clock.now_ns() + 10, tick)

    timers.arm(10, tick)
    timers.advance(45)
    assert ticks == [10, 20, 30, 40]


def test_the_heap_does_not_grow_with_cancelled_timers(timers: VirtualTimers) -> None:
    for _ in range(10_000):
        timers.arm(1 << 62, lambda: None).cancel()
    assert len(timers._heap) < 500
    assert len(timers) == 0


def test_nothing_runs_after_close(timers: VirtualTimers) -> None:
    timers.arm(10, lambda: pytest.fail("closed"))
    timers.close()
    assert not timers.arm(5, lambda: pytest.fail("closed")).armed
    assert timers.advance(100) == 0


def test_a_thread_serves_the_real_clock_and_ends_with_close() -> None:
    timers = HrTimers()
    assert timers._thread is None
    fired: queue.Queue[str] = queue.Queue()
    now = time.monotonic_ns()
    timers.arm(now + 10**15, lambda: fired.put("far"))
    timers.arm(1 << 100, lambda: fired.put("beyond any float"))
    timers.arm(now + 1_000_000, lambda: fired.put("near"))
    assert fired.get(timeout=30) == "near"
    thread = timers._thread
    timers.close()
    timers.close()
    assert thread is not None
    assert not thread.is_alive()
    assert fired.empty()


def test_cancel_under_the_lock_is_exact() -> None:
    timers = HrTimers()
    ran = threading.Event()
    with timers.lock:
        timer = timers.arm(0, ran.set)
        # The thread may have taken the timer already; it waits for the lock that we hold.
        timer.cancel()
    after = threading.Event()
    timers.arm(0, after.set)
    assert after.wait(30)
    assert not ran.is_set()
    timers.close()


def test_an_exception_in_a_callback_is_reported_and_the_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: queue.Queue[object] = queue.Queue()
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.put(args.exc_value))
    timers = HrTimers()
    timers.arm(0, lambda: 1 // 0)
    assert isinstance(reported.get(timeout=30), ZeroDivisionError)
    after = threading.Event()
    timers.arm(0, after.set)
    assert after.wait(30)
    timers.close()
