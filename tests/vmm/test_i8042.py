"""The keyboard controller: it answers a driver's questions, and resets the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmonty.vmm.hw.i8042 import (
    I8042,
    LINE_STUCK_LOW,
    OUTPUT_PORT_A20,
    OUTPUT_PORT_NOT_RESET,
    READ_COMMAND_BYTE,
    READ_OUTPUT_PORT,
    REPLIES,
    SELF_TEST,
    SELF_TEST_PASSED,
    STATUS_COMMAND,
    STATUS_OUTPUT_FULL,
    STATUS_SYSTEM,
    STATUS_TIMEOUT,
    STATUS_UNLOCKED,
    TEST_AUXILIARY,
    TEST_KEYBOARD,
    WRITE_COMMAND_BYTE,
    WRITE_KEYBOARD_BUFFER,
    WRITE_OUTPUT_PORT,
)  # fmt: skip

DATA, COMMAND = 0, 4
INPUT_FULL = 2


class Driver:
    def __init__(self) -> None:
        self.resets = 0
        self.chip = I8042(self._reset)

    def _reset(self) -> None:
        self.resets += 1

    @property
    def status(self) -> int:
        return self.chip.read(COMMAND, 1)

    def ask(self, command: int) -> int:
        self.chip.write(COMMAND, 1, command)
        assert self.status & STATUS_OUTPUT_FULL
        reply = self.chip.read(DATA, 1)
        assert not self.status & STATUS_OUTPUT_FULL
        return reply

    def tell(self, command: int, parameter: int) -> None:
        self.chip.write(COMMAND, 1, command)
        self.chip.write(DATA, 1, parameter)


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_at_rest(driver: Driver) -> None:
    assert driver.status == STATUS_UNLOCKED | STATUS_SYSTEM
    assert driver.chip.read(DATA, 1) == 0


def test_self_test(driver: Driver) -> None:
    driver.tell(WRITE_COMMAND_BYTE, 0)
    assert not driver.status & STATUS_SYSTEM
    assert driver.ask(SELF_TEST) == SELF_TEST_PASSED
    assert driver.status & STATUS_SYSTEM


@pytest.mark.parametrize("test", [TEST_KEYBOARD, TEST_AUXILIARY])
def test_no_device_is_connected(driver: Driver, test: int) -> None:
    assert driver.ask(test) == LINE_STUCK_LOW


def test_the_command_byte_is_kept(driver: Driver) -> None:
    driver.tell(WRITE_COMMAND_BYTE, 0x65)
    assert driver.ask(READ_COMMAND_BYTE) == 0x65


def test_what_is_put_into_the_buffer_comes_back(driver: Driver) -> None:
    driver.tell(WRITE_KEYBOARD_BUFFER, 0x1C)
    assert driver.status & STATUS_OUTPUT_FULL
    assert driver.chip.read(DATA, 1) == 0x1C


def test_the_status_tells_commands_from_data(driver: Driver) -> None:
    driver.chip.write(COMMAND, 1, WRITE_COMMAND_BYTE)
    assert driver.status & STATUS_COMMAND
    driver.chip.write(DATA, 1, 0)
    assert not driver.status & STATUS_COMMAND


def test_a_byte_for_the_keyboard_times_out(driver: Driver) -> None:
    driver.chip.write(DATA, 1, 0xFF)
    assert driver.status & STATUS_TIMEOUT
    assert not driver.status & STATUS_OUTPUT_FULL
    assert driver.ask(SELF_TEST) == SELF_TEST_PASSED
    assert not driver.status & STATUS_TIMEOUT, "the next command clears it"


@pytest.mark.parametrize("command", [0xFE, 0xF0, 0xFC])
def test_reset_by_a_pulse(driver: Driver, command: int) -> None:
    driver.chip.write(COMMAND, 1, command)
    assert driver.resets == 1


@pytest.mark.parametrize("command", [0xFF, 0xF1, 0xFD, 0xEE, 0x00])
def test_pulses_of_other_lines(driver: Driver, command: int) -> None:
    driver.chip.write(COMMAND, 1, command)
    assert driver.resets == 0


def test_reset_by_the_output_port(driver: Driver) -> None:
    driver.tell(WRITE_OUTPUT_PORT, OUTPUT_PORT_NOT_RESET)
    assert driver.resets == 0
    assert driver.ask(READ_OUTPUT_PORT) == OUTPUT_PORT_NOT_RESET
    driver.tell(WRITE_OUTPUT_PORT, OUTPUT_PORT_A20)
    assert driver.resets == 1


def test_a_command_cancels_the_parameter_of_the_one_before(driver: Driver) -> None:
    driver.chip.write(COMMAND, 1, WRITE_OUTPUT_PORT)
    assert driver.ask(SELF_TEST) == SELF_TEST_PASSED
    driver.chip.write(DATA, 1, 0)
    assert driver.resets == 0


def test_replies_that_nobody_reads_do_not_pile_up(driver: Driver) -> None:
    for _ in range(10_000):
        driver.chip.write(COMMAND, 1, READ_COMMAND_BYTE)
    driver.chip.write(COMMAND, 1, SELF_TEST)
    replies = []
    while driver.status & STATUS_OUTPUT_FULL:
        replies.append(driver.chip.read(DATA, 1))
    assert len(replies) == REPLIES
    assert replies[-1] == SELF_TEST_PASSED


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 0x1FF), st.booleans()), max_size=60))
def test_no_access_is_wrong(accesses: list[tuple[int, int, bool]]) -> None:
    driver = Driver()
    for offset, value, read in accesses:
        if read:
            assert 0 <= driver.chip.read(offset, 1) <= 0xFF
        else:
            driver.chip.write(offset, 1, value)
        assert not driver.status & INPUT_FULL, "it is always ready for more"
    resets = driver.resets
    driver.chip.write(COMMAND, 1, 0xFE)
    assert driver.resets == resets + 1
